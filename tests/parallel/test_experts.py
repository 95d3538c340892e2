"""Experts on an axis of devices: exact whatever the routing, and what travels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.parallel import experts
from pallas_kernels import grouped_matmul
from tests.parallel.conftest import collectives, kinds

E, K, L, F = 16, 3, 12, 10
AXES = (("experts", "latent", "expert_mlp"), ("experts", "expert_mlp", "latent"))


def apply(params, rows, sizes):
    up, down = params
    return grouped_matmul(grouped_matmul(rows, up, sizes, activation="relu2"), down, sizes)


def routed(u, chosen, weights, up, down):
    return experts.routed(apply, u, chosen, weights, (up, down), AXES, E, jnp.float32)


def routing(name: str) -> np.ndarray:
    """Chosen experts [8, 4, K] of 32 tokens, different in each slot."""
    rng = np.random.default_rng(0)
    scores = rng.random((8, 4, E))
    if name == "one_device":  # every token chooses experts of one device
        scores[..., 6:10] += 2
    if name == "some_devices_idle":
        scores[..., ::2] += 2
        scores[..., :8] -= 4
    return np.argsort(-scores, axis=-1)[..., :K].astype(np.int32)


def operands(name: str):
    keys = jax.random.split(jax.random.key(0), 4)
    u, weights = jax.random.normal(keys[0], (8, 4, L)), jax.random.uniform(keys[1], (8, 4, K))
    up, down = jax.random.normal(keys[2], (E, L, F)), jax.random.normal(keys[3], (E, F, L))
    return u, jnp.asarray(routing(name)), weights, up, down


def value_and_gradients(u, chosen, weights, up, down):
    def loss(u, weights, up, down):
        y = routed(u, chosen, weights, up, down)
        return (y * jax.random.normal(jax.random.key(9), y.shape)).sum(), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(u, weights, up, down)
    return y, *gradients


@pytest.mark.parametrize("name", ["random", "one_device", "some_devices_idle"])
@pytest.mark.parametrize("axes", [{"expert": 8}, {"expert": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}])
def test_no_token_is_dropped(name, axes, eight):
    """Also where all tokens go to two experts of one device and the rounds are many."""
    expected = value_and_gradients(*operands(name))
    with jax.set_mesh(eight(**axes)):
        got = jax.jit(value_and_gradients)(*operands(name))
    for a, b in zip(got, expected, strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_rounds_follow_the_load(eight):
    """One for a balanced load, more for a skewed one, and never more than a run of rows needs."""

    def rounds(name: str) -> int:
        def of_device(chosen):
            counts = jnp.bincount(chosen.reshape(-1), length=E)
            return experts._plan(counts, chosen.size).rounds[None]

        with jax.set_mesh(eight(expert=8)):
            run = experts.per_device(of_device, [("batch", None, None)], ("batch",))
            return int(jax.jit(run)(jnp.asarray(np.tile(routing(name), (1, 16, 1)))).max())

    assert rounds("random") == 1
    assert rounds("one_device") == 4  # 192 rows of each device, 40 in a round... to one of two devices


def test_only_vectors_of_the_latent_width_travel(eight):
    """Bytes between devices are those of L numbers a row (the backward pass sends two vectors in one message)."""
    with jax.set_mesh(eight(expert=8)):
        forward = collectives(routed, *operands("random"))
        both = collectives(value_and_gradients, *operands("random"))
    room = 8 * 8  # rows: 12 of a device over 8 others, times ROOM, in steps of 8
    assert kinds(forward)["all-to-all"] == 3
    assert sum(np.prod(shape) for kind, shape in forward if kind == "all-to-all") == 2 * room * L + 8 * (E // 8 + 1)
    assert sorted(shape[-1] for kind, shape in both if kind == "all-to-all" and shape[0] == room) == [
        1,
        1,
        L,
        L,
        L,
        2 * L,
    ]
    assert not [shape for kind, shape in both if kind == "all-gather"]


def test_weights_cut_by_fsdp_travel_in_the_dtype_of_their_use(eight):
    with jax.set_mesh(eight(fsdp=8)):
        u, chosen, weights, up, down = operands("random")
        run = functools.partial(experts.routed, apply, axes=AXES, num_experts=E, dtype=jnp.bfloat16)
        text = jax.jit(lambda *a: run(a[0], chosen, weights, a[1:])).lower(u, up[:, :8], down[..., :8]).as_text()
    assert text.count("all_gather") == 2 and "xbf16" in text
