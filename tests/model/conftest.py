"""Small models that hold every block kind, in float32."""

import dataclasses

import jax
import numpy as np
import pytest

from nemotron_jax.config import AttentionConfig, MambaConfig, ModelConfig, MoEConfig, MTPConfig
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.precision.recipe import RECIPES

TINY = ModelConfig(
    pattern="ME*-M",
    hidden_size=32,
    vocab_size=64,
    intermediate_size=48,
    mamba=MambaConfig(num_heads=4, head_dim=8, num_groups=2, state_size=8, chunk_size=8),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    moe=MoEConfig(num_experts=8, top_k=3, intermediate_size=24, shared_intermediate_size=40, latent_size=16),
    mtp=MTPConfig(pattern="*E", depth=2),
)


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
