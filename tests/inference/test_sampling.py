"""Choosing tokens, and text that arrives in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.errors import ConfigError, DataError
from nemotron_jax.inference import generate as generation
from nemotron_jax.inference.generate import generate, read_tokens, stream_text, write_array
from nemotron_jax.inference.sampling import Sampling, sample
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.precision.recipe import RECIPES
from tests.tiny import TINY

LOGITS = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))


def frequencies(sampling, draws=4000):
    tokens = sample(jnp.repeat(LOGITS, draws, axis=0), jax.random.key(0), sampling)
    return np.bincount(np.asarray(tokens), minlength=4) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0), [1, 0, 0, 0]),
        (Sampling(), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(temperature=0.5), np.array([16, 9, 4, 1]) / 30),
        (Sampling(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Sampling(top_p=0.01), [1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_distributions(sampling, expected):
    np.testing.assert_allclose(frequencies(sampling), expected, atol=0.03)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_bad_sampling(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.fixture(scope="module")
def model():
    return Nemotron(TINY, RECIPES["float32"], jax.random.key(0))


def test_rows_of_unequal_length_are_independent(model):
    prompts = [np.array([3, 4, 5], np.int32), np.arange(9, dtype=np.int32)]
    together = np.stack(list(generate(model, prompts, 6, Sampling(temperature=0))))
    for row, prompt in enumerate(prompts):
        alone = np.stack(list(generate(model, [prompt], 6, Sampling(temperature=0))))
        np.testing.assert_array_equal(together[:, row], alone[:, 0])


def test_a_seed_repeats_and_another_differs(model):
    prompts = [np.array([3, 4], np.int32)]
    made = [np.stack(list(generate(model, prompts, 12, Sampling(), seed=seed))) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 2**32}, {"tokens": 0}, {"tokens": 10**8}])
def test_bad_requests(model, bad):
    request = {"tokens": 1, "sampling": Sampling(), "seed": 0} | bad
    with pytest.raises(ConfigError):
        next(generate(model, [np.array([3], np.int32)], **request))


@pytest.mark.parametrize("values", [np.array([[2**32 + 5]]), np.array([[-1]]), np.array([[1.0]]), np.array([1])])
def test_token_files_that_are_refused(values, tmp_path):
    np.save(tmp_path / "t.npy", values)
    with pytest.raises(DataError):
        read_tokens(tmp_path / "t.npy")
    np.savez(tmp_path / "t.npz", values)
    with pytest.raises(DataError, match="archive"):
        read_tokens(tmp_path / "t.npz")
    with pytest.raises(DataError, match="cannot be written"):
        write_array(tmp_path / "missing" / "t.npy", values)


@pytest.mark.parametrize("prompts", [[], [np.array([], np.int32)], [np.array([64], np.int32)], [np.array([-1])]])
def test_bad_prompts(model, prompts):
    with pytest.raises(ConfigError):
        next(generate(model, prompts, 1, Sampling()))


class ByteTokenizer:
    bos_id, eos_id = 1, 2

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_streamed_pieces_are_whole_characters(model, monkeypatch):
    made = list("aé€\N{GRINNING FACE}!".encode())
    monkeypatch.setattr(generation, "generate", lambda *_, **__: (np.array([token]) for token in [*made, 2, 65]))
    pieces = list(stream_text(model, ByteTokenizer(), "x", 99, Sampling()))
    assert pieces == ["a", "é", "€", "\N{GRINNING FACE}", "!"]  # and nothing after the end of text


def test_a_cut_character_is_shown_at_the_end(model, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *_, **__: (np.array([token]) for token in [97, 0xC3]))
    assert "".join(stream_text(model, ByteTokenizer(), "x", 2, Sampling())) == "a\N{REPLACEMENT CHARACTER}"
