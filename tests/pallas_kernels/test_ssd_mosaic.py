"""The fused kernels against the reference, interpreted on the CPU: TMA, barriers and wgmma run, races are found."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch, ssd
from pallas_kernels.segments import run_ids
from pallas_kernels.ssd import Case, example_inputs, ssd_reference
from pallas_kernels.ssd_mosaic import ssd_mosaic

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
CASES = (
    Case("three_chunks_packed_state", 1, 300, 2, 64, 1, 128, 128, packed=True, initial_state=True),
    Case("other_sizes", 2, 100, 2, 80, 2, 48, 128),  # head dim and state padded, less than a chunk
    Case("strong_decay", 1, 140, 2, 64, 2, 128, 128, packed=True, initial_state=True, decay=8.0),
    Case("weak_decay", 1, 260, 2, 64, 1, 128, 128, initial_state=True, decay=0.001),  # much crosses whole chunks
)


def bfloat16_inputs(case):
    """(differentiable arguments by position, run numbers); x, B, C bfloat16."""
    (x, dt, A, B, C), kwargs = example_inputs(case)
    x, B, C = (z.astype(jnp.bfloat16) for z in (x, B, C))
    segment_ids = kwargs.get("segment_ids")
    state = kwargs.get("initial_state", jnp.zeros((case.batch, case.heads, case.head_dim, case.state_dim)))
    return (x, dt, A, B, C, kwargs["D"], state), None if segment_ids is None else run_ids(segment_ids)


def relative_error(got, want):
    """Relative Frobenius; where the truth is (next to) nothing, the absolute one."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.maximum(jnp.linalg.norm(want), 1e-3))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_every_gradient(case, interpret):
    arguments, run = bfloat16_inputs(case)

    def outputs_and_pull(function, arguments, **kwargs):
        return jax.vjp(lambda *a: function(*a, run, chunk_size=128, **kwargs), *arguments)

    got, pull = outputs_and_pull(ssd_mosaic, arguments, interpret=interpret)
    want, reference_pull = outputs_and_pull(ssd_reference, [z.astype(jnp.float32) for z in arguments])
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    assert relative_error(got[0], want[0]) < 5e-3
    assert relative_error(got[1], want[1]) < 5e-3

    keys = jax.random.split(jax.random.key(1))
    dy = jax.random.normal(keys[0], want[0].shape).astype(jnp.bfloat16)
    d_state = jax.random.normal(keys[1], want[1].shape)
    grads, reference_grads = pull((dy, d_state)), reference_pull((dy.astype(jnp.float32), d_state))
    for name, argument, grad, reference_grad in zip(NAMES, arguments, grads, reference_grads, strict=True):
        assert grad.dtype == argument.dtype
        assert relative_error(grad, reference_grad) < (1e-2 if name in ("dt", "A", "initial_state") else 5e-3), name


def test_a_token_without_a_step_changes_nothing_and_has_a_gradient(interpret):
    """dt = 0 is how padding is written; its own gradient is that of the recurrence, which the kernel divides by dt."""
    (x, dt, A, B, C, D, state), _ = bfloat16_inputs(Case("padding", 1, 20, 1, 64, 1, 128, 128))
    dt = dt.at[:, 15:].set(0)
    loss = functools.partial(lambda function, dt, **kw: function(x, dt, A, B, C, D, state, None, chunk_size=128, **kw))
    (y, final), pull = jax.vjp(lambda dt: loss(ssd_mosaic, dt, interpret=interpret), dt)
    (_, want), reference_pull = jax.vjp(lambda dt: loss(ssd_reference, dt), dt)
    assert relative_error(final, want) < 5e-3
    cotangents = jnp.ones_like(y), jnp.ones_like(final)
    assert relative_error(pull(cotangents)[0], reference_pull(cotangents)[0]) < 1e-2


def test_operands_that_the_kernels_do_not_take():
    (x, dt, A, B, C, *_), _ = bfloat16_inputs(CASES[0])
    with dispatch.compiling_for("sm_90a"):
        with pytest.raises(ValueError, match="x, B and C must be bfloat16, got float32, bfloat16 and bfloat16"):
            ssd(x.astype(jnp.float32), dt, A, B, C, impl="mosaic")
        wide = jnp.tile(B, 2)
        with pytest.raises(ValueError, match="the state may have at most 128 rows, got 256"):
            ssd(x, dt, A, wide, wide, impl="mosaic")
        jax.eval_shape(functools.partial(ssd, impl="mosaic"), x, dt, A, B, C)
