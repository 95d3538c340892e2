"""From the config group ``data`` to the batches of this process.

Each data set of the blend (without a blend there is one) becomes an endless stream of packed rows: Grain shuffles the
rows of each epoch anew and mixes the streams by weight. Global batch b is made of rows b·B to (b+1)·B of the mixture,
and a process takes one of equal parts of it, its share. All of this is random access, so the position in the data is
one number, the next batch's, and means the same for any number of processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemotron_jax.data import blend, megatron, store
from nemotron_jax.data.batch import Batch, stack
from nemotron_jax.data.megatron import TokenStore
from nemotron_jax.data.packing import Corpus, PackedRows, split, too_large
from nemotron_jax.data.sources import TextFile, resolve
from nemotron_jax.data.store import About
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.errors import ConfigError, DataError
from nemotron_jax.run_config import DataConfig

if TYPE_CHECKING:
    import grain

DEFAULT_TOKENIZER = "bpe:8192"
PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4
_LOOK_AT = 1 << 20  # tokens of a .bin that are checked before training; the rest are when a row holds them


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a run trains on, over all data sets."""

    documents: int
    tokens: int
    text_bytes: int | None  # UTF-8; None where some of the data came as tokens
    not_utf8: int  # documents left out
    empty: int
    train_tokens: int
    validation_documents: int
    validation_tokens: int

    def summary(self) -> str:
        """One line for the start of a run."""
        size = ""
        if self.text_bytes is not None:
            size = f" ({self.text_bytes / 1e6:.1f} MB of text, {self.text_bytes / self.tokens:.2f} bytes a token)"
        left_out = f"; left out: {self.not_utf8} not UTF-8" if self.not_utf8 else ""
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens{size}, "
            f"{self.validation_documents:,} documents held out{left_out}"
        )


def load_tokenizer(config: DataConfig, cache_dir: str | os.PathLike[str], *, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that ``data.tokenizer`` names: a tokenizer.json, its directory, or ``bpe:N`` (also for "").

    ``bpe:N`` is trained on the text of the run and cached. None where there is nothing to train it on, because all
    data are tokens already (.bin/.idx).

    Args:
      vocab_size: the model's.

    Raises:
      DataError: no such tokenizer, bad text, or a tokenizer larger than the model's vocabulary.
    """
    spec = config.tokenizer or DEFAULT_TOKENIZER
    if not spec.startswith("bpe:"):
        tokenizer = Tokenizer.load(spec)
        _check_vocabulary(spec, tokenizer.vocab_size, vocab_size)
        return tokenizer
    size = spec.removeprefix("bpe:")
    if not size.isascii() or not size.isdigit():
        raise DataError(f"data.tokenizer: expected bpe:N with a number of tokens, e.g. bpe:8192, got {spec!r}.")
    _check_vocabulary(spec, int(size), vocab_size)
    texts: list[TextFile] = []
    tokens: list[Path] = []
    for part in _parts(config):
        part_texts, part_tokens = resolve(part.path, part.text_field)
        texts += part_texts
        tokens += part_tokens
    if texts and tokens:
        raise DataError(
            f"{tokens[0]}: expected data.tokenizer to name the tokenizer that these tokens were made with, since there "
            f"is text to be tokenised beside them; got {spec!r}, which would train another one."
        )
    return store.cached_bpe(texts, int(size), cache_dir) if texts else None


def build(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    global_batch_size: int,
    vocab_size: int,
    seed: int,
    cache_dir: str | os.PathLike[str],
    share: tuple[int, int] = (0, 1),
) -> TrainData:
    """Reads, tokenises (once, into ``cache_dir``) and splits the data of a run.

    Args:
      tokenizer: of load_tokenizer; None will do where all data are .bin/.idx.
      global_batch_size: rows a step, over all processes.
      vocab_size: the model's.
      share: (i, n): this process gets the i-th of n equal parts of each batch.

    Raises:
      ConfigError: ``global_batch_size`` is no multiple of n.
      DataError: see sources.documents, megatron.read, blend.read, packing.split and packing.PackedRows; or a token id
        or a tokenizer larger than the model's vocabulary.
    """
    if global_batch_size % share[1]:
        raise ConfigError(
            f"train.global_batch_size ({global_batch_size}) must be a multiple of the number of processes that share "
            f"its rows ({share[1]})."
        )

    def tokenised(texts: list[TextFile], tokenizer: Tokenizer) -> tuple[TokenStore, About]:
        return store.cached_tokens(texts, tokenizer, cache_dir)

    sets = []
    for part in _parts(config):
        corpus, abouts = _read(part.path, part.text_field, tokenizer, vocab_size, tokenised)
        sets.append(_Set(part.weight, corpus, abouts))
    return TrainData(
        config,
        sets,
        local_batch=_LocalBatch(global_batch_size, *share),
        vocab_size=vocab_size,
        seed=seed % 2**32,
    )


def evaluation_batches(
    files: str, tokenizer: Tokenizer | None, *, seq_len: int, batch_size: int, vocab_size: int, text_field: str = "text"
) -> tuple[Iterator[Batch], list[About]]:
    """Every token of some files, in order, in rows of ``seq_len``; the last rows are filled up with padding.

    ``files`` as in data.files. Each token is a target once, except the first of each document. Nothing is cached.
    Raises DataError like build().
    """
    corpus, abouts = _read(files, text_field, tokenizer, vocab_size, store.in_memory)
    (filled,) = np.nonzero(corpus.lengths())
    rows = PackedRows(corpus, filled, seq_len, vocab_size, pad=True)
    whole = _LocalBatch(batch_size, 0, 1)

    def row(index: int) -> Batch:
        return rows.row(0, index) if index < len(rows) else rows.padding()

    return (whole(row, number) for number in range(-(-len(rows) // batch_size))), abouts


class TrainData:
    """The data of a run, as this process sees them. Made by build().

    Attributes:
      statistics: what was read.
      fingerprint: hex digest of everything that the order of the tokens depends on.
    """

    def __init__(self, config: DataConfig, sets: list[_Set], local_batch: _LocalBatch, vocab_size: int, seed: int):
        import grain

        self._config = config
        self._local_batch = local_batch
        train, held_out = [], []
        digest = hashlib.sha256(f"{config.seq_len},{local_batch.global_size},{seed}".encode())
        for number, data in enumerate(sets):
            lengths = data.corpus.lengths()
            kept, held = split(lengths, config.validation_fraction, seed, data.corpus.name)
            train.append(PackedRows(data.corpus, kept, config.seq_len, vocab_size, seed=seed))
            if len(held):
                held_out.append(PackedRows(data.corpus, held, config.seq_len, vocab_size, seed=seed, pad=True))
            digest.update(f"{number},{data.weight},{len(kept)}".encode())
            digest.update(lengths.tobytes())
            for tokens in data.corpus.stores:
                digest.update(tokens.tokens[:: max(1, len(tokens.tokens) // 1024)].astype(np.int64).tobytes())
        self.fingerprint = digest.hexdigest()
        self._held_out = held_out
        weights = [data.weight for data in sets]
        self._rows = _mix([_endless(rows, _derived(seed, number)) for number, rows in enumerate(train)], weights)
        self._validation_rows = _mix(
            [grain.MapDataset.range(len(rows)).map(_FirstEpoch(rows)) for rows in held_out], weights
        )
        self.statistics = _statistics([about for data in sets for about in data.abouts], train, held_out)

    def train_iterator(self) -> TrainIterator:
        """This process's part of global batches 0, 1, 2, ... without end, prefetched by threads."""
        import grain

        batches = grain.MapDataset.range(sys.maxsize // self._local_batch.global_size - 1)
        batches = batches.map(lambda number: self._local_batch(self._rows.__getitem__, number))
        options = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
        return TrainIterator(iter(batches.to_iter_dataset(options)), self.fingerprint)

    def validation_batches(self, count: int | None = None) -> list[Batch]:
        """This process's part of the first ``count`` (data.validation_batches) batches of held-out rows.

        The same rows whenever it is called, none twice, in the proportions of the blend. Fewer batches where the
        held-out documents do not fill them; the last one is then filled up with rows of padding (segment 0, weight 0).
        Empty where nothing is held out.
        """
        if self._validation_rows is None:
            return []
        count = self._config.validation_batches if count is None else count
        rows = len(self._validation_rows)
        batches = min(count, -(-rows // self._local_batch.global_size))

        def row(index: int) -> Batch:
            return self._validation_rows[index] if index < rows else self._held_out[0].padding()

        return [self._local_batch(row, number) for number in range(batches)]


class TrainIterator:
    """Batches of [local batch, T] NumPy arrays; its state is one number and the fingerprint of the data."""

    def __init__(self, batches: grain.DatasetIterator, fingerprint: str):
        self._batches = batches
        self._fingerprint = fingerprint

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """What set_state takes back; JSON can hold it. Batches that are only prefetched do not count."""
        return {"next_batch": self._batches.get_state()["next_index"], "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where get_state was called. Raises DataError where the data are not the same any more."""
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                "the data are not those that the checkpoint was trained on: a file, the tokenizer, the blend, the "
                "seed, the sequence length or the batch size has changed, so training cannot go on where it stopped. "
                "Put the old ones back, or start in a new working directory with checkpoint.init_from."
            )
        self._batches.set_state({"next_index": int(state["next_batch"])})

    def close(self) -> None:
        """Stops the prefetching threads."""
        self._batches.close()


@dataclasses.dataclass(frozen=True)
class _Set:
    weight: float
    corpus: Corpus
    abouts: list[About]


@dataclasses.dataclass(frozen=True)
class _LocalBatch:
    """The contiguous part of each global batch that belongs to this process."""

    global_size: int
    share: int
    shares: int

    def __call__(self, row: Callable[[int], Batch], number: int) -> Batch:
        size = self.global_size // self.shares
        first = number * self.global_size + self.share * size
        return stack([row(index) for index in range(first, first + size)])


@dataclasses.dataclass(frozen=True)
class _FirstEpoch:
    rows: PackedRows

    def __call__(self, index: int) -> Batch:
        return self.rows.row(0, index)


def _endless(rows: PackedRows, seed: int) -> grain.MapDataset:
    """All rows of epoch 0 in a random order, then those of epoch 1, ..."""
    import grain

    count = len(rows)
    order = grain.MapDataset.range(count).shuffle(seed=seed).repeat()
    return order.map_with_index(lambda index, row: rows.row(index // count, row))


def _mix(streams: list[grain.MapDataset], weights: list[float]) -> Any:
    """Draws from each stream by its weight (Grain rounds weights to 1% of the smallest), in a fixed pattern."""
    import grain

    if len(streams) < 2:
        return streams[0] if streams else None
    return grain.MapDataset.mix(streams, weights)


def _derived(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, 2, number]).generate_state(1)[0])


def _parts(config: DataConfig) -> list[blend.Part]:
    if config.blend:
        return blend.read(config.blend)
    return [blend.Part("data", config.files, config.text_field, 1.0)]


def _read(
    files: str,
    text_field: str,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    tokenised: Callable[[list[TextFile], Tokenizer], tuple[TokenStore, About]],
) -> tuple[Corpus, list[About]]:
    """The documents of some files: first those of all text files, then those of each .bin/.idx."""
    texts, prefixes = resolve(files, text_field)
    found = []
    if texts:
        if tokenizer is None:
            raise DataError(f"{texts[0].name}: expected a tokenizer for this text, and there is none: name one.")
        _check_vocabulary("the tokenizer", tokenizer.vocab_size, vocab_size)
        found.append(tokenised(texts, tokenizer))
    for prefix in prefixes:
        tokens = megatron.read(prefix)
        if not len(tokens.tokens):
            raise DataError(f"{prefix}.bin: expected tokens, but the file holds none. Remove it from the list.")
        head = tokens.tokens[:_LOOK_AT]
        for token in (int(head.max()), int(head.min())):
            if not 0 <= token < vocab_size:
                raise too_large(tokens.name, token, vocab_size)
        found.append((tokens, About(tokens.documents, len(tokens.tokens), text_bytes=None)))
    return Corpus(tuple(tokens for tokens, _ in found)), [about for _, about in found]


def _check_vocabulary(name: str, size: int, vocab_size: int) -> None:
    if size > vocab_size:
        raise DataError(
            f"{name}: expected a tokenizer of at most {vocab_size} tokens, the model's vocab_size, got one of {size}. "
            f"Use a smaller one (data.tokenizer) or set model.vocab_size to {math.ceil(size / 128) * 128}."
        )


def _statistics(abouts: list[About], train: list[PackedRows], held_out: list[PackedRows]) -> Statistics:
    sizes = [about.text_bytes for about in abouts]
    return Statistics(
        documents=sum(about.documents for about in abouts),
        tokens=sum(about.tokens for about in abouts),
        text_bytes=None if None in sizes else sum(size or 0 for size in sizes),
        not_utf8=sum(about.not_utf8 for about in abouts),
        empty=sum(about.empty for about in abouts),
        train_tokens=sum(rows.tokens for rows in train),
        validation_documents=sum(rows.documents for rows in held_out),
        validation_tokens=sum(rows.tokens for rows in held_out),
    )
