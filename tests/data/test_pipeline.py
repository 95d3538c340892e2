import itertools
import json

import jax
import numpy as np
import pytest

from nemotron_jax import data
from nemotron_jax.errors import ConfigError, DataError
from nemotron_jax.run_config import DataConfig

SEQ_LEN = 16
BATCH = 8
FIELDS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")


def numbered(first: int, count: int) -> list[list[int]]:
    """Documents of 3 to 40 tokens; every token of document i is i, so rows tell what they were made of."""
    lengths = np.random.default_rng(first).integers(3, 40, count)
    return [[number] * length for number, length in enumerate(lengths, start=first)]


@pytest.fixture
def make(documents_of, tmp_path):
    """make(...) -> TrainData of 100 documents, numbered from 1, without text or tokenizer."""
    prefix = documents_of("numbered", numbered(1, 100))

    def build(share=(0, 1), seed=0, vocab_size=1000, global_batch_size=BATCH, **config):
        return data.build(
            DataConfig(**({"files": prefix, "seq_len": SEQ_LEN, "validation_fraction": 0.1} | config)),
            None,
            global_batch_size=global_batch_size,
            vocab_size=vocab_size,
            seed=seed,
            cache_dir=tmp_path / "cache",
            share=share,
        )

    return build


def take(iterator, count: int) -> list[data.Batch]:
    return list(itertools.islice(iterator, count))


def same(left: data.Batch, right: data.Batch) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in FIELDS)


def seen(batches: list[data.Batch]) -> set[int]:
    return {int(token) for batch in batches for token in np.unique(batch.tokens[batch.segment_ids > 0])}


def rows_of(batches: list[data.Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


def rows_an_epoch(made: data.TrainData) -> int:
    return (made.statistics.train_tokens - 1) // SEQ_LEN


def test_batches(make):
    batch = next(make().train_iterator())
    for name in FIELDS:
        assert getattr(batch, name).shape == (BATCH, SEQ_LEN)
        assert getattr(batch, name).dtype == (np.float32 if name == "loss_weights" else np.int32)
    assert batch.extras == {}
    doubled = jax.tree.map(lambda array: array * 2, batch)
    assert isinstance(doubled, data.Batch)
    assert np.array_equal(doubled.tokens, batch.tokens * 2)


def test_rows_of_an_epoch_are_shuffled_and_come_once(make):
    made = make(global_batch_size=1)
    count = rows_an_epoch(made)
    rows = rows_of(take(made.train_iterator(), 3 * count))
    epochs = [rows[start : start + count] for start in range(0, 3 * count, count)]
    for epoch in epochs:
        tokens = np.bincount(np.ravel(epoch), minlength=101)
        lengths = np.bincount(np.concatenate(numbered(1, 100)), minlength=101)
        held_out = seen(made.validation_batches(1000))
        expected = np.array([0 if number in held_out else length for number, length in enumerate(lengths)])
        assert (tokens <= expected).all()
        assert (expected - tokens).sum() <= SEQ_LEN  # what is left after the last whole row
    shared = set(epochs[0]) & set(epochs[1])
    assert len(shared) < count / 2  # the documents are packed anew, too
    # Neighbours in the stream of documents are not neighbours in the order of the rows.
    continued = sum(before[-1] == after[0] for before, after in itertools.pairwise(epochs[0]))
    assert continued < count / 4


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_the_order_does_not_depend_on_the_number_of_processes(make, process_count):
    whole = make()
    parts = [make((index, process_count)) for index in range(process_count)]
    assert len({made.fingerprint for made in (whole, *parts)}) == 1
    count = 2 * rows_an_epoch(whole) // BATCH  # over an epoch's end
    iterators = [made.train_iterator() for made in parts]
    for batch, *others in zip(take(whole.train_iterator(), count), *iterators, strict=False):
        assert others[0].tokens.shape == (BATCH // process_count, SEQ_LEN)
        assert same(batch, jax.tree.map(lambda *arrays: np.concatenate(arrays), *others))
    validation = [made.validation_batches() for made in parts]
    for batch, *others in zip(whole.validation_batches(), *validation, strict=True):
        assert same(batch, jax.tree.map(lambda *arrays: np.concatenate(arrays), *others))


def test_resume_is_exact_and_for_any_number_of_processes(make):
    steps = 2 * rows_an_epoch(make()) // BATCH + 3
    expected = take(make().train_iterator(), steps)
    for stop in (0, 1, 7, steps - 4):
        iterator = make().train_iterator()
        assert len(take(iterator, stop)) == stop
        state = json.loads(json.dumps(iterator.get_state()))
        iterator.close()
        resumed = make().train_iterator()
        take(resumed, 5)  # what it has read and prefetched by then does not matter
        resumed.set_state(state)
        assert all(map(same, take(resumed, steps - stop), expected[stop:]))
        second = make((1, 2)).train_iterator()
        second.set_state(state)
        assert np.array_equal(next(second).tokens, expected[stop].tokens[BATCH // 2 :])


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"seq_len": 8}, {"global_batch_size": 4}, {"validation_fraction": 0.2}, {"files": "other"}],
    ids=lambda change: next(iter(change)),
)
def test_resume_with_other_data_is_refused(make, documents_of, change):
    if "files" in change:
        documents = numbered(1, 100)
        documents[50] = [900] * len(documents[50])
        change = {"files": documents_of("other", documents)}
    state = make().train_iterator().get_state()
    make().train_iterator().set_state(state)
    with pytest.raises(DataError, match="the data are not those that the checkpoint was trained on"):
        make(**change).train_iterator().set_state(state)


def test_seeds_give_other_orders(make):
    first, second = (take(make(seed=seed).train_iterator(), 3) for seed in (0, 1))
    assert not same(first[0], second[0])
    assert same(take(make(seed=-1).train_iterator(), 1)[0], take(make(seed=-1).train_iterator(), 1)[0])


def test_held_out_documents_are_never_trained_on(make):
    made = make()
    trained = seen(take(made.train_iterator(), 4 * rows_an_epoch(made) // BATCH))
    held_out = seen(made.validation_batches(1000))
    assert len(held_out) == made.statistics.validation_documents == 10
    assert not trained & held_out
    assert trained | held_out == set(range(1, 101))


def test_validation_batches_are_fixed_and_padded(make):
    made = make()
    batches = made.validation_batches(1000)
    assert all(map(same, batches, made.validation_batches(1000)))
    assert len(made.validation_batches(1)) == 1
    assert same(made.validation_batches(1)[0], batches[0])
    targets = sum(int(batch.loss_weights.sum()) for batch in batches)
    assert targets == made.statistics.validation_tokens - made.statistics.validation_documents
    padding = batches[-1].segment_ids == 0
    assert padding.any()
    assert not batches[-1].loss_weights[padding].any()
    assert make(validation_fraction=0.0).validation_batches() == []


def write_blend(path, *entries) -> str:
    datasets = [{"name": name, "path": prefix, "weight": weight} for name, prefix, weight in entries]
    path.write_text(json.dumps({"datasets": datasets}))
    return str(path)


def test_blend_draws_by_weight(make, documents_of, tmp_path):
    small = documents_of("small", numbered(201, 20))
    blend = write_blend(tmp_path / "b.json", ("a", make()._config.files, 6), ("b", small, 3), ("c", small, 0))
    made = make(blend=blend, files="ignored")
    batches = take(made.train_iterator(), 150)
    of_b = np.array([row[0] > 200 for row in rows_of(batches)])
    assert abs(of_b.mean() - 1 / 3) < 0.005
    windows = of_b[: len(of_b) // 30 * 30].reshape(-1, 30).sum(1)
    assert windows.min() >= 9  # spread evenly, not by chance
    assert windows.max() <= 11
    assert seen(batches) & seen(made.validation_batches(1000)) == set()
    assert {number > 200 for number in seen(made.validation_batches(1000))} == {False, True}
    halves = [make((index, 2), blend=blend).train_iterator() for index in range(2)]
    for batch, *others in zip(batches[:20], *halves, strict=False):
        assert same(batch, jax.tree.map(lambda *arrays: np.concatenate(arrays), *others))
    resumed = make(blend=blend).train_iterator()
    resumed.set_state({"next_batch": 140, "fingerprint": made.fingerprint})
    assert all(map(same, take(resumed, 10), batches[140:]))
    other = write_blend(tmp_path / "other.json", ("a", make()._config.files, 2), ("b", small, 3))
    assert make(blend=other).fingerprint != made.fingerprint


def test_text_from_nothing_to_batches(tmp_path):
    texts = [f"document {number}: " + "the cat sat on the mat. " * number for number in range(1, 60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    (tmp_path / "b.jsonl").write_bytes(b'{"body": "\xff"}\n{"body": ""}\n')
    config = DataConfig(
        files=f"{tmp_path}/*.jsonl", text_field="body", seq_len=32, tokenizer="bpe:300", validation_fraction=0.05
    )
    tokenizer = data.load_tokenizer(config, tmp_path / "cache", vocab_size=512)
    sizes = {"global_batch_size": 4, "vocab_size": 512, "seed": 0, "cache_dir": tmp_path / "cache"}
    made = data.build(config, tokenizer, **sizes)
    assert made.statistics.documents == 59
    assert made.statistics.text_bytes == sum(map(len, texts))
    assert (made.statistics.not_utf8, made.statistics.empty) == (1, 1)
    assert made.statistics.train_tokens + made.statistics.validation_tokens == made.statistics.tokens
    assert "59 documents" in made.statistics.summary()
    assert "3 documents held out; left out: 1 not UTF-8" in made.statistics.summary()
    held_out = made.validation_batches(100)
    stream = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in held_out])
    found = tokenizer.decode(stream).removeprefix("<s>").removesuffix("</s>").split("</s><s>")
    assert len(found) == 3
    assert set(found) < set(texts)
    again = data.build(config, data.load_tokenizer(config, tmp_path / "cache", vocab_size=512), **sizes)
    assert again.fingerprint == made.fingerprint
    tokenizer.save(tmp_path)
    named = DataConfig(**{**vars(config), "tokenizer": str(tmp_path)})
    loaded = data.load_tokenizer(named, tmp_path / "unused", vocab_size=300)
    assert data.build(named, loaded, **sizes).fingerprint == made.fingerprint


def test_evaluation_sees_every_token_once(tokenizer, tmp_path):
    texts = ["the cat sat", "é", "on the mat and the dog sat " * 5]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    batches, abouts = data.evaluation_batches(f"{tmp_path}/*.txt", tokenizer, seq_len=8, batch_size=4, vocab_size=300)
    batches = list(batches)
    assert all(batch.tokens.shape == (4, 8) for batch in batches)
    expected = [token for ids in tokenizer.encode_batch(texts) for token in [*ids.tolist(), tokenizer.eos_id]]
    found = [int(token) for batch in batches for token in batch.targets[batch.loss_weights > 0]]
    assert found == expected
    assert tokenizer.token_bytes[found].sum() == sum(about.text_bytes for about in abouts)


def test_evaluation_of_tokens(make):
    prefix = make()._config.files
    batches, (about,) = data.evaluation_batches(prefix, None, seq_len=8, batch_size=4, vocab_size=300)
    targets = sum(int(batch.loss_weights.sum()) for batch in batches)
    assert targets == about.tokens - about.documents
    assert about.text_bytes is None


def test_batch_that_processes_cannot_share(make):
    with pytest.raises(ConfigError, match=r"global_batch_size \(8\) must be a multiple of .* share its rows \(3\)"):
        make((0, 3))


def test_tokens_beyond_the_vocabulary(make, documents_of):
    with pytest.raises(DataError, match=r"numbered: expected token ids from 0 to 99, .* got 100"):
        make(vocab_size=100)
    with pytest.raises(DataError, match=r"empty\.bin: expected tokens, but the file holds none"):
        make(files=documents_of("empty", []))


def test_tokens_beyond_the_vocabulary_far_into_the_file(make, monkeypatch):
    monkeypatch.setattr(data.pipeline, "_LOOK_AT", 10)
    iterator = make(vocab_size=100, validation_fraction=0.0).train_iterator()
    with pytest.raises(DataError, match=r"document 99: expected token ids from 0 to 99, .* got 100"):
        take(iterator, 1000)


def test_a_tokenizer_larger_than_the_model(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("the cat")
    tokenizer.save(tmp_path)
    message = (
        r"a tokenizer of at most 290 tokens, the model's vocab_size, got one of 300\. .*set model\.vocab_size to 384"
    )
    for spec in (str(tmp_path), "bpe:300"):
        with pytest.raises(DataError, match=message):
            data.load_tokenizer(DataConfig(files=f"{tmp_path}/a.txt", tokenizer=spec), tmp_path / "c", vocab_size=290)
    with pytest.raises(DataError, match=message):
        data.evaluation_batches(f"{tmp_path}/a.txt", tokenizer, seq_len=8, batch_size=1, vocab_size=290)
    with pytest.raises(DataError, match=message):
        data.build(
            DataConfig(files=f"{tmp_path}/a.txt"),
            tokenizer,
            global_batch_size=1,
            vocab_size=290,
            seed=0,
            cache_dir=tmp_path / "c",
        )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("spec", ["bpe:", "bpe:8k", "bpe:-1"])
def test_bad_tokenizer_size(spec, tmp_path):
    with pytest.raises(DataError, match="expected bpe:N with a number of tokens"):
        data.load_tokenizer(DataConfig(tokenizer=spec), tmp_path, vocab_size=8192)


def test_tokenizer_of_token_files(make, tmp_path):
    prefix = make()._config.files
    assert data.load_tokenizer(DataConfig(files=prefix), tmp_path, vocab_size=8192) is None
    (tmp_path / "a.txt").write_text("the cat")
    with pytest.raises(
        DataError, match=r"expected data\.tokenizer to name the tokenizer that these tokens were made with"
    ):
        data.load_tokenizer(DataConfig(files=f"{prefix},{tmp_path}/a.txt"), tmp_path, vocab_size=8192)
    with pytest.raises(DataError, match=r"a\.txt: expected a tokenizer for this text"):
        make(files=f"{prefix},{tmp_path}/a.txt")


def test_text_and_tokens_together(make, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat")
    config = DataConfig(files=f"{make()._config.files},{tmp_path}/a.txt", seq_len=8, validation_fraction=0.1)
    made = data.build(config, tokenizer, global_batch_size=2, vocab_size=300, seed=0, cache_dir=tmp_path / "cache")
    assert made.statistics.documents == 101
    assert made.statistics.text_bytes is None
    assert "MB" not in made.statistics.summary()
