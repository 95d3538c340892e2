"""Text on disk -> documents.

A source is a comma-separated list of paths, globs (``**`` descends) and the name ``stdlib``. What a file holds is
told by its name: ``.jsonl`` (a document a line), ``.parquet`` (a document a row), ``.bin``/``.idx`` (tokens already,
see megatron.py), anything else is text, one document a file. ``.gz`` and ``.zst`` after ``.jsonl`` or a text ending
are undone on the fly.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron_jax.errors import DataError, did_you_mean

STDLIB = "stdlib"
# Parts of the standard library that Linux distributions ship as packages of their own (or not at all): leaving them
# out gives much the same text, with about the same bits per byte, on every machine.
STDLIB_LEFT_OUT = {
    *("test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo"),
    *("lib2to3", "distutils", "ensurepip", "site-packages", "dist-packages", "__pycache__"),
}


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file that holds documents."""

    path: Path
    kind: str  # a key of READERS
    name: str  # for messages and cache keys: the path; of the standard library, without where Python is installed
    text_field: str = "text"  # of .jsonl and Parquet
    named: bool = False  # the user wrote this very path: an empty file is then a mistake


@dataclasses.dataclass
class Skipped:
    """Documents that were left out while reading, by reason."""

    not_utf8: int = 0
    empty: int = 0


def resolve(files: str, text_field: str = "text") -> tuple[list[TextFile], list[Path]]:
    """Comma-separated paths, globs and ``stdlib`` -> (text files, prefixes of Megatron .bin/.idx pairs), each once.

    Order: as the entries came; inside a glob, sorted by path. Raises DataError for an entry that matches nothing.
    """
    entries = [entry.strip() for entry in files.split(",") if entry.strip()]
    texts: dict[Path, TextFile] = {}
    prefixes: dict[Path, None] = {}
    for entry in entries:
        if entry == STDLIB:
            for file in _stdlib():
                texts.setdefault(file.path, file)
            continue
        for path, named in _expand(entry):
            if path.suffix in (".bin", ".idx") or not path.exists():
                prefixes[path.with_suffix("") if path.suffix in (".bin", ".idx") else path] = None
            else:
                texts.setdefault(path, TextFile(path, _kind(path), str(path), text_field, named))
    if not texts and not prefixes:
        raise DataError(f"expected at least one data file, a glob or {STDLIB!r}; the list is empty. Set data.files.")
    return list(texts.values()), list(prefixes)


def documents(files: Sequence[TextFile], skipped: Skipped) -> Iterator[tuple[str, str]]:
    """Yields (origin, text) for each document, in order; origin says file and line or row.

    Documents whose bytes are not UTF-8, and empty ones, are left out and counted in ``skipped``.

    Raises:
      DataError: a file that is empty, unreadable or damaged; a .jsonl line that is not a JSON object or a Parquet file
        without the text field, or with something else than text in it.
    """
    for file in files:
        try:
            if file.named and file.path.stat().st_size == 0:
                raise DataError(f"{file.name}: expected text, but the file is empty. Remove it from the list.")
            for origin, raw in READERS[file.kind](file):
                text = _as_text(raw)
                if text is None:
                    skipped.not_utf8 += 1
                elif not text:
                    skipped.empty += 1
                else:
                    yield origin, text
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{file.name}: cannot be read: {reason}.") from error


def _expand(entry: str) -> list[tuple[Path, bool]]:
    path = Path(entry).expanduser()
    if path.is_dir():
        raise DataError(f"{entry}: expected a file, but it is a directory. Name its files, e.g. {entry}/**/*.txt.")
    if path.exists() or path.with_name(path.name + ".idx").exists():
        return [(_absolute(path), True)]
    if not glob.has_magic(entry):
        raise DataError(f"{entry}: no such file.{_nearby(path)}")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    found = [name for name in found if name.is_file()]
    if not found:
        raise DataError(f"{entry}: the glob matches no file (looked in {Path.cwd()}).")
    return [(_absolute(name), False) for name in found]


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _nearby(path: Path) -> str:
    try:
        known = [other.name for other in path.parent.iterdir()]
    except OSError:
        return f" The directory {path.parent} does not exist or cannot be read."
    return did_you_mean(path.name, known)


def _kind(path: Path) -> str:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes = suffixes[:-1]
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(suffixes[-1] if suffixes else "", "text")


def _stdlib() -> list[TextFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_LEFT_OUT)
        for name in sorted(names):
            path = Path(folder, name)
            # _sysconfigdata holds the paths and flags of the machine that built Python.
            if path.suffix != ".py" or name.startswith("_sysconfigdata"):
                continue
            relative = path.relative_to(root).as_posix()
            kind = "topics" if relative == "pydoc_data/topics.py" else "text"
            files.append(TextFile(path, kind, f"{STDLIB}/{relative}"))
    return sorted(files, key=lambda file: file.name)


def _as_text(value: str | bytes) -> str | None:
    """Text, or None where it has no UTF-8 form (bytes that are not UTF-8; JSON's lone surrogates)."""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        value.encode("utf-8")
        return value
    except UnicodeError:
        return None


def _read_text(file: TextFile) -> Iterator[tuple[str, str | bytes]]:
    yield file.name, b"".join(_chunks(file)).removeprefix(b"\xef\xbb\xbf")


def _read_topics(file: TextFile) -> Iterator[tuple[str, str | bytes]]:
    """The help texts of pydoc, English prose, are values of a dict; as documents they lose their Python quoting."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"{file.name}:{name}", topics[name]


def _read_jsonl(file: TextFile) -> Iterator[tuple[str, str | bytes]]:
    for number, line in enumerate(_lines(file), start=1):
        origin = f"{file.name}, line {number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield origin, line
            continue
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{origin}: expected one JSON object a line, got {_shorten(line)} ({error}).") from None
        yield origin, _field(record, file.text_field, origin)


def _field(record: Any, text_field: str, origin: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{origin}: expected a JSON object, got {type(record).__name__}.")
    if text_field not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise DataError(
            f"{origin}: no field {text_field!r}; the fields are {fields}. Set data.text_field to the one that holds "
            f"the text.{did_you_mean(text_field, record)}"
        )
    if not isinstance(record[text_field], str):
        kind = type(record[text_field]).__name__
        raise DataError(f"{origin}: expected text in the field {text_field!r}, got {kind}.")
    return record[text_field]


def _read_parquet(file: TextFile) -> Iterator[tuple[str, str | bytes]]:
    import pyarrow
    from pyarrow import parquet

    text_types = (
        pyarrow.types.is_string,
        pyarrow.types.is_large_string,
        pyarrow.types.is_binary,
        pyarrow.types.is_large_binary,
    )
    text_field = file.text_field
    try:
        with parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise DataError(
                    f"{file.name}: no column {text_field!r}; the columns are {', '.join(map(repr, names))}. Set "
                    f"data.text_field to the one that holds the text.{did_you_mean(text_field, names)}"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                column = batch.column(0)
                if pyarrow.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                if not any(is_text(column.type) for is_text in text_types):
                    raise DataError(f"{file.name}: expected text in the column {text_field!r}, got {column.type}.")
                # As bytes: the text of a Parquet file need not be UTF-8.
                for value in column.cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    if value is None:
                        raise DataError(f"{file.name}, row {row}: expected text in {text_field!r}, got null.")
                    yield f"{file.name}, row {row}", value
    except pyarrow.ArrowException as error:
        raise DataError(f"{file.name}: expected a Parquet file; it cannot be read as one: {error}") from error


def _chunks(file: TextFile) -> Iterator[bytes]:
    """The bytes of a file, decompressed, in pieces of about a megabyte."""
    with open(file.path, "rb") as raw:
        if file.path.suffix == ".zst":
            yield from _unzstd(raw, file.name)
            return
        stream = gzip.GzipFile(fileobj=raw) if file.path.suffix == ".gz" else raw
        while chunk := stream.read(1 << 20):
            yield chunk


def _unzstd(raw: Any, name: str) -> Iterator[bytes]:
    # Not stream_reader: it takes a file that was cut off for a whole one.
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    within = False
    try:
        while chunk := raw.read(1 << 17):
            while chunk:
                yield frame.decompress(chunk)
                within, chunk = not frame.eof, frame.unused_data
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise DataError(f"{name}: expected zstandard data: {error}.") from error
    if within:
        raise DataError(f"{name}: the file ends inside a zstandard frame: it is truncated. Fetch it again.")


def _lines(file: TextFile) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in _chunks(file):
        head, *rest = chunk.split(b"\n")
        parts.append(head)
        for line in rest:
            yield b"".join(parts)
            parts = [line]
    yield b"".join(parts)


def _shorten(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


READERS = {"text": _read_text, "topics": _read_topics, "jsonl": _read_jsonl, "parquet": _read_parquet}
