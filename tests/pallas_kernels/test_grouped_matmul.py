"""Every portable implementation of the grouped product against a loop over the groups, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.dispatch import OPS
from pallas_kernels.grouped_matmul import CASES, ROW_BLOCK, example_inputs

# The Hopper kernels take bfloat16: test_grouped_matmul_mosaic.py.
each_portable = pytest.mark.parametrize("impl", [impl for impl in OPS["grouped_matmul"] if impl != "mosaic"])


def loop(lhs, rhs, group_sizes, activation):
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    start = 0
    for weight, size in zip(rhs, np.asarray(group_sizes), strict=True):
        out[start : start + size] = lhs[start : start + size] @ weight
        start += size
    return np.maximum(out, 0) ** 2 if activation == "relu2" else out


def loop_grads(lhs, rhs, group_sizes, activation, d_out):
    lhs, rhs, d_out = (np.asarray(z, np.float64) for z in (lhs, rhs, d_out))
    if activation == "relu2":
        d_out = 2 * np.maximum(loop(lhs, rhs, group_sizes, None), 0) * d_out
    d_lhs, d_rhs = np.zeros_like(lhs), np.zeros_like(rhs)
    start = 0
    for i, size in enumerate(np.asarray(group_sizes)):
        rows = slice(start, start + size)
        d_lhs[rows], d_rhs[i] = d_out[rows] @ rhs[i].T, lhs[rows].T @ d_out[rows]
        start += size
    return d_lhs, d_rhs


@each_portable
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case, impl):
    (lhs, rhs, sizes), kwargs = example_inputs(case)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal((case.rows, case.outputs)), jnp.float32)
    out, vjp = jax.vjp(jax.jit(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, **kwargs, impl=impl)), lhs, rhs)
    wanted = loop(lhs, rhs, sizes, **kwargs), *loop_grads(lhs, rhs, sizes, d_out=d_out, **kwargs)
    for got, want in zip((out, *vjp(d_out)), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())


@each_portable
def test_random_sizes_without_recompiling(impl):
    groups, rows = 7, 3 * ROW_BLOCK + 5
    function = jax.jit(lambda *args: grouped_matmul(*args, impl=impl))
    random = np.random.default_rng(0)
    lhs, rhs = (random.standard_normal(shape).astype(np.float32) for shape in ((rows, 3), (groups, 3, 2)))
    for _ in range(20):
        total = random.integers(rows + 1)
        share = random.dirichlet(np.full(groups, 0.3))
        sizes = jnp.asarray(random.multinomial(total, share), jnp.int32)
        np.testing.assert_allclose(function(lhs, rhs, sizes), loop(lhs, rhs, sizes, None), rtol=1e-5, atol=1e-5)
    assert function._cache_size() == 1


def test_rows_past_the_sum_may_hold_anything():
    """Under expert parallelism the tail of a buffer is not written."""
    case = next(case for case in CASES if case.name == "rows_past_the_sum")
    (lhs, rhs, sizes), _ = example_inputs(case)
    total = sum(case.group_sizes)
    function = jax.jit(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes))
    want, vjp = jax.vjp(function, lhs, rhs)
    want_lhs, want_rhs = vjp(jnp.ones_like(want))
    got, vjp = jax.vjp(function, lhs.at[total:].set(jnp.nan), rhs)
    got_lhs, got_rhs = vjp(jnp.ones_like(got).at[total:].set(jnp.nan))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got_lhs, want_lhs)
    np.testing.assert_array_equal(got_rhs, want_rhs)
    assert not got[total:].any() and not got_lhs[total:].any()


@each_portable
def test_bfloat16_is_accumulated_in_float32(impl):
    random = np.random.default_rng(0)
    lhs, rhs = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in ((40, 512), (2, 512, 8)))
    sizes = jnp.array([17, 20])
    out, vjp = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, activation="relu2", impl=impl), lhs, rhs)
    grads = vjp(jnp.ones_like(out))
    assert [z.dtype for z in (out, *grads)] == [jnp.bfloat16] * 3
    want = loop(lhs.astype(jnp.float32), rhs.astype(jnp.float32), sizes, "relu2")
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=2**-8, atol=1e-3)  # rounded once, at the end


def test_wrong_arguments():
    lhs, rhs, sizes = jnp.ones((5, 3)), jnp.ones((2, 3, 4)), jnp.array([2, 3])
    with pytest.raises(ValueError, match=r"grouped_matmul: rhs must have shape \[E, K, N\] = \[any, 3, any\], got \[2"):
        grouped_matmul(lhs, rhs.swapaxes(1, 2), sizes)
    with pytest.raises(ValueError, match="group_sizes must have shape"):
        grouped_matmul(lhs, rhs, jnp.array([2, 2, 1]))
    with pytest.raises(ValueError, match="activation must be 'relu2' or None, got 'silu'"):
        grouped_matmul(lhs, rhs, sizes, activation="silu")
