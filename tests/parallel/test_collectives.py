"""What each block sends, counted in the compiled program of its forward and backward pass."""

import dataclasses
import importlib.util
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nemotron_jax.config import MambaConfig
from nemotron_jax.model import logprobs
from nemotron_jax.model.context import Context
from nemotron_jax.model.layer import REMAT, Layer
from nemotron_jax.model.linear import Embedding, Scope
from nemotron_jax.parallel.mesh import batch_sharding, make_mesh, shardings
from nemotron_jax.precision.recipe import RECIPES
from nemotron_jax.run_config import ParallelConfig
from pallas_kernels import aot
from tests.parallel.conftest import collectives, elements, kinds
from tests.tiny import TINY

B, T, D = 8, 56, TINY.hidden_size
CONFIG = dataclasses.replace(TINY, mamba=MambaConfig(num_heads=8, head_dim=4, num_groups=8, state_size=4, chunk_size=8))
SCOPE = Scope(jax.random.key(0), RECIPES["float32"])


def of_block(mesh, make, call):
    """Collectives of the gradients of sum(call(block, h)^2), those of the weights cut as the weights are."""
    graphdef, variables = nnx.split(nnx.eval_shape(make))
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        variables,
        shardings(variables, mesh),
    )
    h = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=batch_sharding(mesh))

    def loss(variables, h):
        return jnp.square(call(nnx.merge(graphdef, variables), h)).sum()

    def gradients(variables, h):
        of_weights, of_h = jax.grad(loss, argnums=(0, 1), allow_int=True)(variables, h)
        return jax.lax.with_sharding_constraint(of_weights, shardings(of_weights, mesh)), of_h

    with jax.set_mesh(mesh):
        return collectives(gradients, placed, h)


def of_layer(letter, mesh, remat="none"):
    def call(layer, h):
        run = REMAT[remat](lambda h: layer(h, Context(segment_ids=jnp.ones((B, T), jnp.int32)), None)[0])
        return run(h)

    return of_block(mesh, lambda: Layer(SCOPE, letter, CONFIG), call)


@pytest.mark.parametrize("letter", "ME*-")
def test_data_sends_gradients_alone(letter, eight):
    assert kinds(of_layer(letter, eight(data=8))).keys() == {"all-reduce"}


@pytest.mark.parametrize("letter", "M*-")
def test_tensor_sums_once_each_way(letter, eight):
    """One sum of [B, T, D] after the mixer, one before it on the way back, and nothing gathered.

    On the way back each projection's part of dh is summed; XLA puts the sums into one message. Eight devices have
    less than a key/value head each: what they read is gathered.
    """
    found = of_layer(letter, eight(tensor=8))
    allowed = {"all-reduce"} | ({"all-gather", "collective-permute", "all-to-all"} if letter == "*" else set())
    assert kinds(found).keys() <= allowed, found
    whole = [size for size in elements(found, "all-reduce") if size >= B * T * D]
    assert 2 <= len(whole) <= 3, found


def test_context_sends_states_and_halos(eight):
    """Of a Mamba block: 3 tokens to the next device, [B, H, P, N] to all; nothing that grows with the sequence."""
    found = of_layer("M", eight(context=8))
    assert max(elements(found, "collective-permute")) == B * 3 * CONFIG.mamba.conv_size
    assert len(elements(found, "collective-permute")) <= 3  # x, B and C together; their ids; back
    state = B * CONFIG.mamba.num_heads * CONFIG.mamba.head_dim * CONFIG.mamba.state_size
    assert max(elements(found, "all-gather")) == 8 * state
    assert elements(found, "reduce-scatter") == sorted([B * CONFIG.mamba.num_heads, state])
    assert "all-to-all" not in kinds(found)


def test_context_gathers_keys_and_values(eight):
    """Twice each, the second time for the backward pass; their gradients are summed and scattered."""
    found = of_layer("*", eight(context=8))
    keys = B * T * CONFIG.attention.num_kv_heads * CONFIG.attention.head_dim
    assert elements(found, "all-gather").count(keys) == 4
    assert elements(found, "reduce-scatter") == [keys // 8, keys // 8]


@pytest.mark.parametrize("remat", REMAT)
def test_experts_send_rows_and_gradients(remat, eight):
    """There and back; there with the gradients, and back; beside them a plan, weights and their gradients."""
    found = of_layer("E", eight(expert=8), remat)
    assert kinds(found).keys() == {"all-reduce", "all-to-all"}
    assert 6 <= kinds(found)["all-to-all"] <= 8
    assert sum(size >= 1000 for size in elements(found, "all-to-all")) == 4, found


SHARE_WEIGHTS = [{"fsdp": 8}, {"context": 8}, {"fsdp": 2, "context": 4}]  # eight devices that gather each weight
GATHERED = {  # in_proj as one
    "M": [(32, 136), (32, 32)],
    "E": [(32, 8), (32, 16), (32, 40), (16, 32), (40, 32), (8, 16, 24), (8, 24, 16)],
    "*": [(32, 32), (32, 16), (32, 16), (32, 32)],
    "-": [(32, 48), (48, 32)],
}


@pytest.mark.parametrize("letter", "ME*-")
@pytest.mark.parametrize("axes", SHARE_WEIGHTS)
def test_weights_are_gathered_not_activations(letter, axes, eight):
    """Each once, over all devices at once; beside them what the tests above allow parts of a sequence."""
    mesh = eight(**axes)
    found = of_layer(letter, mesh)
    gathered = Counter(shape for kind, shapes in found if kind == "all-gather" for shape in shapes)
    assert not Counter(GATHERED[letter]) - gathered, found
    others = (gathered - Counter(GATHERED[letter])).total()
    assert others == (0 if mesh.shape["context"] == 1 else {"M": 3, "*": 5}.get(letter, 0)), found
    assert "all-to-all" not in kinds(found), found
    if mesh.shape["context"] == 1:
        assert "collective-permute" not in kinds(found), found


@pytest.mark.parametrize("letter", "ME*-")
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the compiler for GPUs")
def test_gpus_reduce_gradients_to_the_part_that_each_keeps(letter):
    """XLA:CPU sums dense weights' gradients as a whole and cuts them afterwards; XLA:GPU does both in one."""
    mesh = make_mesh(ParallelConfig(data=1, fsdp=2, context=4), aot.devices("h200", 8))
    with aot.compiling_for("h200"):
        found = of_layer(letter, mesh)
    parts = Counter(math.prod(shape) for kind, shapes in found if kind == "reduce-scatter" for shape in shapes)
    assert not Counter(math.prod(shape) // 8 for shape in GATHERED[letter]) - parts, found
    assert sum(elements(found, "all-reduce")) < 2 * D * D, found  # vectors and taps


@pytest.mark.parametrize("axes", [{"tensor": 8}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_logits_are_not_gathered(axes, eight):
    """Over parts of the vocabulary: a maximum, and two sums in one message, of [B, T] numbers."""
    mesh = eight(**axes)
    vocab = 4096
    hidden = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=batch_sharding(mesh))
    weight = jax.ShapeDtypeStruct((D, vocab), jnp.float32)
    rows = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=batch_sharding(mesh))
    weights = jax.ShapeDtypeStruct((B, T), jnp.float32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = collectives(logprobs.weighted_nll, hidden, weight, rows, weights)
    sums = [size for size in elements(found, "all-reduce") if size > 1]
    tokens = B * T // (mesh.size // axes["tensor"])
    assert sums == [tokens, 2 * tokens], found
    assert elements(found, "all-gather") in ([], [D * vocab // axes["tensor"]]), found


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}, {"context": 8}])
def test_the_table_is_not_gathered(axes, eight):
    """Looking tokens up sends rows, not the table."""
    mesh = eight(**axes)
    found = of_block(
        mesh,
        lambda: Embedding(SCOPE, 4096, D, 1.0),
        lambda table, h: table(jnp.zeros((B, T), jnp.int32)) * h,
    )
    rows = B * T * D * axes.get("tensor", 1) // 8
    assert max(size for kind in kinds(found) if kind != "all-reduce" for size in elements(found, kind)) == rows
    # The gradient of a part of the table, summed where several devices have it: nowhere here.
    assert max(elements(found, "all-reduce"), default=0) <= rows
