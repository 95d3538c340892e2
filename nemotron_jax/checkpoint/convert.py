"""Between Hugging Face directories and training workdirs, streaming: a block of a tensor is in memory at a time.

    HF directory      -> training workdir    every tensor keeps its dtype; quantised modules are kept aside as they are
    training workdir  -> HF directory        every tensor keeps its dtype, or --format
    HF directory      -> HF directory        with --format

Everything is written into a folder beside the target, which takes the target's name at the end.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nemotron_jax.checkpoint import companions, modelopt
from nemotron_jax.checkpoint.hf import Table, item_name, kv_scale_name, scheme_of, tensors_of
from nemotron_jax.checkpoint.hf_directory import BLOCK_BYTES, QUANTIZED, HFDirectory
from nemotron_jax.checkpoint.layer_map import default_layer_map
from nemotron_jax.checkpoint.leaves import LeafWriter
from nemotron_jax.checkpoint.load import CHECKPOINTS, CONFIG_FILE, is_hf, run_config
from nemotron_jax.checkpoint.modelopt import fill_expert_scales
from nemotron_jax.checkpoint.safetensors import DTYPES, ShardWriter, Tensor
from nemotron_jax.checkpoint.workdir_source import WorkdirSource
from nemotron_jax.config import ModelConfig
from nemotron_jax.errors import CheckpointError, UserError
from nemotron_jax.precision.modelopt import kv_scale
from nemotron_jax.run_config import RunConfig, to_dict

FORMATS = ("bf16", "fp8", "nvfp4")
_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

Source = HFDirectory | WorkdirSource


@dataclass(frozen=True)
class Written:
    """What a conversion wrote: number of tensors, their bytes, and the seconds it took."""

    tensors: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """Largest absolute values seen while a model read some text, by module as on disk (``backbone.layers.3.mixer...``).

    Attributes:
      inputs: of every projection and expert; experts that no token reached are missing.
      outputs: of k_proj and v_proj.
    """

    inputs: Mapping[str, float]
    outputs: Mapping[str, float]


def convert(
    source: Path,
    target: Path,
    *,
    format: str | None = None,
    step: int | None = None,
    calibration: Calibration | None = None,
) -> Written:
    """Converts a model; see the top of the file for the directions.

    Args:
      source: a Hugging Face directory or a training workdir.
      target: does not exist yet, or is empty.
      format: "bf16", "fp8", "nvfp4"; None: every tensor keeps its dtype.
      step: which checkpoint of a workdir; None: the newest.
      calibration: what "fp8" and "nvfp4" take activation scales from.

    Raises:
      UserError: a format that needs a calibration, and none was given.
      CheckpointError: the source is damaged (everything that is wrong with it), or the target cannot be written.
    """
    start = time.perf_counter()
    check_target(target)
    opened = open_source(source, step)
    with staged(target) as folder:
        if isinstance(opened, HFDirectory) and format is None:
            written = _to_workdir(opened, folder)
        else:
            written = _to_hf(opened, folder, format, calibration)
        for part in (opened, _quantized(opened)):
            if part is not None:
                part.report.raise_if_any()
    return Written(*written, time.perf_counter() - start)


def open_source(path: Path, step: int | None = None) -> Source:
    """A directory of either kind, checked. Raises CheckpointError."""
    if is_hf(path):
        if step is not None:
            raise UserError(f"{path} is a Hugging Face directory and has no steps: leave --step away.")
        return HFDirectory(path)
    return WorkdirSource(path, run_config(path).model, path / CHECKPOINTS, step)


# To a training workdir


def _to_workdir(source: HFDirectory, folder: Path) -> tuple[int, int]:
    table = source.table
    kept = {path: entries for path, entries in table.of_leaf.items() if source.scheme(entries[0]) is None}
    leaves = {item_name(path): (table.shapes[path], source.leaf_dtype(path)) for path in kept}
    seed: dict[str, tuple[tuple[int, ...], np.dtype]] = {"buffers/seed": ((), np.dtype(np.uint32))}
    blocks = {item_name(path): _block(table, path, source.leaf_dtype(path)) for path in kept}
    nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in leaves.values())
    quantized = _stored_modules(source)
    _check_room(folder, nbytes + sum(tensor.nbytes for tensor in quantized))
    writer = LeafWriter(folder / CHECKPOINTS, leaves | seed, blocks)
    writer.write("buffers/seed", (), np.zeros((), np.uint32))
    for path in kept:
        shape, block = table.shapes[path], blocks[item_name(path)]
        axis = _axis(table, path)
        for first in range(0, shape[axis], block[axis]):
            start = [first if place == axis else 0 for place in range(len(shape))]
            index = [slice(low, low + size) for low, size in zip(start, block, strict=True)]
            writer.write(item_name(path), start, source.leaf(path, index))
    writer.finish()
    if quantized:
        _copy_quantized(source, folder / QUANTIZED, quantized)
    config = _without_quantization(source.config)
    companions.write_json(folder / CONFIG_FILE, to_dict(RunConfig(config)))
    companions.carry_to_workdir(source.path, folder)
    return len(leaves) + len(quantized), nbytes + sum(tensor.nbytes for tensor in quantized)


def _axis(table: Table, path: str) -> int:
    """The axis of a leaf along which its rows lie on disk."""
    entry = table.of_leaf[path][0]
    return 1 if entry.expert is None and entry.transposed else 0


def _block(table: Table, path: str, dtype: np.dtype) -> tuple[int, ...]:
    """Shape of the blocks in which a leaf is written, about BLOCK_BYTES each."""
    shape, axis = table.shapes[path], _axis(table, path)
    rest = math.prod(size for place, size in enumerate(shape) if place != axis) * dtype.itemsize
    size = min(shape[axis], max(1, BLOCK_BYTES // rest))
    return tuple(size if place == axis else other for place, other in enumerate(shape))


def _stored_modules(source: HFDirectory) -> list[Tensor]:
    """The tensors of all quantised modules and of the key/value cache, as they are."""
    plain = {name for name, entry in source.table.entries.items() if source.scheme(entry) is None}
    return [Tensor(name, stored.dtype, stored.shape) for name, stored in source.stored.items() if name not in plain]


def _copy_quantized(source: HFDirectory, folder: Path, tensors: list[Tensor]) -> None:
    """As they are, but for the activation scales of experts that were never routed to, which are filled in."""
    folder.mkdir()
    filled = _filled_scales(source)
    added = [Tensor(name, "F32", scale.shape) for name, scale in filled.items() if name not in source.stored]
    writer = ShardWriter(folder, [*tensors, *added])
    try:
        for tensor in [*tensors, *added]:
            if tensor.name in filled:
                writer.write(tensor.name, filled[tensor.name])
            else:
                _copy(source, tensor.name, writer)
        writer.finish()
    finally:
        writer.close()
    for name in (CONFIG_FILE, modelopt.HF_QUANT_CONFIG):
        if (source.path / name).exists():
            shutil.copyfile(source.path / name, folder / name)


def _filled_scales(source: HFDirectory) -> dict[str, np.ndarray]:
    """{name of an input_scale: value} of the experts that have none, or 0, while others of their layer have one."""
    groups: dict[str, dict[str, float | None]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in source.table.entries.values():
        scheme = source.scheme(entry)
        group = modelopt.experts_of(entry.module)
        if scheme is None or not scheme.has_input_scale or scheme.compressed or group is None:
            continue
        stored = source.stored.get(f"{entry.module}.input_scale")
        groups.setdefault(group, {})[entry.module] = None if stored is None else float(stored.rows().reshape(-1)[0])
        if stored is not None:
            shapes[group] = stored.shape
    filled = {}
    for group, scales in groups.items():
        if any(scales.values()) and not all(scales.values()):
            for module, value in fill_expert_scales(scales).items():
                if not scales[module]:
                    filled[f"{module}.input_scale"] = np.full(shapes[group], value, np.float32)
    return filled


def _copy(source: HFDirectory, name: str, writer: ShardWriter) -> None:
    """One tensor, as it is."""
    stored = source.stored[name]
    array = source.report.check_finite(name, stored.rows())
    writer.write(name, array)
    stored.release()


def _without_quantization(config: ModelConfig) -> ModelConfig:
    return replace(config, hf_extra=tuple(pair for pair in config.hf_extra if pair[0] != "quantization_config"))


# To a Hugging Face directory


@dataclass(frozen=True)
class _Plan:
    """What a Hugging Face directory will hold, and where each tensor of it comes from."""

    quant: modelopt.QuantConfig | None
    dtype: str | None  # of what is not quantised; None: as in the source
    tensors: list[Tensor] = field(default_factory=list)
    plain: dict[str, np.dtype] = field(default_factory=dict)  # entries that are written in this dtype
    schemes: dict[str, modelopt.Scheme] = field(default_factory=dict)  # entries that are quantised
    as_stored: list[str] = field(default_factory=list)  # tensors that are copied
    measured: list[str] = field(default_factory=list)  # modules whose key/value scales come from the calibration


def _plan(source: Source, format: str | None) -> _Plan:
    kept = _quantized(source)
    plan = _Plan(*_target(source.config, kept, format))
    for entry in source.table.entries.values():
        scheme, before = scheme_of(entry, plan.quant), kept.scheme(entry) if kept else None
        wanted = tensors_of(entry, plan.quant, plan.dtype or (source.dtype(entry) if before is None else "F32"))
        if scheme is None:
            plan.plain[entry.name] = DTYPES[wanted[0].dtype]
            ours = wanted[:1]
        elif scheme != before:
            plan.schemes[entry.name] = scheme
            ours = [tensor for tensor in wanted if tensor.name != kv_scale_name(entry.module)]
        else:
            ours = []
        rest = [tensor.name for tensor in wanted[len(ours) :]]
        if kept is not None and plan.quant is not None and plan.quant.kv_scales(entry.module):
            rest = list(dict.fromkeys([*rest, kv_scale_name(entry.module)]))  # also of MTP, where a file has them
        if rest and kept is None:  # scales of the key/value cache
            plan.measured.append(entry.module)
            plan.tensors.extend(wanted)
        else:
            found = [stored for name in rest if kept is not None for stored in kept.tensors(name)]
            plan.as_stored.extend(tensor.name for tensor in found)
            plan.tensors.extend(ours + found)
    return plan


def dry_run(config: ModelConfig, directory: Path | None, format: str | None) -> list[Tensor]:
    """The tensors that ``convert`` would write into a Hugging Face directory.

    Args:
      directory: that the config is from; without one, or without weights in it, all is BF16 or as ``format`` says.

    Raises:
      CheckpointError: everything that is wrong with the directory.
    """
    if directory and ((directory / CHECKPOINTS).is_dir() or any(directory.glob("*.safetensors"))):
        return _plan(open_source(directory), format).tensors
    quant = None if format in (None, "bf16") else default_layer_map(config, str(format))
    return [tensor for entry in Table(config).entries.values() for tensor in tensors_of(entry, quant, "BF16")]


def _quantized(source: Source) -> HFDirectory | None:
    """Where the quantised modules of a source are."""
    if isinstance(source, WorkdirSource):
        return source.quantized
    return source if source.quant is not None else None


def _to_hf(source: Source, folder: Path, format: str | None, calibration: Calibration | None) -> tuple[int, int]:
    plan = _plan(source, format)
    amax = _checked_calibration(plan, calibration, str(format))
    nbytes = sum(tensor.nbytes for tensor in plan.tensors)
    _check_room(folder, nbytes)
    writer = ShardWriter(folder, plan.tensors)
    try:
        for entry, first, rows in source.weights(dict.fromkeys(plan.plain, False) | dict.fromkeys(plan.schemes, True)):
            if entry.name in plan.plain:
                offset = first * math.prod(entry.shape[1:])
                writer.write(entry.name, rows.astype(plan.plain[entry.name], copy=False), offset)
            else:
                tensors = modelopt.quantize(plan.schemes[entry.name], rows, amax.inputs.get(entry.module))
                for suffix, array in tensors.items():
                    writer.write(f"{entry.module}.{suffix}", array)
        kept = _quantized(source)
        for name in plan.as_stored:
            assert kept is not None
            _copy(kept, name, writer)
        for module in plan.measured:
            writer.write(kv_scale_name(module), kv_scale(amax.outputs[module]))
        writer.finish()
    finally:
        writer.close()
    _write_configs(source, folder, plan)
    return len(plan.tensors), nbytes


def _target(
    config: ModelConfig, kept: HFDirectory | None, format: str | None
) -> tuple[modelopt.QuantConfig | None, str | None]:
    """(how the target is quantised, dtype of the rest; None: as in the source)."""
    quant = kept.quant if kept else None
    if format is None:
        return quant, None
    if format == "bf16":
        return None, "BF16"
    if quant is not None and (quant.algo == modelopt.FP8) == (format == "fp8"):
        return quant, None  # it has this format already
    return default_layer_map(config, format), "BF16"


def _checked_calibration(plan: _Plan, calibration: Calibration | None, format: str) -> Calibration:
    """The activation ranges that a plan needs; those of experts that no token reached are filled in."""
    modules = [name.removesuffix(".weight") for name, scheme in plan.schemes.items() if scheme.has_input_scale]
    if calibration is None:
        if modules or plan.measured:
            raise UserError(
                f"--format={format} stores the range of each layer's inputs, which is measured on text: give "
                "--calibration=FILE[,FILE...]."
            )
        return Calibration({}, {})
    inputs = fill_expert_scales({module: calibration.inputs.get(module) for module in modules})
    return Calibration(inputs, calibration.outputs)


def _write_configs(source: Source, folder: Path, plan: _Plan) -> None:
    original = source.path / (CONFIG_FILE if isinstance(source, HFDirectory) else companions.HF_CONFIG)
    values = companions.hf_values(source.config, original)
    kept = _quantized(source)
    if plan.quant is None or plan.dtype is not None:
        values.pop("quantization_config", None)
        key = "torch_dtype" if "torch_dtype" in values else "dtype"
        values[key] = _TORCH[plan.dtype or source.dtype(source.table.entries["backbone.embeddings.weight"])]
    if plan.quant is not None and plan.dtype is not None:
        files = plan.quant.to_json()
        values["quantization_config"] = files["quantization_config"]
        companions.write_json(folder / modelopt.HF_QUANT_CONFIG, files[modelopt.HF_QUANT_CONFIG])
    elif plan.quant is not None and kept is not None and (kept.path / modelopt.HF_QUANT_CONFIG).exists():
        shutil.copyfile(kept.path / modelopt.HF_QUANT_CONFIG, folder / modelopt.HF_QUANT_CONFIG)
    companions.write_json(folder / CONFIG_FILE, values)
    companions.carry(source.path, folder)
    if not (folder / companions.GENERATION_CONFIG).exists():
        companions.write_json(folder / companions.GENERATION_CONFIG, companions.generation_config(source.config))


# Files


def check_target(target: Path) -> None:
    """Raises CheckpointError unless the target can be made."""
    if os.path.islink(target):  # a folder cannot take its place
        raise CheckpointError(f"{target} is a symbolic link: name a directory that does not exist yet.")
    if os.path.exists(target) and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty: name a directory that does not exist yet.")
    if not target.absolute().parent.is_dir() or not os.access(target.absolute().parent, os.W_OK):
        raise CheckpointError(f"{target} cannot be made: {target.absolute().parent} does not exist or is read-only.")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name when the block ends well, and else is removed.

    Raises:
      CheckpointError: the disk is full, or refuses to be written to.
    """
    target = target.absolute()
    folder = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        folder.mkdir()
        yield folder
        _synchronise(folder)
        if target.exists():
            target.rmdir()  # empty; fails where something has come in meanwhile
        folder.rename(target)
    except (OSError, ValueError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full and not isinstance(error, OSError):
            raise
        hint = "the disk is full: make room" if full else f"{str(error).splitlines()[0]}"
        raise CheckpointError(f"writing {target} failed, and nothing was left of it: {hint}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _synchronise(folder: Path) -> None:
    """All files are on the disk before the folder has its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:,.3f} GB free, {nbytes / 1e9:,.3f} GB are needed: make room, or choose "
            "another disk."
        )
