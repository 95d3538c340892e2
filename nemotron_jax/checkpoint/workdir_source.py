"""A training workdir as a source of tensors in Hugging Face's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from nemotron_jax.checkpoint.hf import Entry, Table, item_name, to_theirs
from nemotron_jax.checkpoint.hf_directory import QUANTIZED, HFDirectory
from nemotron_jax.checkpoint.leaves import LeafReader
from nemotron_jax.checkpoint.report import Report
from nemotron_jax.checkpoint.safetensors import DTYPES, NAMES
from nemotron_jax.config import ModelConfig


class WorkdirSource:
    """The newest (or a given) checkpoint of a training workdir.

    Attributes:
      config, table: of the model.
      quantized: the quantised modules, kept as they were; None without any.

    Raises:
      CheckpointError: no checkpoint, or one whose tensors are not those of the config.
    """

    def __init__(self, path: Path, config: ModelConfig, checkpoints: Path, step: int | None = None) -> None:
        self.path, self.config = path, config
        self.table = Table(config)
        self.report = Report(path)
        self.quantized = HFDirectory(path / QUANTIZED, partial=True) if (path / QUANTIZED).is_dir() else None
        self._reader = LeafReader(checkpoints, ("params", "buffers"), step)
        expected = {
            item_name(leaf): leaf for leaf, entries in self.table.of_leaf.items() if not self.is_quantized(entries[0])
        }
        found = self._reader.arrays.keys() - {"buffers/seed"}
        for name in sorted(expected.keys() - found):
            self.report.add(f"{name} is missing.", "missing")
        for name in sorted(found - expected.keys()):
            self.report.add(f"{name} is no tensor of this model.", "surplus")
        for name in sorted(expected.keys() & found):
            shape, wanted = tuple(self._reader.arrays[name].shape), self.table.shapes[expected[name]]
            if shape != wanted:
                self.report.add(f"{name} has shape {list(shape)}, expected {list(wanted)}.", "shape")
        self.report.raise_if_any()

    def is_quantized(self, entry: Entry) -> bool:
        return self.quantized is not None and self.quantized.scheme(entry) is not None

    def dtype(self, entry: Entry) -> str:
        """Of the values that ``weights`` gives: the widest of the leaves."""
        dtypes = {self._dtype(leaf) for leaf in entry.leaves}
        return NAMES[dtypes.pop()] if len(dtypes) == 1 else "F32"

    def _dtype(self, leaf: str) -> np.dtype:
        return self._reader.arrays[item_name(leaf)].dtype.numpy_dtype

    def weights(self, whole: Mapping[str, bool]) -> Iterator[tuple[Entry, int, np.ndarray]]:
        """As of HFDirectory."""
        for entry in self.table.entries.values():
            if entry.name not in whole:
                continue
            if self.is_quantized(entry):
                assert self.quantized is not None
                yield from self.quantized.weights({entry.name: whole[entry.name]})
                continue
            if entry.expert:  # the other experts of a stack come with the first
                continue
            parts = self._stack(entry) if entry.expert == 0 else self._rows(entry, whole[entry.name])
            for part, first, rows in parts:
                yield part, first, self.report.check_finite(part.name, rows)

    def _stack(self, entry: Entry) -> Iterator[tuple[Entry, int, np.ndarray]]:
        leaf = entry.leaves[0]
        for first, block in self._reader.blocks(item_name(leaf), axis=0):
            for expert, matrix in enumerate(block, first):
                yield (part := self.table.of_leaf[leaf][expert]), 0, to_theirs(part, matrix)

    def _rows(self, entry: Entry, whole: bool) -> Iterator[tuple[Entry, int, np.ndarray]]:
        dtype = DTYPES[self.dtype(entry)]
        pieces = []
        before = 0
        for leaf, size in zip(entry.leaves, entry.rows, strict=True):
            for first, block in self._reader.blocks(item_name(leaf), axis=1 if entry.transposed else 0):
                rows = to_theirs(entry, block).astype(dtype, copy=False)
                if whole:
                    pieces.append(rows)
                else:
                    yield entry, before + first, rows
            before += size
        if whole:
            yield entry, 0, np.concatenate(pieces)
