"""Looking up rows, and the gradient of the table against a loop over the entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, grouped_matmul_kernels, take_rows
from pallas_kernels.take_rows import CASES, example_inputs, take_rows_mosaic


def gradient(table, ids, d_rows):
    out = np.zeros(table.shape)
    for i, d in zip(np.asarray(ids), np.asarray(d_rows, np.float64), strict=True):
        out[i] += d
    return out


def drawn(case, dtype):
    (table, ids), _ = example_inputs(case, dtype=dtype)
    d_rows = np.random.default_rng(1).standard_normal((case.entries, case.width))
    return table, ids, jnp.asarray(d_rows, jnp.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradient(case):
    table, ids, d_rows = drawn(case, jnp.float32)
    rows, vjp = jax.vjp(jax.jit(lambda table: take_rows(table, ids, dtype=jnp.bfloat16)), table)
    np.testing.assert_array_equal(rows, np.asarray(table)[ids].astype(jnp.bfloat16))
    (d_table,) = vjp(d_rows)
    assert d_table.dtype == jnp.float32
    np.testing.assert_allclose(d_table, gradient(table, ids, d_rows), rtol=1e-5, atol=1e-5)
    assert take_rows(table, ids).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["blocks", "padded", "skewed"])  # "skewed": mostly one row, M is no multiple of 8
def test_the_kernel(name, dtype, interpret, monkeypatch):
    monkeypatch.setattr(grouped_matmul_kernels, "NUM_SMS", 2)
    table, ids, d_rows = drawn(next(case for case in CASES if case.name == name), dtype)

    @jax.jit
    def run(table, ids, d_rows):
        rows, vjp = jax.vjp(lambda table: take_rows_mosaic(table, ids, jnp.dtype(jnp.bfloat16), interpret), table)
        return rows, *vjp(d_rows)

    rows, d_table = run(table, ids, d_rows)
    np.testing.assert_array_equal(rows, table[ids].astype(jnp.bfloat16))
    assert d_table.dtype == dtype
    error = 1e-6 if dtype == jnp.float32 else 2**-8  # summed in float32, rounded once
    np.testing.assert_allclose(d_table.astype(jnp.float32), gradient(table, ids, d_rows), rtol=error, atol=1e-5)


def test_operands_that_do_not_fit():
    table, ids = jnp.ones((256, 64)), jnp.zeros(3, jnp.int32)
    with dispatch.compiling_for("sm_90a"):
        for operands, dtype, reason in (
            ((table, ids), jnp.float32, "the rows must be bfloat16"),
            ((table, ids[:0]), jnp.bfloat16, "there are no ids"),
        ):
            with pytest.raises(ValueError, match=reason):
                take_rows(*operands, dtype=dtype, impl="mosaic")
    with pytest.raises(ValueError, match=r"take_rows: ids must have shape \[M\]"):
        take_rows(table, ids[None])


@pytest.mark.gpu
def test_on_a_gpu_with_a_float32_table():
    """The gradient of master weights: against float64, and the same bits in a second run."""
    random = np.random.default_rng(0)
    ids = jnp.asarray(np.where(random.random(16384) < 0.2, 5, random.integers(131072, size=16384)), jnp.int32)
    d_rows = jnp.asarray(random.standard_normal((16384, 2688), np.float32), jnp.bfloat16)
    table = jnp.zeros((131072, 2688), jnp.float32)
    run = jax.jit(lambda d: jax.vjp(lambda t: take_rows(t, ids, dtype=jnp.bfloat16, impl="mosaic"), table)[1](d)[0])
    got, again = run(d_rows), run(d_rows)
    np.testing.assert_array_equal(got, again)
    want = gradient(table, ids, d_rows)
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 1e-5 * np.linalg.norm(want)


def test_gradients_of_a_narrow_table_are_summed_in_float32():
    """A thousand entries of one row: in bfloat16 the sum would stop growing at 256."""
    table, ids = jnp.zeros((3, 4), jnp.bfloat16), jnp.ones(1000, jnp.int32)
    _, pull = jax.vjp(lambda table: take_rows(table, ids, impl="reference"), table)
    (d_table,) = pull(jnp.ones((1000, 4), jnp.bfloat16))
    assert d_table.dtype == jnp.bfloat16
    np.testing.assert_array_equal(d_table.astype(jnp.float32), np.outer([0, 1000, 0], np.ones(4)))
