"""Choosing tokens from logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.errors import ConfigError
from nemotron_jax.inference.sampling import Sampling, sample

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


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-300])
def test_very_low_temperatures_are_greedy(temperature, sign):
    """Dividing by them would make every logit infinite, and the first token the choice."""
    logits = jnp.asarray([[10.0, 30.0, 40.0, 20.0]]) - (50 if sign < 0 else 0)
    assert sample(logits, jax.random.key(0), Sampling(temperature)).tolist() == [2]
    assert sample(logits, jax.random.key(0), Sampling(temperature, top_k=3, top_p=0.9)).tolist() == [2]


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_bad_sampling(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)
