"""Megatron's token files: PREFIX.bin holds the tokens of all documents end to end, PREFIX.idx says where each is.

PREFIX.idx, little endian (Megatron-LM, megatron/core/datasets/indexed_dataset.py):
  9 bytes "MMIDIDX\\0\\0" | u64 version = 1 | u8 code of the tokens' dtype | u64 sequences S | u64 entries D
  int32 [S] tokens in each sequence | int64 [S] where each starts in .bin, bytes
  int64 [D] documents: document i is made of the sequences from entry i up to entry i + 1 (D = documents + 1)
  (int8 [S] modes, in multimodal files only)
"""

from __future__ import annotations

import array
import dataclasses
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np

from nemotron_jax.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # 6, 7: floats, never tokens
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Documents as tokens. Document i is ``tokens[offsets[i]:offsets[i + 1]]``.

    tokens: integers [total], in memory or memory-mapped. offsets: int64 [documents + 1], from 0 to the total.
    """

    name: str  # for messages
    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1


def smallest_dtype(vocab_size: int) -> np.dtype:
    """What Megatron stores ids below ``vocab_size`` in."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def prefix_of(path: str | os.PathLike[str]) -> Path:
    """PREFIX, PREFIX.bin or PREFIX.idx -> PREFIX."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def read(path: str | os.PathLike[str]) -> TokenStore:
    """Opens a pair of files; the tokens stay on disk (memory-mapped).

    Raises:
      DataError: a file is missing, is not of this format, or is shorter or longer than the index says.
    """
    prefix = prefix_of(path)
    bin_path, idx_path = _with_suffix(prefix, ".bin"), _with_suffix(prefix, ".idx")
    for file, other in ((idx_path, bin_path), (bin_path, idx_path)):
        if not file.is_file():
            raise DataError(f"{file}: no such file; {other.name} needs it beside itself.")
    try:
        dtype, offsets = _read_index(idx_path)
        expected = int(offsets[-1]) * dtype.itemsize
        _check_size(bin_path, bin_path.stat().st_size, expected, f"{idx_path.name} lists {offsets[-1]} {dtype} tokens")
        tokens = np.memmap(bin_path, dtype, mode="r") if expected else np.zeros(0, dtype)
    except OSError as error:
        raise DataError(f"{prefix}.bin/.idx cannot be read: {error.strerror or error}.") from error
    return TokenStore(str(prefix), tokens, offsets)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """-> (dtype of the tokens, int64 [documents + 1] offsets in tokens)."""
    size = path.stat().st_size
    if size < HEADER.size:
        raise DataError(f"{path}: expected an index of at least {HEADER.size} bytes, found {size}: it is truncated.")
    with open(path, "rb") as stream:
        magic, version, code, sequences, entries = HEADER.unpack(stream.read(HEADER.size))
        if magic != MAGIC or version != VERSION:
            raise DataError(f"{path}: expected a Megatron index (MMIDIDX, version {VERSION}), got {magic!r} {version}.")
        if code not in DTYPES:
            known = ", ".join(f"{key} = {np.dtype(value)}" for key, value in DTYPES.items())
            raise DataError(f"{path}: expected the dtype code of tokens ({known}), got {code}: the index is damaged.")
        expected = HEADER.size + 12 * sequences + 8 * entries
        if size != expected + sequences:  # not a multimodal file: those end with a byte a sequence
            _check_size(path, size, expected, f"its header names {sequences} sequences and {entries} document entries")
        lengths = np.fromfile(stream, "<i4", sequences)
        pointers = np.fromfile(stream, "<i8", sequences)
        borders = np.fromfile(stream, "<i8", entries)
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    starts = np.zeros(sequences + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    if (lengths < 0).any() or (pointers != starts[:-1] * dtype.itemsize).any():
        raise DataError(f"{path}: expected sequences that lie end to end; the lengths and positions disagree: damaged.")
    if not entries or borders[0] != 0 or borders[-1] != sequences or (np.diff(borders) < 0).any():
        raise DataError(f"{path}: expected documents that cover sequences 0 to {sequences} in order: it is damaged.")
    return dtype, starts[borders]


def _check_size(path: Path, found: int, expected: int, why: str) -> None:
    if found != expected:
        state = "truncated" if found < expected else "damaged, or belongs to another file"
        raise DataError(f"{path}: expected {expected} bytes ({why}), found {found}: it is {state}. Fetch it again.")


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


class Writer:
    """Writes PREFIX.bin and PREFIX.idx, one document after the other.

    A context manager: the files appear under their names when the block ends without an exception, and not before.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: np.dtype | type[np.generic] = np.int32):
        self._prefix = prefix_of(path)
        self._dtype = np.dtype(dtype)
        if self._dtype not in CODES:
            raise DataError(f"expected an integer dtype that the format knows, got {self._dtype}.")
        self._lengths = array.array("i")
        self._partial = {
            suffix: _with_suffix(self._prefix, f"{suffix}.{os.getpid()}.partial") for suffix in (".bin", ".idx")
        }

    def __enter__(self) -> Writer:
        self._stream = open(self._partial[".bin"], "wb")
        return self

    def add(self, tokens: np.ndarray | Iterable[int]) -> None:
        """Appends one document, integers [tokens]; DataError where the dtype cannot hold one of them."""
        tokens = np.asarray(tokens)
        limits = np.iinfo(self._dtype)
        for token in (tokens.min(), tokens.max()) if tokens.size else ():
            if not limits.min <= token <= limits.max:
                raise DataError(f"expected tokens from {limits.min} to {limits.max} ({self._dtype}), got {token}.")
        self._stream.write(tokens.astype(self._dtype.newbyteorder("<")).tobytes())
        self._lengths.append(tokens.size)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._stream.close()
            if kind is None:
                self._write_index()
                for suffix, partial in self._partial.items():
                    partial.replace(_with_suffix(self._prefix, suffix))
        finally:
            for partial in self._partial.values():
                partial.unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.asarray(self._lengths, "<i4")
        starts = np.zeros(len(lengths), "<i8")
        if len(lengths):
            np.cumsum(lengths[:-1], out=starts[1:])
        with open(self._partial[".idx"], "wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, CODES[self._dtype], len(lengths), len(lengths) + 1))
            stream.write(lengths.tobytes())
            stream.write((starts * self._dtype.itemsize).tobytes())
            stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
