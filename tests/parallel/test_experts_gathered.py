"""Experts on few devices: all tokens go to each of them, and sums come back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.parallel import experts
from nemotron_jax.parallel.experts_gathered import rows_of_a_round
from pallas_kernels import grouped_matmul
from tests.parallel.conftest import collectives, elements, kinds

E, K, L, F, B, T = 16, 4, 12, 10, 8, 8
AXES = (("experts", "latent", "expert_mlp"), ("experts", "expert_mlp", "latent"))


def apply(params, rows, sizes, draw):
    up, down = params
    return grouped_matmul(grouped_matmul(rows, up, sizes, activation="relu2"), down, sizes)


def operands(favourites=()):
    """Tokens, their experts (of `favourites` where K of these exist), and weights."""
    keys = jax.random.split(jax.random.key(0), 4)
    scores = np.random.default_rng(0).random((B, T, E))
    scores[..., list(favourites)] += 2
    chosen = jnp.asarray(np.argsort(-scores, axis=-1)[..., :K], jnp.int32)
    u, weights = jax.random.normal(keys[0], (B, T, L)), jax.random.uniform(keys[1], (B, T, K))
    return u, chosen, weights, jax.random.normal(keys[2], (E, L, F)), jax.random.normal(keys[3], (E, F, L))


def value_and_gradients(apply, u, chosen, weights, up, down):
    def loss(u, weights, up, down):
        y = experts.routed(apply, u, chosen, weights, (up, down), AXES, E, jnp.float32)
        return (y * jax.random.normal(jax.random.key(9), y.shape)).sum(), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(u, weights, up, down)
    return y, *gradients


@functools.cache
def of_one_device(favourites):
    return jax.jit(functools.partial(value_and_gradients, apply))(*operands(favourites))


@pytest.mark.parametrize(
    ("axes", "favourites"),
    [
        ({"expert": 2, "data": 4}, (4, 5, 6, 7)),
        ({"expert": 4, "tensor": 2}, (4, 5, 6, 7)),
        ({"fsdp": 2, "expert": 4}, ()),
        pytest.param({"fsdp": 2, "expert": 4}, (4, 5, 6, 7), marks=pytest.mark.slow),
        pytest.param({"expert": 2, "data": 4}, (), marks=pytest.mark.slow),
        pytest.param({"expert": 4, "tensor": 2}, (), marks=pytest.mark.slow),
    ],
)
def test_no_token_is_dropped(favourites, axes, eight):
    """Also where all tokens choose the experts of one device, more than two rounds of four devices hold."""
    expected = of_one_device(favourites)
    with jax.set_mesh(eight(**axes)):
        got = jax.jit(functools.partial(value_and_gradients, apply))(*operands(favourites))
    for a, b in zip(got, expected, strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_rows_of_a_round():
    assert rows_of_a_round(tokens=64, slots=4, experts=8, devices=2) == (256, 1)  # two devices: always one round
    assert rows_of_a_round(tokens=64, slots=4, experts=4, devices=4) == (96, 3)
    assert rows_of_a_round(tokens=64, slots=4, experts=1, devices=4) == (64, 1)  # at most one of a token's is here
    quota, rounds = rows_of_a_round(tokens=100, slots=22, experts=64, devices=8)
    assert quota % 8 == 0 and quota * rounds >= 2200


def test_rows_that_are_not_here_do_not_matter(eight):
    """Numbers in rows behind those of the experts, such as a kernel may leave, reach no token and no gradient."""

    def careless(params, rows, sizes, draw):
        y = apply(params, rows, sizes, draw)
        return jnp.where(jnp.arange(len(y))[:, None] < sizes.sum(), y, jnp.nan)

    expected = of_one_device((4, 5, 6, 7))
    with jax.set_mesh(eight(expert=4, data=2)):
        got = jax.jit(functools.partial(value_and_gradients, careless))(*operands((4, 5, 6, 7)))
    for a, b in zip(got, expected, strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_only_vectors_of_the_latent_width_travel(eight):
    """One of each token to each device, and back; the same for gradients. No row of an expert."""
    with jax.set_mesh(eight(expert=4, fsdp=2)):
        args = operands()
        forward = collectives(lambda *args: value_and_gradients(apply, *args)[0], *args)
        both = collectives(functools.partial(value_and_gradients, apply), *args)
    tokens = B * T // 2  # of the four devices that share experts
    of_weights = E // 4 * L * F
    assert elements(forward, "all-gather") == sorted([tokens * L, tokens * K, tokens * K, of_weights, of_weights])
    assert elements(forward, "reduce-scatter") == [tokens // 4 * L]
    gathered = [size for size in elements(both, "all-gather") if size != of_weights]
    assert gathered == sorted([tokens * L, tokens * L, tokens * K, tokens * K])
    scattered = [size for size in elements(both, "reduce-scatter") if size != of_weights // 2]
    assert scattered == sorted([tokens // 4 * L, tokens // 4 * L, tokens // 4 * K])
    assert "all-to-all" not in kinds(both)
