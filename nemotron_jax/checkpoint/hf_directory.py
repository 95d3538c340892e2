"""A Hugging Face directory, checked in full: config.json, safetensors files, and whether they belong together.

Nothing is read of the weights until they are asked for; what is asked for is checked for NaN and infinity.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_jax.checkpoint import modelopt
from nemotron_jax.checkpoint.hf import STACKED, Entry, Table, canonical, copy_into, kv_scale_name, scheme_of, to_ours
from nemotron_jax.checkpoint.report import SHOWN, Report
from nemotron_jax.checkpoint.safetensors import (
    DTYPES,
    INDEX_FILE,
    NAMES,
    SINGLE_FILE,
    SafetensorsFile,
    Tensor,
)
from nemotron_jax.config import BLOCK_LETTERS, ModelConfig
from nemotron_jax.errors import CheckpointError, ConfigError
from nemotron_jax.hf_config import from_hf

CONFIG_FILE = "config.json"
QUANTIZED = "quantized"  # folder of a workdir: the quantised modules of the checkpoint that it was made from
BLOCK_BYTES = 1 << 24  # of a tensor that are handled at a time; memory of this size is used again, not mapped anew
FLOATS = ("BF16", "F16", "F32")
_OPTIONAL = ("input_scale", "input_global_scale", "k_scale", "v_scale")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies; ``expert``: its index in a file that stacks all experts in one tensor."""

    file: SafetensorsFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    expert: int | None = None

    def rows(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows [first, last) as they are stored: a view of the file."""
        if self.expert is None:
            return self.file.array(self.name, first, last)
        return self.file.array(self.name, self.expert, self.expert + 1)[0, first:last]

    def release(self) -> None:
        self.file.release(self.name)


class HFDirectory:
    """The model of a directory.

    Args:
      path: with config.json and safetensors files.
      partial: the directory holds the quantised modules alone (see convert.py).

    Attributes:
      values: config.json as it is.
      config, table: of the model.
      quant: how modules are quantised; None: not at all.
      stored: {name as we write it: Stored}.

    Raises:
      CheckpointError: everything that is wrong with the directory but the values of its tensors.
    """

    def __init__(self, path: Path, *, partial: bool = False) -> None:
        self.path, self.partial = path, partial
        self.report = Report(path)
        self.stored: dict[str, Stored] = {}
        self.quant: modelopt.QuantConfig | None = None
        config = self._read_config()
        whole = self._read_files()
        if config is not None:
            if config.mtp is None and any(name.startswith("mtp.") for name in self.stored):
                # transformers writes 0 of them beside their list of blocks; what is there is kept.
                config = from_hf({**self.values, "num_nextn_predict_layers": 1})
            self.config = config
            self.table = Table(config)
            self._compare(whole)
        if self.report:
            self._scan()
        self.report.raise_if_any()

    # Values

    def scheme(self, entry: Entry) -> modelopt.Scheme | None:
        """How the weight of an entry is quantised."""
        return scheme_of(entry, self.quant)

    def dtype(self, entry: Entry) -> str:
        """Of the values that ``rows`` gives: float32 of a quantised module."""
        return "F32" if self.scheme(entry) else self.stored[entry.name].dtype

    def leaf_dtype(self, path: str) -> np.dtype:
        """Of the values that ``leaf`` gives: float32 where experts of one stack differ."""
        found = {self.dtype(entry) for entry in self.table.of_leaf[path]}
        return DTYPES[found.pop()] if len(found) == 1 else np.dtype(np.float32)

    def rows(self, entry: Entry, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows [first, last) of the tensor on disk, dequantised; a view where it is stored so."""
        scheme = self.scheme(entry)
        if scheme is None:
            return self.report.check_finite(entry.name, self.stored[entry.name].rows(first, last))
        tensors = {}
        for suffix, tensor in self.module(entry).items():
            has_rows = len(tensor.shape) == 2
            array = tensor.rows(first, last) if has_rows else tensor.rows()
            tensors[suffix] = self.report.check_finite(f"{entry.module}.{suffix}", array)
        return modelopt.dequantize(scheme, tensors)

    def module(self, entry: Entry) -> dict[str, Stored]:
        """{suffix: Stored} of a quantised module."""
        scheme = self.scheme(entry)
        assert scheme is not None
        names = {suffix: f"{entry.module}.{suffix}" for suffix in scheme.tensors(entry.module, entry.shape)}
        return {suffix: self.stored[name] for suffix, name in names.items() if name in self.stored}

    def tensors(self, name: str) -> list[Tensor]:
        """[what the directory holds under a name], or nothing."""
        stored = self.stored.get(name)
        return [] if stored is None else [Tensor(name, stored.dtype, stored.shape)]

    def leaf(self, path: str, index: Sequence[slice]) -> np.ndarray:
        """A part of one of our leaves, in our layout: a new contiguous array of ``leaf_dtype``."""
        bounds = [slice(*part.indices(size)[:2]) for part, size in zip(index, self.table.shapes[path], strict=True)]
        entries = self.table.of_leaf[path]
        result = np.empty([part.stop - part.start for part in bounds], self.leaf_dtype(path))
        if entries[0].expert is None:
            copy_into(result, self._part(entries[0], path, bounds))
            self.release(entries[0])
            return result
        for place, entry in enumerate(entries[bounds[0]]):
            copy_into(result[place], self._part(entry, path, bounds[1:]))
            self.release(entry)
        return result

    def _part(self, entry: Entry, path: str, bounds: Sequence[slice]) -> np.ndarray:
        """Of one entry's share of a leaf: a view of the file where it is not dequantised."""
        before = sum(entry.rows[: entry.leaves.index(path)])
        rows = bounds[-1] if entry.transposed else bounds[0]
        array = to_ours(entry, self.rows(entry, before + rows.start, before + rows.stop))
        rest = (bounds[0], slice(None)) if entry.transposed else (slice(None), *bounds[1:])
        return array[rest[: array.ndim]]

    def release(self, entry: Entry) -> None:
        """The system may forget the pages that were read of an entry."""
        for stored in [self.stored[entry.name]] if not self.scheme(entry) else self.module(entry).values():
            stored.release()

    def weights(self, whole: Mapping[str, bool]) -> Iterator[tuple[Entry, int, np.ndarray]]:
        """(entry, first row, rows as on disk, dequantised) of what is wanted.

        Args:
          whole: {name of an entry: must it come in one piece?}; else it comes in blocks of BLOCK_BYTES.
        """
        for name in whole:
            entry = self.table.entries[name]
            step = entry.shape[0] if whole[entry.name] else block_rows(entry, DTYPES[self.dtype(entry)])
            for first in range(0, entry.shape[0], step):
                yield entry, first, self.rows(entry, first, min(first + step, entry.shape[0]))
            self.release(entry)

    # What is wrong

    def _read_config(self) -> ModelConfig | None:
        file = self.path / CONFIG_FILE
        try:
            self.values = json.loads(file.read_bytes())
        except OSError as error:
            self.report.add(f"{CONFIG_FILE} cannot be read: {error.strerror}.")
            return None
        except ValueError as error:
            self.report.add(f"{CONFIG_FILE} is not JSON: {error}.")
            return None
        try:
            self.quant = modelopt.read_quant_config(self.path)
        except CheckpointError as error:
            self.report.add(str(error))
        try:
            return from_hf(self.values)
        except ConfigError as error:
            self.report.add(str(error))
            return None

    def _read_files(self) -> bool:
        """Opens the files; returns whether all of them could be read."""
        names, weight_map = self._file_names()
        whole = bool(names)
        seen: dict[str, str] = {}
        for name in names:
            if not os.path.isfile(self.path / name):  # False too for what cannot be the name of a file
                held = sum(file == name for file in weight_map.values())
                self.report.add(f"{name} is missing" + (f": {held:,} tensors." if held else "."))
                whole = False
                continue
            try:
                file = SafetensorsFile(self.path / name)
            except CheckpointError as error:
                self.report.extend(str(error).splitlines(), name)
                whole = False
                continue
            for tensor in file.tensors.values():
                if tensor.name in seen:
                    self.report.add(f"{tensor.name} is in {seen[tensor.name]} and in {name}.", "twice")
                seen[tensor.name] = name
                if weight_map and weight_map.get(tensor.name) != name:
                    said = weight_map.get(tensor.name)
                    where = f"says {said}" if said else "does not know it"
                    self.report.add(f"{tensor.name} is in {name}, but {INDEX_FILE} {where}.", "index")
                self._add(file, tensor)
        if whole:
            for name in sorted(weight_map.keys() - seen.keys()):
                self.report.add(f"{name} is not in {weight_map[name]}, where {INDEX_FILE} has it.", "not there")
        return whole

    def _file_names(self) -> tuple[list[str], dict[str, str]]:
        """Names of the safetensors files, and {tensor: file} where an index says so."""
        index = self.path / INDEX_FILE
        if index.exists():
            try:
                weight_map = dict(json.loads(index.read_bytes())["weight_map"])
                names = sorted({os.fspath(name) for name in weight_map.values()})
            except (OSError, ValueError, KeyError, TypeError):
                names, weight_map = [], {}
            if not names:
                self.report.add(f"{INDEX_FILE} is damaged: an object with a weight_map was expected.")
            return names, weight_map
        if (self.path / SINGLE_FILE).exists():
            return [SINGLE_FILE], {}
        names = sorted(file.name for file in self.path.glob("model-*-of-*.safetensors"))
        if not names:
            self.report.add(f"there are no safetensors files ({INDEX_FILE} or {SINGLE_FILE}).")
            return [], {}
        count = re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", names[0])
        total = int(count[1]) if count else len(names)
        return [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)], {}

    def _add(self, file: SafetensorsFile, tensor: Tensor) -> None:
        name = canonical(tensor.name)
        stacked = STACKED.match(name)
        if stacked and len(tensor.shape) == 3:
            for expert in range(tensor.shape[0]):
                single = f"{stacked[1]}.{expert}.{stacked[2]}.weight"
                self.stored[single] = Stored(file, tensor.name, tensor.dtype, tensor.shape[1:], expert)
        else:
            self.stored[name] = Stored(file, tensor.name, tensor.dtype, tensor.shape)

    def _expected(self) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
        """(name, dtypes, shape) of every tensor that the directory should or may hold."""
        for entry in self.table.entries.values():
            try:
                scheme = self.scheme(entry)
                tensors = scheme.tensors(entry.module, entry.shape) if scheme else {}
            except CheckpointError as error:
                self.report.add(str(error))
                continue
            if not tensors and not self.partial:
                yield entry.name, ("F32",) if entry.is_float32 else FLOATS, entry.shape
            for suffix, (dtype, shape) in tensors.items():
                yield f"{entry.module}.{suffix}", (NAMES[dtype],), shape
            if self.quant is not None and self.quant.kv_scales(entry.module):
                yield kv_scale_name(entry.module), ("F32",), ()

    def _compare(self, whole: bool) -> None:
        """Compares what the files hold with what config.json says."""
        expected = {name: (dtypes, shape) for name, dtypes, shape in self._expected()}
        for name, (dtypes, shape) in expected.items():
            found = self.stored.get(name)
            if found is None:
                continue
            scalar = shape in ((), (1,)) and found.shape in ((), (1,))
            if found.shape != shape and not scalar:
                self.report.add(f"{name} has shape {list(found.shape)}, expected {list(shape)}.", "shape")
            if found.dtype not in dtypes:
                self.report.add(f"{name} is {found.dtype}, expected {' or '.join(dtypes)}.", "dtype")
        surplus = sorted(self.stored.keys() - expected.keys(), key=_natural)
        missing = [name for name in expected if name not in self.stored and name.rpartition(".")[2] not in _OPTIONAL]
        other_kind = self._layers_of_another_kind(surplus)
        # A file that could not be read is one fault; the tensors that it holds are not missing one by one.
        missing = [name for name in missing if whole and _layer(name) not in other_kind]
        surplus = [name for name in surplus if _layer(name) not in other_kind]
        for place, name in enumerate(surplus):
            close = _nearest(name, missing) if place < SHOWN else None  # it takes time, and only so many are shown
            if close:
                self.report.add(f"{name} is no tensor of this model; {close} is missing.", "misnamed")
                missing.remove(close)
            else:
                self.report.add(f"{name} is no tensor of this model.", "surplus")
        self.report.extend((f"{name} is missing." for name in missing), "missing")

    def _layers_of_another_kind(self, surplus: Sequence[str]) -> set[str]:
        """Layers whose tensors are those of another block than config.json says; each is one fault."""
        marks = {"in_proj": "M", "q_proj": "*", "gate": "E", "up_proj": "-"}
        patterns = {"backbone": self.config.pattern, "mtp": self.config.mtp.pattern if self.config.mtp else ""}
        found: dict[str, str] = {}
        for name in surplus:
            parts = name.split(".")
            if len(parts) > 4 and parts[0] in patterns and parts[1] == "layers" and parts[2].isdecimal():
                said = patterns[parts[0]][int(parts[2]) : int(parts[2]) + 1]
                letter = marks.get(parts[4], "") if parts[3] == "mixer" else ""
                if letter != said and (letter or not said):
                    found[_layer(name)] = letter or found.get(_layer(name), "")
        for layer, letter in found.items():
            stack, _, number = layer.split(".")
            said = patterns[stack][int(number) : int(number) + 1]
            what = BLOCK_LETTERS.get(letter, "another block")
            instead = BLOCK_LETTERS[said] if said else f"there are {len(patterns[stack])} layers"
            self.report.add(f"{layer}: the tensors are those of {what}, {CONFIG_FILE} says {instead}.", "kind")
        return set(found)

    def _scan(self) -> None:
        """Looks at all values that can be read, so that the report is complete."""
        for name, stored in self.stored.items():
            for first in range(0, stored.shape[0] if stored.shape else 1, 1 << 14):
                self.report.check_finite(name, stored.rows(first, first + (1 << 14)))
            stored.release()


def block_rows(entry: Entry, dtype: np.dtype) -> int:
    """Rows of a tensor on disk that are handled at a time."""
    width = int(np.prod(entry.shape[1:])) * dtype.itemsize
    return max(1, BLOCK_BYTES // width)


def _nearest(name: str, missing: Sequence[str]) -> str | None:
    """The missing tensor that a name may have been meant for, best one of the same layer."""
    same_layer = [other for other in missing if _layer(other) == _layer(name)]
    return next(iter(difflib.get_close_matches(name, (same_layer or missing)[:500], n=1, cutoff=0.8)), None)


def _layer(name: str) -> str:
    """``backbone.layers.3`` of a tensor in it."""
    return ".".join(name.split(".")[:3])


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
