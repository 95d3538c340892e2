"""Documents -> rows of T tokens, as a pure function of (epoch, row number).

An epoch puts the documents in an order of its own, end to end, and cuts the stream every T tokens; a row reads one
token more than it holds, the last target. So any row of any epoch can be had at once: nothing is read to get past,
resuming is exact, and the order cannot depend on how many processes share the work.
"""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from nemotron_jax.data.batch import Batch
from nemotron_jax.data.megatron import TokenStore
from nemotron_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Stores whose documents are numbered through: those of the first store, then those of the second, ..."""

    stores: tuple[TokenStore, ...]

    @property
    def name(self) -> str:
        return ", ".join(store.name for store in self.stores)

    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens in each."""
        return np.concatenate([np.diff(store.offsets) for store in self.stores])

    def slice(self, document: int, start: int, count: int) -> np.ndarray:
        """``count`` tokens of a document, from its token ``start`` on."""
        for store in self.stores:
            if document < store.documents:
                first = int(store.offsets[document]) + start
                return store.tokens[first : first + count]
            document -= store.documents
        raise IndexError("no such document")


def split(lengths: np.ndarray, fraction: float, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents to train on and of those held out, int64, each sorted; empty documents in neither.

    ``fraction`` of the documents (rounded, at least one) is held out; the seed and their number decide which.
    Raises DataError where a part would be empty.
    """
    (filled,) = np.nonzero(lengths)
    if fraction == 0 and len(filled):
        return filled, filled[:0]
    if len(filled) < 2:
        raise DataError(
            f"{name}: expected at least 2 documents, one to train on and one to hold out, got {len(filled)}. Give more "
            "files, cut the text into documents (a line of .jsonl each), or set data.validation_fraction=0."
        )
    held_out = min(max(round(fraction * len(filled)), 1), len(filled) - 1)
    order = np.random.default_rng([seed, 0]).permutation(filled)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class PackedRows:
    """The rows of some documents of a corpus.

    ``len()`` is the number of rows in an epoch. With ``pad`` the epoch's last row is filled up with padding (token 0,
    segment 0, weight 0), and every token is in a row; without, the tokens after the last whole row are left out, other
    ones each epoch.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: np.ndarray,
        seq_len: int,
        vocab_size: int,
        *,
        seed: int | None = None,
        pad: bool = False,
    ):
        """``seed`` None keeps the documents in order. Raises DataError where there is less than a row."""
        self._corpus = corpus
        self._documents = documents
        self._lengths = corpus.lengths()[documents]
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        self._seed = seed
        self.documents = len(documents)
        self.tokens = int(self._lengths.sum())
        predicted = self.tokens - 1  # the first token of the stream is nobody's target
        self._rows = -(-predicted // seq_len) if pad else predicted // seq_len
        if self._rows < 1:
            needed = "2 tokens" if pad else f"{seq_len + 1} tokens (data.seq_len and one more)"
            raise DataError(
                f"{corpus.name}: expected at least {needed} in the {len(documents)} documents of this part of the "
                f"data, got {self.tokens}. Give more text or lower data.seq_len."
            )
        self._lock = threading.Lock()
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._rows

    def row(self, epoch: int, index: int) -> Batch:
        """Row ``index`` of an epoch, a Batch of [T] arrays.

        Raises:
          DataError: a token that the model does not have.
        """
        order, ends = self._epoch(epoch)
        begin = index * self._seq_len
        stop = min(begin + self._seq_len + 1, self.tokens)
        ids = np.zeros(self._seq_len + 1, np.int32)
        segments = np.zeros(self._seq_len + 1, np.int32)
        positions = np.zeros(self._seq_len + 1, np.int32)
        at = begin
        first = int(np.searchsorted(ends, begin, side="right"))
        for number, place in enumerate(range(first, len(order)), start=1):
            document, end = int(order[place]), int(ends[place])
            count = min(end, stop) - at
            here = slice(at - begin, at - begin + count)
            taken = self._corpus.slice(document, at - (int(ends[place - 1]) if place else 0), count)
            self._check(taken, document)
            ids[here], segments[here], positions[here] = taken, number, np.arange(count)
            at += count
            if at == stop:
                break
        same_document = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        return Batch(
            tokens=ids[:-1],
            targets=ids[1:],
            loss_weights=same_document.astype(np.float32),
            segment_ids=segments[:-1],
            positions=positions[:-1],
        )

    def padding(self) -> Batch:
        """A row that holds nothing, to fill up a batch."""
        empty = np.zeros(self._seq_len, np.int32)
        return Batch(empty, empty, empty.astype(np.float32), empty, empty)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(document at each place, where in the epoch's stream it ends), int64 [documents] each."""
        with self._lock:
            if epoch not in self._epochs:
                places = np.arange(len(self._documents))
                if self._seed is not None:
                    places = np.random.default_rng([self._seed, 1, epoch]).permutation(places)
                while len(self._epochs) > 1:  # batches that straddle two epochs need both
                    del self._epochs[min(self._epochs)]
                self._epochs[epoch] = self._documents[places], np.cumsum(self._lengths[places])
            return self._epochs[epoch]

    def _check(self, tokens: np.ndarray, document: int) -> None:
        largest, smallest = int(tokens.max()), int(tokens.min())
        if largest >= self._vocab_size or smallest < 0:
            raise too_large(self._corpus.name, largest if smallest >= 0 else smallest, self._vocab_size, document)


def too_large(name: str, token: int, vocab_size: int, document: int | None = None) -> DataError:
    where = name if document is None else f"{name}, document {document}"
    return DataError(
        f"{where}: expected token ids from 0 to {vocab_size - 1}, the model's vocab_size being {vocab_size}, got "
        f"{token}. Tokenise with a smaller tokenizer or set model.vocab_size to more than the largest id."
    )
