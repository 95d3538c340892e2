"""Experts on an axis of devices: exact whatever the routing, and what travels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.parallel import experts
from nemotron_jax.precision.quantized import random_bytes
from pallas_kernels import grouped_matmul
from tests.parallel.conftest import collectives, elements

E, K, L, F = 16, 3, 12, 10
AXES = (("experts", "latent", "expert_mlp"), ("experts", "expert_mlp", "latent"))


def apply(params, rows, sizes, draw):
    up, down = params
    return grouped_matmul(grouped_matmul(rows, up, sizes, activation="relu2"), down, sizes)


def routed(u, chosen, weights, up, down):
    return experts.routed(apply, u, chosen, weights, (up, down), AXES, E, jnp.float32)


def routing(name: str, tokens: int = 4) -> np.ndarray:
    """Chosen experts [8, tokens, K], different in each slot."""
    rng = np.random.default_rng(0)
    scores = rng.random((8, tokens, E))
    if name == "two_devices":  # every token chooses among four experts
        scores[..., 6:10] += 2
    if name == "some_devices_idle":
        scores[..., ::2] += 2
        scores[..., :8] -= 4
    return np.argsort(-scores, axis=-1)[..., :K].astype(np.int32)


def operands(name: str, tokens: int = 4):
    keys = jax.random.split(jax.random.key(0), 4)
    u, weights = jax.random.normal(keys[0], (8, tokens, L)), jax.random.uniform(keys[1], (8, tokens, K))
    up, down = jax.random.normal(keys[2], (E, L, F)), jax.random.normal(keys[3], (E, F, L))
    return u, jnp.asarray(routing(name, tokens)), weights, up, down


def value_and_gradients(u, chosen, weights, up, down):
    def loss(u, weights, up, down):
        y = routed(u, chosen, weights, up, down)
        return (y * jax.random.normal(jax.random.key(9), y.shape)).sum(), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(u, weights, up, down)
    return y, *gradients


@pytest.mark.parametrize("name", ["random", "two_devices", "some_devices_idle"])
@pytest.mark.parametrize("axes", [{"expert": 8}, {"expert": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}])
def test_no_token_is_dropped(name, axes, eight):
    """Also where all tokens go to two of the devices, in several rounds."""
    expected = value_and_gradients(*operands(name, tokens=16))
    with jax.set_mesh(eight(**axes)):
        got = jax.jit(value_and_gradients)(*operands(name, tokens=16))
    for a, b in zip(got, expected, strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_rounds_follow_the_load(eight):
    """One for a balanced load; as many as the longest run of rows needs for a skewed one."""

    def rounds(name: str) -> int:
        def of_device(chosen):
            counts = jnp.bincount(chosen.reshape(-1), length=E)
            return experts._plan(counts, chosen.size).rounds[None]

        chosen = routing(name, tokens=256)
        with jax.set_mesh(eight(expert=8)):
            run = experts.per_device(of_device, [("batch", None, None)], ("batch",))
            return int(jax.jit(run)(jnp.asarray(chosen)).max())

    assert rounds("random") == 1
    # A token's three experts are among four of two devices: up to two of three rows go to one of these, and 144 of
    # the 768 rows of a device fit in a round.
    assert 3 <= rounds("two_devices") <= 4


def test_only_vectors_of_the_latent_width_travel(eight):
    """What goes over the expert axis is L numbers a row; backward sends two vectors there in one message."""
    with jax.set_mesh(eight(expert=8)):
        forward = collectives(routed, *operands("random"))
        both = collectives(value_and_gradients, *operands("random"))
    room = 8 * 8  # rows of a round: 12 of a device over 8, times ROOM, in steps of 8
    plan = E  # how many rows for each expert
    assert elements(forward, "all-to-all") == sorted([plan, room * L, room * L])
    backward = [plan, room, room, 2 * room * L, room * L]
    assert elements(both, "all-to-all") in (
        sorted([plan, room * L, room * L, *backward]),
        sorted([room * L, room * L, *backward]),  # one plan for both
    )
    assert not elements(both, "all-gather")


def test_weights_cut_by_fsdp_travel_in_the_dtype_of_their_use(eight):
    """And their gradients are summed in float32."""

    def loss(up, down, u, chosen, weights):
        params = (up, down)
        in_bfloat16 = functools.partial(experts.routed, _apply_bfloat16, dtype=jnp.bfloat16)
        y = in_bfloat16(u, chosen, weights, params, axes=AXES, num_experts=E)
        return (y * y).sum()

    u, chosen, weights, up, down = operands("random")
    up, down = (jnp.concatenate([w, w], axis=axis)[..., :16] for w, axis in ((up, 1), (down, 2)))
    with jax.set_mesh(eight(fsdp=8)):
        args = (up[:, :16], down, jnp.concatenate([u, u], -1)[..., :16], chosen, weights)
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).as_text()
    gathered = [line for line in text.splitlines() if "all_gather" in line]
    assert len(gathered) == 2 and all("bf16" in line for line in gathered)
    assert len(re.findall(r"reduce_scatter.*?-> tensor<[\dx]+xf32>", text, re.DOTALL)) == 2


def _apply_bfloat16(params, rows, sizes, draw):
    return apply(params, rows.astype(jnp.bfloat16), sizes, draw).astype(rows.dtype)


@jax.custom_vjp
def _bytes_as_gradient(rows, draw):
    return rows


_bytes_as_gradient.defvjp(
    lambda rows, draw: (rows, draw),
    lambda draw, dy: (random_bytes(draw.seed, 1, draw.entry_M, dy.shape[1]).astype(dy.dtype), None),
)


@pytest.mark.parametrize("axes", [{"expert": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "expert": 2, "context": 2}])
@pytest.mark.parametrize("name", ["random", "two_devices"])
def test_random_bits_follow_the_token(name, axes, eight):
    """The gradient of a token is the sum of the bytes of its rows: the same whichever device sorted and held them."""
    u, chosen, weights, up, down = operands(name, tokens=16)

    def draw(params, rows, sizes, draw):
        return rows if draw is None else _bytes_as_gradient(rows, draw)

    @jax.jit
    def bytes_of(u, chosen):
        return experts.routed(draw, u, chosen, weights, (up, down), AXES, E, jnp.float32, jnp.uint32(5)).sum()

    gradient = jax.jit(jax.grad(bytes_of))
    expected = gradient(u, chosen)
    entries = np.arange(8 * 16 * K, dtype=np.uint32)
    own = np.asarray(random_bytes(jnp.uint32(5), 1, jnp.asarray(entries), L), np.float32).reshape(8, 16, K, L).sum(2)
    np.testing.assert_array_equal(expected, own)
    with jax.set_mesh(eight(**axes)):
        found = np.asarray(gradient(u, chosen))
    # Each device of `tensor` adds its part of the gradient, here the whole.
    np.testing.assert_array_equal(found, axes.get("tensor", 1) * expected)
