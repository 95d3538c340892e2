import os
import threading
import time

import numpy as np
import pytest

from nemotron_jax.data import store
from nemotron_jax.data.sources import resolve
from nemotron_jax.data.tokenizer import train_bpe
from nemotron_jax.errors import DataError

TEXTS = ["the cat", "sat on ∑ the mat", "x"]


@pytest.fixture
def files(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "8.txt").write_bytes(b"\xff")
    (tmp_path / "9.txt").write_bytes(b"")
    return resolve(f"{tmp_path}/*.txt")[0]


def contents(tokens: store.TokenStore) -> list[list[int]]:
    return [tokens.tokens[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_documents_open_and_close(files, tokenizer, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(store, "CHUNK_DOCUMENTS", chunk)
    expected = [[1, *ids.tolist(), 2] for ids in tokenizer.encode_batch(TEXTS)]
    for tokens, about in (
        store.cached_tokens(files, tokenizer, tmp_path / "cache"),
        store.in_memory(files, tokenizer),
    ):
        assert contents(tokens) == expected
        assert about == store.About(
            documents=3,
            tokens=sum(map(len, expected)),
            text_bytes=sum(len(text.encode()) for text in TEXTS),
            not_utf8=1,
            empty=1,
        )


def test_the_cache_is_used_and_knows_what_it_depends_on(files, tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def entries() -> set[str]:
        store.cached_tokens(resolve(f"{tmp_path}/*.txt")[0], tokenizer, cache)
        return {path.name for path in cache.iterdir() if path.name.startswith("tokens-")}

    first = entries()
    assert len(first) == 1
    with monkeypatch.context() as patch:
        patch.setattr(store, "tokenize", None)
        assert entries() == first
    os.utime(tmp_path / "0.txt", ns=(1, 1))
    assert len(second := entries()) == 2
    (tmp_path / "3.txt").write_text("more")
    assert len(third := entries()) == 3
    assert first < second < third
    store.cached_tokens(files, train_bpe(["another"], 300), cache)
    assert len(entries()) == 4
    store.cached_tokens(resolve(f"{tmp_path}/*.txt", "body")[0], tokenizer, cache)
    assert len(entries()) == 5


def test_a_killed_build_leaves_nothing_in_the_way(files, tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.megatron.Writer, "add", stop)
        store.cached_tokens(files, tokenizer, cache)
    assert [path.name for path in cache.iterdir()] == [".lock"]
    # A kill -9 cleans nothing up: what it leaves is a directory under the partial name.
    whole = contents(store.cached_tokens(files, tokenizer, cache)[0])
    (name,) = (path.name for path in cache.iterdir() if path.name != ".lock")
    (cache / name).rename(cache / f"{name}.partial")
    (cache / f"{name}.partial" / "data.bin").write_bytes(b"half")
    assert contents(store.cached_tokens(files, tokenizer, cache)[0]) == whole
    assert sorted(path.name for path in cache.iterdir()) == [".lock", name]


def test_two_builders_take_turns(files, tokenizer, tmp_path, monkeypatch):
    built = []
    tokenize = store.tokenize

    def slowly(*arguments):
        built.append(1)
        time.sleep(0.3)
        return tokenize(*arguments)

    monkeypatch.setattr(store, "tokenize", slowly)
    threads = [
        threading.Thread(target=store.cached_tokens, args=(files, tokenizer, tmp_path / "cache")) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_bpe_is_trained_once(files, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = store.cached_bpe(files, 280, cache)
    monkeypatch.setattr(store, "train_bpe", None)
    assert store.cached_bpe(files, 280, cache).fingerprint == first.fingerprint
    assert first.vocab_size == 280
    with pytest.raises(TypeError):
        store.cached_bpe(files, 281, cache)


def test_bpe_reads_no_more_than_it_needs(files, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BPE_CHARACTERS", 7)
    trained = store.cached_bpe(files, 280, tmp_path / "cache")
    assert trained.fingerprint == train_bpe(TEXTS[:1], 280).fingerprint


def test_nothing_left(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    files, _ = resolve(f"{tmp_path}/a.txt")
    message = r"a\.txt: expected at least one document, found none \(1 were not UTF-8, 0 were empty\)"
    with pytest.raises(DataError, match=message):
        store.cached_tokens(files, tokenizer, tmp_path / "cache")
    with pytest.raises(DataError, match=message):
        store.in_memory(files, tokenizer)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written(files, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(DataError, match=r"cannot be written there: (Not a directory|File exists)"):
        store.cached_tokens(files, tokenizer, tmp_path / "file" / "cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.megatron.Writer, "add", full)
    with pytest.raises(DataError, match=r"cannot be written there: No space left on device\. Free some space"):
        store.cached_tokens(files, tokenizer, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_tokens_are_stored_small(files, tokenizer, tmp_path):
    tokens, _ = store.cached_tokens(files, tokenizer, tmp_path / "cache")
    assert tokens.tokens.dtype == np.uint16
