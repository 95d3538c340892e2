import numpy as np
import pytest

from nemotron_jax.data.megatron import TokenStore
from nemotron_jax.data.packing import Corpus, PackedRows, split
from nemotron_jax.errors import DataError

VOCAB = 100_000


def corpus(*stores: list[list[int]]) -> Corpus:
    return Corpus(
        tuple(
            TokenStore(
                f"store {number}",
                np.array([token for document in documents for token in document], np.int32),
                np.cumsum([0, *map(len, documents)], dtype=np.int64),
            )
            for number, documents in enumerate(stores)
        )
    )


def random_documents(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Documents whose tokens tell where they stand: 1000·document + place."""
    lengths = np.random.default_rng(seed).integers(1, longest, count)
    return [[1000 * number + place for place in range(length)] for number, length in enumerate(lengths, start=1)]


def naive_rows(documents: list[list[int]], seq_len: int) -> list[dict[str, list]]:
    """Rows the slow way: one list of (token, document), cut; a token a time."""
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    rows = []
    for begin in range(0, len(stream) - seq_len, seq_len):
        row = {"tokens": [], "targets": [], "loss_weights": [], "segment_ids": [], "positions": []}
        for place in range(begin, begin + seq_len):
            (token, document), (target, next_document) = stream[place], stream[place + 1]
            border = place == begin or stream[place - 1][1] != document
            row["tokens"].append(token)
            row["targets"].append(target)
            row["loss_weights"].append(float(next_document == document))
            row["positions"].append(0 if border else row["positions"][-1] + 1)
            row["segment_ids"].append(row["segment_ids"][-1] + border if row["segment_ids"] else 1)
        rows.append(row)
    return rows


def documents_seen(rows: PackedRows, epoch: int) -> list[int]:
    """The documents of an epoch in the order in which its rows begin or go on with them."""
    tokens = np.concatenate([rows.row(epoch, index).tokens for index in range(len(rows))])
    return list(dict.fromkeys((tokens // 1000).tolist()))


@pytest.mark.parametrize("seq_len", [2, 7, 64])
@pytest.mark.parametrize("longest", [3, 30, 300])
def test_rows_are_the_concatenation_cut(seq_len, longest):
    documents = random_documents(60, longest)
    rows = PackedRows(corpus(documents[:13], documents[13:14], documents[14:]), np.arange(60), seq_len, VOCAB)
    expected = naive_rows(documents, seq_len)
    assert len(rows) == len(expected)
    for index in np.random.default_rng(1).permutation(len(rows)):
        row = rows.row(0, int(index))
        for name, values in expected[index].items():
            found = getattr(row, name)
            assert found.dtype == (np.float32 if name == "loss_weights" else np.int32)
            assert found.tolist() == values, name


def test_targets_never_cross_a_border():
    rows = PackedRows(corpus(random_documents(50, 40)), np.arange(50), 32, VOCAB, seed=3)
    for epoch in range(2):
        for index in range(len(rows)):
            row = rows.row(epoch, index)
            counted = row.loss_weights > 0
            assert (row.tokens[counted] + 1 == row.targets[counted]).all()
            last = row.tokens % 1000 + 1 == rows._corpus.lengths()[row.tokens // 1000 - 1]
            assert (counted == ~last).all()  # weight 0 on the last token of a document, and nowhere else


def test_an_epoch_holds_every_document_once_in_an_order_of_its_own():
    documents = random_documents(60, 30)
    rows = PackedRows(corpus(documents), np.arange(60), 16, VOCAB, seed=5)
    orders = []
    for epoch in (0, 1, 2):
        tokens = np.concatenate([rows.row(epoch, index).tokens for index in range(len(rows))])
        assert len(set(tokens.tolist())) == len(tokens) == len(rows) * 16
        assert sum(map(len, documents)) - len(tokens) <= 16
        orders.append(documents_seen(rows, epoch))
    assert orders[0] != orders[1] != orders[2]
    again = PackedRows(corpus(documents), np.arange(60), 16, VOCAB, seed=5)
    assert [documents_seen(again, epoch) for epoch in (2, 0, 1)] == [orders[2], orders[0], orders[1]]
    assert documents_seen(PackedRows(corpus(documents), np.arange(60), 16, VOCAB, seed=6), 0) != orders[0]


def test_only_the_chosen_documents():
    rows = PackedRows(corpus(random_documents(20, 30)), np.array([3, 7, 11, 12]), 8, VOCAB, seed=0, pad=True)
    assert set(documents_seen(rows, 0)) - {0} == {4, 8, 12, 13}


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18])
def test_padding(length):
    rows = PackedRows(corpus([list(range(1, length + 1))]), np.arange(1), 8, VOCAB, pad=True)
    assert len(rows) == {9: 1, 10: 2, 16: 2, 17: 2, 18: 3}[length]
    row = rows.row(0, len(rows) - 1)
    held = length - 8 * (len(rows) - 1)  # with the last target
    targets = held - 1
    assert row.targets[:targets].tolist() == list(range(length - targets + 1, length + 1))
    assert row.loss_weights.tolist() == [1.0] * targets + [0.0] * (8 - targets)
    assert (row.segment_ids[:targets] == 1).all()
    for name in ("tokens", "segment_ids", "positions"):
        assert not getattr(row, name)[held:].any()
    assert all((array == 0).all() for array in vars(rows.padding()).values() if isinstance(array, np.ndarray))


def test_less_than_a_row():
    with pytest.raises(DataError, match=r"store 0: expected at least 9 tokens .*in the 2 documents .*got 8\."):
        PackedRows(corpus([[1] * 4, [2] * 4]), np.arange(2), 8, VOCAB)
    assert len(PackedRows(corpus([[1] * 4, [2] * 5]), np.arange(2), 8, VOCAB)) == 1


@pytest.mark.parametrize("token", [50, -1])
def test_a_token_that_the_model_does_not_have(token):
    rows = PackedRows(corpus([[1] * 20], [[2, 3], [4, token]]), np.arange(3), 8, 50)
    assert rows.row(0, 0).tokens.tolist() == [1] * 8
    with pytest.raises(
        DataError, match=rf"document 2: expected token ids from 0 to 49, .* vocab_size being 50, got {token}"
    ):
        rows.row(0, 2)


@pytest.mark.parametrize(("fraction", "held_out"), [(0.001, 1), (0.1, 10), (0.5, 50), (0.999, 99)])
def test_split(fraction, held_out):
    lengths = np.ones(104, np.int64)
    lengths[[3, 50, 51, 103]] = 0
    train, validation = split(lengths, fraction, 0, "x")
    assert len(validation) == held_out
    assert sorted([*train, *validation]) == np.nonzero(lengths)[0].tolist()
    assert [part.tolist() for part in split(lengths, fraction, 0, "x")] == [train.tolist(), validation.tolist()]
    assert split(lengths, fraction, 1, "x")[1].tolist() != validation.tolist()


def test_split_off_nothing():
    train, validation = split(np.array([1, 0, 2]), 0.0, 0, "x")
    assert train.tolist() == [0, 2]
    assert not len(validation)


def test_too_few_documents_to_split():
    with pytest.raises(DataError, match=r"a\.txt: expected at least 2 documents.* got 1.*validation_fraction=0"):
        split(np.array([0, 5]), 0.1, 0, "a.txt")
