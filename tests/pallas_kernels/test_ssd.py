"""The chunked recurrence against the recurrence token by token, in float64."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ssd
from pallas_kernels.ssd import CASES, example_inputs, ssd_sequential, ssd_step


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def inputs(case, dtype=jnp.float64):
    """(floats by name, the rest by name) for a case; every float input is present."""
    (x, dt, A, B, C), kwargs = example_inputs(case, 0, dtype)
    floats = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": kwargs.pop("D")}
    if "initial_state" in kwargs:
        floats["initial_state"] = kwargs.pop("initial_state")
    return floats, kwargs


@partial(jax.jit, static_argnames="chunk_size")
def sequential(floats, segment_ids=None, chunk_size=None):
    return ssd_sequential(**floats, segment_ids=segment_ids)


@partial(jax.jit, static_argnames="chunk_size")
def chunked(floats, segment_ids=None, chunk_size=16):
    return ssd(**floats, segment_ids=segment_ids, chunk_size=chunk_size, return_final_state=True)


def relative_error(got, want):
    return float(jnp.abs(got - want).max() / jnp.maximum(jnp.abs(want).max(), 1e-30))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_every_gradient(case):
    floats, kwargs = inputs(case)

    def value_and_grads(function):
        def loss(floats):
            y, state = function(floats, **kwargs)
            return jnp.sin(3 * y).sum() + jnp.sin(state).sum(), (y, state)

        (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
        return {"y": outputs[0], "state": outputs[1], **{f"d_{name}": grad for name, grad in grads.items()}}

    got, want = value_and_grads(chunked), value_and_grads(sequential)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == jnp.float64
        assert relative_error(got[name], want[name]) < 1e-11, name


def test_a_chunk_may_decay_to_nothing_in_float32():
    """dt A sums to about -4000 in a chunk, where exp(cum) * exp(-cum) is 0 * inf; gradients must stay finite."""
    case = next(case for case in CASES if case.name == "strong_decay")
    floats, kwargs = inputs(case, jnp.float32)
    floats["dt"] = 3 * floats["dt"]
    want, _ = sequential({name: z.astype(jnp.float64) for name, z in floats.items()}, **kwargs)
    got, state = chunked(floats, **kwargs)
    assert got.dtype == state.dtype == jnp.float32
    assert relative_error(got, want) < 1e-5
    grads = jax.jit(jax.grad(lambda floats: (chunked(floats, **kwargs)[0] ** 2).sum()))(floats)
    assert all(bool(jnp.isfinite(grad).all()) for grad in jax.tree.leaves(grads))


def test_bfloat16_inputs_are_computed_in_float32():
    case = next(case for case in CASES if case.name == "packed_state")
    floats, kwargs = inputs(case, jnp.float32)
    rounded = {name: z.astype(jnp.bfloat16) if name in "xBC" else z for name, z in floats.items()}
    y, state = chunked(rounded, **kwargs)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    want, want_state = sequential({name: z.astype(jnp.float64) for name, z in rounded.items()}, **kwargs)
    assert relative_error(state, want_state) < 1e-5  # only y is rounded to bfloat16 (8 bits)
    assert relative_error(y.astype(jnp.float32), want) < 2**-8


def test_each_document_gets_what_it_gets_alone():
    case = next(case for case in CASES if case.name == "packed")
    floats, kwargs = inputs(case)
    packed, _ = chunked(floats, **kwargs)
    ids = np.asarray(kwargs["segment_ids"][0])
    borders = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1), len(ids)]
    assert len(borders) > 5 and len(set(ids)) < len(borders) - 1  # an id comes back
    for start, stop in pairwise(borders):
        alone = {name: z[:1, start:stop] if z.ndim > 2 else z for name, z in floats.items()}
        y, _ = chunked(alone, chunk_size=case.chunk_size)
        np.testing.assert_allclose(y[0], packed[0, start:stop], rtol=1e-10, atol=1e-10)


def test_final_state_continues_the_row():
    case = next(case for case in CASES if case.name == "packed")
    floats, kwargs = inputs(case)
    whole, last = chunked(floats, **kwargs)
    cut = 21  # inside a document
    ids = kwargs["segment_ids"]
    first = {name: z[:, :cut] if z.ndim > 2 else z for name, z in floats.items()}
    rest = {name: z[:, cut:] if z.ndim > 2 else z for name, z in floats.items()}
    y_first, state = chunked(first, segment_ids=ids[:, :cut], chunk_size=16)
    y_rest, state = chunked({**rest, "initial_state": state}, segment_ids=ids[:, cut:], chunk_size=16)
    np.testing.assert_allclose(jnp.concatenate([y_first, y_rest], axis=1), whole, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state, last, rtol=1e-10, atol=1e-10)


def test_padding_with_dt_zero_leaves_the_state_alone():
    floats, _ = inputs(CASES[1])
    floats["dt"] = floats["dt"].at[:, 40:].set(0)
    _, state = chunked(floats, chunk_size=16)
    _, short = chunked({name: z[:, :40] if z.ndim > 2 else z for name, z in floats.items()}, chunk_size=16)
    np.testing.assert_allclose(state, short, rtol=1e-12)


def test_step_is_one_token_of_the_sequence():
    floats, _ = inputs(CASES[1])
    floats = {name: z[:, :5] if z.ndim > 2 else z for name, z in floats.items()}
    state = jnp.ones((2, 4, 5, 7))
    want, want_state = chunked({**floats, "initial_state": state}, chunk_size=2)
    step = jax.jit(ssd_step)
    for t in range(5):
        at_t = {name: z[:, t] if z.ndim > 2 else z for name, z in floats.items()}
        y, state = step(state, *(at_t[name] for name in ("x", "dt", "A", "B", "C", "D")))
        np.testing.assert_allclose(y, want[:, t], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state, want_state, rtol=1e-10, atol=1e-10)


def test_step_keeps_the_type_of_the_state():
    floats, _ = inputs(CASES[1], jnp.bfloat16)
    at_0 = {name: z[:, 0] if z.ndim > 2 else z for name, z in floats.items()}
    y, state = jax.jit(ssd_step)(
        jnp.zeros((2, 4, 5, 7), jnp.float16), *(at_0[name] for name in ("x", "dt", "A", "B", "C", "D"))
    )
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": (2, 59, 3)}, r"ssd: dt must have shape \[B, T, H\] = \[2, 59, 4\], got \[2, 59, 3\]"),
        ({"A": (5,)}, r"ssd: A must have shape \[H\] = \[4\], got \[5\]"),
        ({"C": (2, 59, 2, 8)}, "ssd: C must have shape"),
        ({"D": (1,)}, "ssd: D must have shape"),
        ({"initial_state": (2, 4, 7, 5)}, r"initial_state must have shape \[B, H, P, N\] = \[2, 4, 5, 7\]"),
        ({"B": (2, 59, 3, 7), "C": (2, 59, 3, 7)}, r"heads of x \(4\) must be a multiple of the groups .* \(3\)"),
    ],
)
def test_wrong_shapes(change, message):
    floats, _ = inputs(CASES[1])
    floats.update({name: jnp.ones(shape) for name, shape in change.items()})
    with pytest.raises(ValueError, match=message):
        ssd(**floats)


def test_wrong_chunk_size_and_segments():
    floats, _ = inputs(CASES[1])
    with pytest.raises(ValueError, match="chunk_size and T must be at least 1, got chunk_size=0"):
        ssd(**floats, chunk_size=0)
    with pytest.raises(ValueError, match="segment_ids must have shape"):
        ssd(**floats, segment_ids=jnp.zeros((2, 58), jnp.int32))
