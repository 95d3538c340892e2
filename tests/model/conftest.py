"""Small models that hold every block kind, in float32."""

import dataclasses

import jax
import numpy as np
import pytest

from nemotron_jax.config import ModelConfig
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.precision.recipe import RECIPES
from tests.tiny import TINY


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def tiny_model() -> Nemotron:
    """All letters and MTP; router biases are not zero, so that choice and weights can be told apart."""
    model = Nemotron(TINY, RECIPES["float32"], jax.random.key(0))
    bias = np.random.default_rng(0).normal(size=TINY.moe.num_experts).astype(np.float32)
    for layer in model.layers:
        if hasattr(layer.mixer, "gate"):
            layer.mixer.gate.e_score_correction_bias[...] = jax.numpy.asarray(bias)
    return model


@pytest.fixture(scope="session")
def block_model():
    """letter -> (config, model) of two layers of one block kind."""
    cache = {}

    def make(letter: str):
        if letter not in cache:
            config = dataclasses.replace(TINY, pattern=letter * 2, mtp=None)
            cache[letter] = (config, Nemotron(config, RECIPES["float32"], jax.random.key(1)))
        return cache[letter]

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
