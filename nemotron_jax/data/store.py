"""Text becomes tokens once: a cache of Megatron files (and of the tokenizer trained on them).

The cache holds ``tokens-KEY/`` (data.bin, data.idx, about.json) and ``tokenizer-KEY.json``. KEY is a hash of all that
the content depends on, so a changed file or tokenizer gives another entry and nothing is ever invalidated. An entry
appears under its name only when it is whole. Processes of one host that want the same entry wait for the first one
(file lock, let go by the system when that one is killed).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nemotron_jax.data import megatron
from nemotron_jax.data.megatron import TokenStore
from nemotron_jax.data.sources import Skipped, TextFile, documents
from nemotron_jax.data.tokenizer import Tokenizer, train_bpe
from nemotron_jax.errors import DataError

FORMAT = 1  # part of every KEY: raise it when the same text would be stored differently
CHUNK_DOCUMENTS = 256  # handed to the tokenizer at once: enough for its threads,
CHUNK_CHARACTERS = 4_000_000  # and little enough to hold in memory
BPE_CHARACTERS = 100_000_000  # a vocabulary is learned from at most this much text


@dataclasses.dataclass(frozen=True)
class About:
    """What is known of a store: what was read, and what was left out."""

    documents: int
    tokens: int
    text_bytes: int | None  # UTF-8; None for tokens whose text was never seen (.bin/.idx)
    not_utf8: int = 0  # documents left out
    empty: int = 0


def tokenize(files: Sequence[TextFile], tokenizer: Tokenizer, skipped: Skipped) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (int32 tokens, UTF-8 bytes) for each document: ``<s>``, its tokens, ``</s>``.

    The opening token is there so that the first token of a text is predicted too, and the closing one so that its end
    is: without them a document's likelihood, and so bits per byte, would leave a token out.
    """
    chunk: list[str] = []
    characters = 0
    for _, text in documents(files, skipped):
        chunk.append(text)
        characters += len(text)
        if len(chunk) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield from _encode(chunk, tokenizer)
            chunk, characters = [], 0
    yield from _encode(chunk, tokenizer)


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    opening, closing = (np.array([token], np.int32) for token in (tokenizer.bos_id, tokenizer.eos_id))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        yield np.concatenate((opening, ids, closing)), len(text.encode())


def in_memory(files: Sequence[TextFile], tokenizer: Tokenizer) -> tuple[TokenStore, About]:
    """Tokens of text that is read once and not worth a cache entry (evaluation). DataError when nothing is left."""
    skipped = Skipped()
    pairs = list(tokenize(files, tokenizer, skipped))
    if not pairs:
        raise _nothing_left(files, skipped)
    tokens = np.concatenate([ids for ids, _ in pairs])
    offsets = np.cumsum([0, *(len(ids) for ids, _ in pairs)], dtype=np.int64)
    about = About(
        documents=len(pairs),
        tokens=len(tokens),
        text_bytes=sum(size for _, size in pairs),
        **dataclasses.asdict(skipped),
    )
    return TokenStore(_shown(files), tokens, offsets), about


def cached_tokens(
    files: Sequence[TextFile], tokenizer: Tokenizer, cache_dir: str | os.PathLike[str]
) -> tuple[TokenStore, About]:
    """The tokens of text files, from the cache, made first where needed.

    Raises:
      DataError: bad text (see sources.documents), nothing left of it, or a cache directory that cannot be written.
    """
    entry = Path(cache_dir) / f"tokens-{_key('tokens', files, tokenizer.fingerprint)}"

    def make(partial: Path) -> None:
        partial.mkdir()
        skipped = Skipped()
        tokens = text_bytes = 0
        with megatron.Writer(partial / "data", megatron.smallest_dtype(tokenizer.vocab_size)) as writer:
            count = 0
            for ids, size in tokenize(files, tokenizer, skipped):
                writer.add(ids)
                count += 1
                tokens += len(ids)
                text_bytes += size
        if not count:
            raise _nothing_left(files, skipped)
        about = About(count, tokens, text_bytes, **dataclasses.asdict(skipped))
        (partial / "about.json").write_text(json.dumps(dataclasses.asdict(about)), encoding="utf-8")

    _make_once(entry, make)
    about = About(**json.loads((entry / "about.json").read_text(encoding="utf-8")))
    return dataclasses.replace(megatron.read(entry / "data"), name=_shown(files)), about


def cached_bpe(files: Sequence[TextFile], vocab_size: int, cache_dir: str | os.PathLike[str]) -> Tokenizer:
    """A BPE trained on (the first BPE_CHARACTERS of) the text, from the cache, made first where needed.

    It sees the documents that are later held out: 8,000 merges cannot memorise them.
    """
    entry = Path(cache_dir) / f"tokenizer-{_key('bpe', files, str(vocab_size))}.json"

    def texts() -> Iterator[str]:
        characters = 0
        for _, text in documents(files, Skipped()):
            yield text
            characters += len(text)
            if characters >= BPE_CHARACTERS:
                return

    _make_once(entry, lambda partial: train_bpe(texts(), vocab_size).save(partial))
    return Tokenizer.load(entry)


def _key(*parts: str | Sequence[TextFile]) -> str:
    digest = hashlib.sha256(f"format {FORMAT}".encode())
    for part in parts:
        lines = [part] if isinstance(part, str) else map(_identity, part)
        digest.update(json.dumps(list(lines)).encode())
    return digest.hexdigest()[:20]


def _identity(file: TextFile) -> list[str | int]:
    """Path, size and modification time; for the standard library its content, which is alike on many hosts."""
    if not file.name.startswith("stdlib/"):
        status = file.path.stat()
        return [file.name, file.text_field, status.st_size, status.st_mtime_ns]
    return [file.name, hashlib.sha256(file.path.read_bytes()).hexdigest()]


def _make_once(entry: Path, make: Callable[[Path], None]) -> None:
    if entry.exists():
        return
    partial = entry.with_name(f"{entry.name}.partial")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_name(".lock")):  # of the whole cache: tokenising takes all cores anyway
            if entry.exists():  # another process made it while this one waited for the lock
                return
            _remove(partial)  # left by a process that was killed
            try:
                make(partial)
                partial.rename(entry)
            finally:
                _remove(partial)
    except OSError as error:
        raise DataError(
            f"{entry.parent}: the tokens of the training text cannot be written there: {error.strerror or error}. "
            "Free some space, or name a directory that can be written."
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _shown(files: Sequence[TextFile]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"


def _nothing_left(files: Sequence[TextFile], skipped: Skipped) -> DataError:
    return DataError(
        f"{_shown(files)}: expected at least one document, found none ({skipped.not_utf8} were not UTF-8, "
        f"{skipped.empty} were empty)."
    )
