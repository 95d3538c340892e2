"""The model against an outside implementation: transformers' NemotronHForCausalLM in float32.

The fixtures and how they were made: tests/golden/hf/make_fixtures.py. The largest difference measured is 1e-5; the
clamp of dt that transformers had to be freed of moves log-probabilities by 0.3 (nano) to 6 (super).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax
from nemotron_jax.inference.generate import generate_tokens
from nemotron_jax.model.context import Context

FIXTURES = Path(__file__).parent / "hf"
TOLERANCE = 1e-4
MODELS = ("nano", "super", "dense")


@pytest.fixture(scope="module")
def fixture():
    """name -> (model, [(tokens [T], log-probabilities [T, V], those that transformers got with its cache)])."""
    cache = {}

    def load(name):
        if name not in cache:
            _, model = nemotron_jax.load(FIXTURES / name, precision="float32")
            arrays = np.load(FIXTURES / name / "expected.npz")
            numbers = range(sum(key.startswith("tokens_") for key in arrays))
            kinds = ("tokens", "logprobs", "cached")
            cache[name] = (model, [tuple(arrays[f"{kind}_{n}"] for kind in kinds) for n in numbers])
        return cache[name]

    return load


def logprobs(model, hidden_TD):
    return np.asarray(jax.nn.log_softmax(model.logits(hidden_TD), axis=-1))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_one_pass(fixture, name):
    model, sequences = fixture(name)
    for tokens, expected, cached in sequences:
        actual = logprobs(model, model(jnp.asarray(tokens[None])).hidden[0])
        close(actual, expected)
        close(actual, cached)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode(fixture, name):
    """All sequences in one batch, right-padded; then five tokens one at a time, each row at its own position."""
    model, sequences = fixture(name)
    rows = len(sequences)
    lengths = np.array([max(len(tokens) - 5, 1) for tokens, _, _ in sequences])
    padded = np.zeros((rows, lengths.max() + 3), np.int32)
    for row, (tokens, _, _) in enumerate(sequences):
        padded[row, : lengths[row]] = tokens[: lengths[row]]
    advance = jax.jit(lambda tokens, state, new: model.hidden(tokens, Context(new_tokens=new), state)[:2])
    hidden, state = advance(jnp.asarray(padded), model.init_state(rows, 1024), jnp.asarray(lengths))
    for row, (_, expected, cached) in enumerate(sequences):
        actual = logprobs(model, hidden[row, : lengths[row]])
        close(actual, expected[: lengths[row]])
        close(actual, cached[: lengths[row]])
    compared = 0
    for position in lengths + np.arange(5)[:, None]:  # [rows]; a row that has ended repeats its last token
        following = [tokens[min(at, len(tokens) - 1)] for at, (tokens, _, _) in zip(position, sequences, strict=True)]
        hidden, state = advance(jnp.asarray(following)[:, None], state, jnp.ones(rows, jnp.int32))
        for row, (at, (tokens, expected, cached)) in enumerate(zip(position, sequences, strict=True)):
            if at < len(tokens):
                actual = logprobs(model, hidden[row, 0])
                close(actual, expected[at])
                close(actual, cached[at])
                compared += 1
    assert compared == sum(len(tokens) for tokens, _, _ in sequences) - lengths.sum()


def test_generate_goes_on_as_transformers_would(fixture, tmp_path):
    """The likeliest next token, from the directory to the file."""
    tokens, expected, _ = fixture("super")[1][-1]
    np.save(tmp_path / "in.npy", tokens[None])
    greedy = {"tokens": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    generate_tokens(FIXTURES / "super", tmp_path / "in.npy", tmp_path / "out.npy", **greedy)
    assert np.load(tmp_path / "out.npy").tolist() == [[expected[-1].argmax()]]
