"""Routing, load balance and expert counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nemotron_jax.config import replace
from nemotron_jax.model.context import Context
from nemotron_jax.model.linear import Buffer, Scope
from nemotron_jax.model.moe import MoE, Router
from nemotron_jax.precision.recipe import RECIPES


def scope():
    return Scope(jax.random.key(0), RECIPES["float32"], "layers/0/mixer")


def test_correction_bias_chooses_and_does_not_weigh(tiny_config, rng):
    router = Router(scope(), tiny_config)
    h = jnp.asarray(rng.normal(size=(1, 5, tiny_config.hidden_size)), jnp.float32)
    router.e_score_correction_bias[...] = jnp.zeros(8).at[6].set(10.0)
    scores, experts, weights = router(h)
    assert (np.asarray(experts)[..., 0] == 6).all()
    chosen = np.take_along_axis(np.asarray(scores), np.asarray(experts), -1)
    expected = chosen / chosen.sum(-1, keepdims=True) * tiny_config.moe.scaling_factor
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    graphdef, bias, weight = nnx.split(router, Buffer, nnx.Param)
    gradient = jax.grad(lambda bias: nnx.merge(graphdef, bias, weight)(h)[2].max())(bias)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


def test_router_is_float32_in_bfloat16_models(tiny_config, rng):
    """Scores of bfloat16 inputs are those of a float32 product, not of bfloat16 operands."""
    router = Router(Scope(jax.random.key(0), RECIPES["bfloat16"], "gate"), tiny_config)
    h = jnp.asarray(rng.normal(size=(1, 64, tiny_config.hidden_size)), jnp.bfloat16)
    exact = 1 / (1 + np.exp(-np.asarray(h, np.float64) @ np.asarray(router.weight[...], np.float64)))
    np.testing.assert_allclose(router(h)[0], exact, rtol=1e-5)


def test_group_limited_routing(tiny_config, rng):
    """With 4 groups of 2 experts and one allowed, all experts of a token come from the group with the best pair."""
    config = replace(tiny_config, {"moe": {"num_groups": 4, "top_k_groups": 1, "top_k": 2}})
    router = Router(scope(), config)
    h = jnp.asarray(rng.normal(size=(1, 20, config.hidden_size)), jnp.float32)
    scores, experts, _ = router(h)
    best = np.asarray(scores).reshape(20, 4, 2).sum(-1).argmax(-1)
    np.testing.assert_array_equal(np.asarray(experts)[0] // 2, np.stack([best, best], axis=1))


def test_counts_and_load_balance(tiny_config, rng):
    """Against a loop over tokens; padding (segment 0) counts in neither."""
    moe = MoE(scope(), tiny_config)
    moe.gate.e_score_correction_bias[...] = jnp.asarray(rng.normal(size=8), jnp.float32)
    h = jnp.asarray(rng.normal(size=(2, 7, tiny_config.hidden_size)), jnp.float32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0]])
    _, _, aux = moe(h, Context(segment_ids=segments), None)
    scores, experts, _ = (np.asarray(x) for x in moe.gate(h))
    counts, losses = np.zeros(8), []
    for row, real in ((0, 7), (1, 4)):
        counts += np.bincount(experts[row, :real].ravel(), minlength=8)
        p = scores[row, :real] / scores[row, :real].sum(-1, keepdims=True)
        unbiased = np.argsort(-scores[row, :real], axis=-1, kind="stable")[:, :3]
        losses.append(8 / (3 * real**2) * (p.sum(0) * np.bincount(unbiased.ravel(), minlength=8)).sum())
    np.testing.assert_array_equal(aux["expert_counts"], counts)
    np.testing.assert_allclose(aux["load_balance_loss"], np.mean(losses), rtol=1e-5)


def test_latent_experts_work_in_the_latent_width(tiny_config):
    latent = MoE(scope(), tiny_config)
    assert latent.experts.up_proj[...].shape == (8, 16, 24)
    assert latent.shared_experts.up_proj.weight[...].shape == (32, 40)
    assert latent.gate.weight[...].shape == (32, 8)
    plain = MoE(scope(), replace(tiny_config, {"moe": {"latent_size": 0}}))
    assert plain.experts.up_proj[...].shape == (8, 32, 24)
    assert not hasattr(plain, "fc1_latent_proj")


def test_without_normalised_weights(tiny_config, rng):
    config = dataclasses.replace(tiny_config, moe=dataclasses.replace(tiny_config.moe, normalize_weights=False))
    router = Router(scope(), config)
    scores, experts, weights = router(jnp.asarray(rng.normal(size=(1, 4, 32)), jnp.float32))
    chosen = jnp.take_along_axis(scores, experts, axis=-1)
    np.testing.assert_allclose(weights, chosen * config.moe.scaling_factor, rtol=1e-6)
