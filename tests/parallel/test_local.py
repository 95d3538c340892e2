"""Functions of a device's part of its operands."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.parallel.local import after, gathered, index, per_device, scattered, together
from nemotron_jax.parallel.mesh import constrain, mesh_axes
from nemotron_jax.precision.recipe import RECIPES
from tests.parallel.conftest import collectives
from tests.tiny import TINY


def shapes_seen(mesh, axes, *shapes, **kwargs):
    seen = []

    def function(*parts):
        seen.extend(None if part is None else part.shape for part in parts)
        return parts[0]

    arrays = [None if shape is None else jnp.zeros(shape) for shape in shapes]
    with jax.set_mesh(mesh):
        out = jax.eval_shape(per_device(function, axes, axes[0], **kwargs), *arrays)
    assert out.shape == shapes[0]
    return seen


def test_each_device_sees_its_part(eight):
    mesh = eight(fsdp=2, context=2, tensor=2)
    axes = [("batch", "time", "heads", None), ("heads",), ("batch", "time")]
    assert shapes_seen(mesh, axes, (4, 6, 2, 5), (2,), (4, 6)) == [(2, 3, 1, 5), (1,), (2, 3)]
    assert shapes_seen(mesh, axes, (4, 6, 2, 5), (2,), None) == [(2, 3, 1, 5), (1,), None]
    assert shapes_seen(mesh, axes, (4, 6, 2, 5), (2,), (4, 6), whole=("time",)) == [(2, 6, 1, 5), (1,), (2, 6)]


def test_what_does_not_divide_is_whole(eight):
    """In every operand that has the axis."""
    mesh = eight(fsdp=2, context=2, tensor=2)
    axes = [("batch", "time", "heads"), ("batch", "heads")]
    assert shapes_seen(mesh, axes, (3, 6, 4), (3, 4)) == [(3, 3, 2), (3, 2)]
    assert shapes_seen(mesh, axes, (4, 6, 4), (4, 5)) == [(2, 3, 4), (2, 5)]
    assert shapes_seen(mesh, axes, (4, 5, 4), (4, 4)) == [(2, 5, 2), (2, 2)]


def test_nothing_happens_without_a_mesh():
    jaxpr = jax.make_jaxpr(per_device(jnp.sin, [("batch",)], ("batch",)))(jnp.zeros(8))
    assert "shard_map" not in str(jaxpr)


def test_gradients_of_operands_that_devices_share_are_summed(eight):
    """Over the axes that have more than one device, and no others."""
    x, w = jnp.arange(32.0).reshape(8, 4), jnp.arange(4.0)

    def loss(w, x):
        return jnp.square(per_device(lambda w, x: x * w, [(None,), ("batch", None)], ("batch", None))(w, x)).sum()

    expected = jax.grad(loss)(w, x)
    with jax.set_mesh(eight(data=4, fsdp=2)):
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(w, x), expected, rtol=1e-6)
        sharded = jax.device_put(x, jax.sharding.NamedSharding(eight(data=4, fsdp=2), jax.P(("data", "fsdp"))))
        assert len(collectives(jax.grad(loss), w, sharded)) == 1


def test_gathered_and_scattered_are_transposes(eight):
    axes, shape = ("vocab", "embed"), (4, 16)
    weight = jax.random.normal(jax.random.key(0), shape)

    def of_device(part, factor):
        whole = gathered(part, axes, shape, jnp.bfloat16)
        assert whole.dtype == jnp.bfloat16 and whole.shape == (2, 16)
        _, pull = jax.vjp(lambda part: gathered(part, axes, shape, jnp.bfloat16), part)
        d = factor[0].astype(jnp.bfloat16) * jnp.ones_like(whole)
        (of_gathered,) = pull(d)
        assert of_gathered.dtype == jnp.float32
        return whole[None], of_gathered, scattered(d.astype(jnp.float32), axes, part, shape)

    with jax.set_mesh(eight(fsdp=4, tensor=2)):
        run = per_device(of_device, [axes, ("batch",)], (("batch", "vocab", None), axes, axes))
        wholes, a, b = jax.jit(run)(weight, jnp.arange(4.0))
    for whole in wholes:
        np.testing.assert_array_equal(whole, weight.astype(jnp.bfloat16))
    np.testing.assert_array_equal(a, np.full(shape, 0 + 1 + 2 + 3))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("experts", "part"), [(8, (1, 16, 4)), (6, (3, 4, 4))])
def test_experts_are_cut_whole_or_else_along_their_width(eight, experts, part):
    """And are made whole again, but for those of other devices of "expert", with the sum as gradient."""
    axes, shape = ("expert_weights", "embed", "expert_mlp"), (experts, 16, 4)
    weight = jnp.arange(experts * 64.0).reshape(shape)

    def of_device(w):
        assert w.shape == part
        mine, vjp = jax.vjp(lambda w: gathered(w, axes, shape, jnp.float32), w)
        return mine[None], vjp(jnp.ones_like(mine))[0]

    cut = ("expert_weights" if experts == 8 else "experts", *axes[1:])  # results have no shape to go by
    with jax.set_mesh(eight(fsdp=2, expert=2, context=2)):
        wholes, gradient = jax.jit(per_device(of_device, [axes], ((None, "experts", None, None), cut)))(weight)
    np.testing.assert_array_equal(wholes[0], weight)
    np.testing.assert_array_equal(gradient, np.full(shape, 4))


def test_gradients_of_two_uses_are_cut_one_by_one(eight):
    """Each behind a barrier, which keeps XLA from adding them up whole."""
    axes, shape = ("embed", None), (16, 4)

    def of_device(w, x):
        return sum((gathered(w, axes, shape, jnp.float32) @ y).sum() for y in (x, x + 1)).reshape(1)

    def loss(w, x):
        return per_device(of_device, [axes, (None,)], ("batch",))(w, x).sum()

    with jax.set_mesh(eight(fsdp=8)):
        text = jax.jit(jax.grad(loss)).lower(jnp.ones(shape), jnp.arange(4.0)).as_text()
    assert text.count("reduce_scatter") == text.count("optimization_barrier") == 2


def test_uses_of_the_head_give_back_its_gradient_before_they_go_backward(eight):
    """Where there are several, those of MTP: tied to the gradient of the hidden states."""

    def barriers(config):
        graphdef, state = nnx.split(Nemotron(config, RECIPES["float32"], jax.random.key(0)))
        targets, weights = jnp.zeros((8, 16), jnp.int32), jnp.ones((8, 16))

        def loss(state, hidden):
            return nnx.merge(graphdef, state).weighted_nll(hidden, targets, weights)

        hidden = jnp.ones((8, 16, config.hidden_size))
        with jax.set_mesh(eight(data=8)):
            return jax.jit(jax.grad(loss, 1)).lower(state, hidden).as_text().count("optimization_barrier")

    assert TINY.mtp is not None
    assert barriers(TINY) == barriers(dataclasses.replace(TINY, mtp=None)) + 1


def test_gradients_that_are_there_together(eight):
    """The identity and its gradient; tied on a mesh alone, and integers and vectors not at all."""

    def loss(x, w):
        x, tied = together(x, {"w": w, "counts": jnp.arange(3)})
        return (x * tied["w"]).sum() + tied["counts"].sum()

    x, w = jnp.arange(3.0), jnp.array([[2.0, 5.0, 7.0]])

    def gradient(*arguments):
        return jax.grad(loss, (0, 1))(*arguments)

    assert "optimization_barrier" not in jax.jit(gradient).lower(x, w).as_text()
    with jax.set_mesh(eight(fsdp=8)):
        assert jax.jit(gradient).lower(x, w).as_text().count("optimization_barrier") == 1
        assert "optimization_barrier" not in jax.jit(gradient).lower(x, w[0]).as_text()
        dx, dw = jax.jit(gradient)(x, w)
    np.testing.assert_array_equal(dx, w[0])
    np.testing.assert_array_equal(dw, x[None])


def test_weights_that_are_there_later(eight):
    """The identity, on a mesh behind what they wait for; nothing of it in the backward pass."""

    def loss(x, w):
        return (x * after(x, {"w": w})["w"]).sum()

    x, w = jnp.arange(3.0), jnp.array([[2.0, 5.0, 7.0]])
    assert "optimization_barrier" not in jax.jit(loss).lower(x, w).as_text()
    with jax.set_mesh(eight(fsdp=8)):
        assert jax.jit(loss).lower(x, w).as_text().count("optimization_barrier") == 1
        gradient = jax.jit(jax.grad(loss, (0, 1)))
        assert gradient.lower(x, w).as_text().count("optimization_barrier") == 1
        dx, dw = gradient(x, w)
    np.testing.assert_array_equal(dx, w[0])
    np.testing.assert_array_equal(dw, x[None])


def test_activations_keep_their_rows_together(eight):
    """Also where what makes them would have their columns so."""

    def layout(function):
        x = jnp.zeros((8, 4, 16))
        with jax.set_mesh(eight(fsdp=8)):
            return jax.jit(function).lower(x).as_text().count("LayoutConstraint")

    assert layout(lambda x: constrain(x + 1) * 2) == 1
    assert layout(lambda x: x + 1) == 0


def test_index_counts_along_all_axes_of_a_logical_one(eight):
    def of_device(x):
        assert lax.axis_size(mesh_axes("batch")) == 8
        return x * 0 + index("batch")

    with jax.set_mesh(eight(data=2, fsdp=2, expert=2)):
        got = jax.jit(per_device(of_device, [("batch",)], ("batch",)))(jnp.zeros(8, jnp.int32))
    np.testing.assert_array_equal(got, np.arange(8))
