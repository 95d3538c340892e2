"""The safetensors format: files are mapped into memory and validated in full, and written tensor by tensor.

    8 bytes  N, little endian
    N bytes  JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}, spaces behind
    data     back to back; offsets count from here, and cover all of it

Source: the format's specification (huggingface/safetensors, README.md). A model of more than one file has
``model.safetensors.index.json`` = {"metadata": {"total_size"}, "weight_map": {name: file}} beside them.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nemotron_jax.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
MAX_AXES = 32  # of a tensor; numpy could not do with more than twice as many
MAX_SHARD = 5_000_000_000  # bytes of tensors in a file; transformers' default


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: ``begin`` and ``end`` are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsFile:
    """A file for reading. Arrays are views of the mapped file; ``release`` gives their memory back.

    Attributes:
      tensors: {name: Tensor}, in the order of the data.
      metadata: what the header holds of ``__metadata__``.

    Raises:
      CheckpointError: with every fault of the header on a line of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.tensors, self.metadata = _header(path, file.read(8), file.read, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read: {error.strerror}.") from error

    def array(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows [first, last) of a tensor along its first axis (a scalar as it is), read-only, not copied."""
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype]
        whole = np.frombuffer(self._map, dtype, math.prod(tensor.shape), tensor.begin).reshape(tensor.shape)
        return whole[first:last] if tensor.shape else whole

    def release(self, name: str) -> None:
        """Lets the system forget the pages of a tensor, which else count as this process's memory."""
        tensor = self.tensors[name]
        begin = tensor.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if tensor.end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, tensor.end - begin)


def _header(path: Path, prefix: bytes, read: Any, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    if len(prefix) < 8:
        raise CheckpointError(f"{path.name} is truncated: {size} bytes, no safetensors header.")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER or 8 + length > size:
        raise CheckpointError(
            f"{path.name} is truncated, or no safetensors file: its header should have {length} bytes, the file has "
            f"{size}."
        )
    repeated: list[str] = []

    try:
        text = read(length).decode()
        values = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, repeated))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} has a corrupt header: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path.name} has a corrupt header: a JSON object was expected.")
    metadata = values.pop("__metadata__", None) or {}
    faults = [f"{path.name} names {name} twice in its header." for name in repeated]
    tensors = []
    for name, value in values.items():
        try:
            tensors.append(_tensor(name, value, 8 + length))
        except ValueError as error:
            faults.append(f"{path.name}: {name} {error}.")
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    if not faults:
        faults = [f"{path.name}: {fault}." for fault in _gaps(tensors, 8 + length, size)]
    if faults:
        raise CheckpointError("\n".join(faults))
    return {tensor.name: tensor for tensor in tensors}, metadata


def _unique(pairs: list[tuple[str, Any]], repeated: list[str]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                repeated.append(name)
            seen.add(name)
    return values


def _tensor(name: str, value: Any, data: int) -> Tensor:
    """One entry of a header; ValueError says what is wrong with it."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"has the unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"has shape {shape!r} and data_offsets {offsets!r}: lists of whole numbers were expected")
    if len(shape) > MAX_AXES:
        raise ValueError(f"has {len(shape)} axes, at most {MAX_AXES} can be read")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has data_offsets {offsets!r}: [begin, end] were expected")
    tensor = Tensor(name, dtype, tuple(shape), data + offsets[0], data + offsets[1])
    if tensor.nbytes != tensor.end - tensor.begin:
        raise ValueError(
            f"has {tensor.end - tensor.begin} bytes of data, but {dtype} {list(shape)} takes {tensor.nbytes}"
        )
    return tensor


def _gaps(tensors: Sequence[Tensor], data: int, size: int) -> list[str]:
    """What is wrong with the places of tensors, sorted, that should fill the bytes from ``data`` to ``size``."""
    faults, position, last = [], data, "the header"
    for tensor in tensors:
        if tensor.begin != position:
            how = "overlaps with" if tensor.begin < position else "leaves a gap behind"
            faults.append(f"{tensor.name} {how} {last}")
        position, last = max(position, tensor.end), tensor.name
    if position > size:
        faults.append(f"the file is truncated: {size} bytes, its tensors end at {position}")
    elif position < size:
        faults.append(f"{size - position} bytes behind {last} belong to no tensor")
    return faults


class ShardWriter:
    """Writes the files of a model, whose tensors are all known before the first of them is written.

    The parts of a tensor may come in any order. ``finish`` makes sure that all came, and writes the index.
    """

    def __init__(self, directory: Path, tensors: Iterable[Tensor], *, max_shard: int = MAX_SHARD) -> None:
        self._directory = directory
        self._files: list[Any] = []
        self._placed: dict[str, tuple[int, Tensor]] = {}
        self._left: dict[str, int] = {}  # bytes that have not come
        self._weight_map: dict[str, str] = {}
        shards = _shards(tensors, max_shard)
        try:
            for number, shard in enumerate(shards):
                name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE_FILE
                self._open(name, shard)
        except OSError:
            self.close()
            raise

    def _open(self, name: str, tensors: list[Tensor]) -> None:
        # Wide types first: every tensor then begins at a multiple of its element size, as torch wants it.
        header, placed = _placed(sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize))
        self._files.append(open(self._directory / name, "wb", buffering=0))  # noqa: SIM115 closed by close()
        _write_at(self._files[-1], 0, memoryview(header))
        for tensor in placed:
            self._placed[tensor.name] = (len(self._files) - 1, tensor)
            self._left[tensor.name] = tensor.nbytes
            self._weight_map[tensor.name] = name

    def write(self, name: str, array: np.ndarray, offset: int = 0) -> None:
        """The elements of a tensor from ``offset`` on (counted in elements), in its dtype. Raises OSError."""
        number, tensor = self._placed[name]
        assert NAMES[array.dtype] == tensor.dtype, (name, array.dtype, tensor.dtype)
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        position = tensor.begin + offset * array.dtype.itemsize
        assert position + len(data) <= tensor.end, name
        self._left[name] -= len(data)
        _write_at(self._files[number], position, data)

    def finish(self) -> None:
        """Closes the files and writes the index."""
        missing = [name for name, left in self._left.items() if left]
        assert not missing, f"not all of {missing[:3]} was written"
        self.close()
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for _, tensor in self._placed.values())},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        (self._directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        for file in self._files:
            file.close()


def _write_at(file: Any, position: int, data: memoryview) -> None:
    while data:  # a nearly full disk takes a part first, and fails with the next
        written = os.pwrite(file.fileno(), data, position)
        data, position = data[written:], position + written


def _shards(tensors: Iterable[Tensor], max_shard: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _placed(tensors: Sequence[Tensor]) -> tuple[bytes, list[Tensor]]:
    """(header, tensors with their places in the file)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    placed = [
        Tensor(
            tensor.name,
            tensor.dtype,
            tensor.shape,
            data + entries[tensor.name]["data_offsets"][0],
            data + entries[tensor.name]["data_offsets"][1],
        )
        for tensor in tensors
    ]
    return len(text).to_bytes(8, "little") + text, placed
