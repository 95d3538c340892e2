"""Token dispatch against a dense loop over the experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import permute, unpermute
from pallas_kernels.permute import CASES, example_inputs

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_name
def test_rows_are_sorted_by_expert_and_stable(case):
    (x, ids, experts), _ = example_inputs(case)
    rows, sizes, row_map = jax.jit(permute, static_argnums=2)(x, ids, experts)
    want = [np.asarray(x)[t] for e in range(experts) for t in range(case.tokens) if e in np.asarray(ids)[t]]
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_array_equal(sizes, np.bincount(np.ravel(ids), minlength=experts))
    assert (sizes.dtype, row_map.dtype, row_map.shape) == (jnp.int32, jnp.int32, ids.shape)
    np.testing.assert_array_equal(rows[row_map], jnp.repeat(x[:, None], case.slots, axis=1))


@by_name
def test_values_and_gradients_against_dense(case):
    """Each expert scales its rows by its own vector; the dense reference does so for all tokens and masks."""
    (x, ids, experts), _ = example_inputs(case)
    random = np.random.default_rng(1)
    weights, scales, d_y = (
        jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in (ids.shape, (experts, case.width), x.shape)
    )

    def dispatched(x, weights, scales):
        rows, sizes, row_map = permute(x, ids, experts)
        return unpermute(rows * jnp.repeat(scales, sizes, axis=0, total_repeat_length=len(rows)), row_map, weights)

    def dense(x, weights, scales):
        per_expert = (weights[:, :, None] * (ids[:, :, None] == jnp.arange(experts))).sum(1)
        return jnp.einsum("me,ed,md->md", per_expert, scales, x)

    got, vjp = jax.vjp(jax.jit(dispatched), x, weights, scales)
    want, vjp_dense = jax.vjp(jax.jit(dense), x, weights, scales)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for grad, grad_dense in zip(vjp(d_y), vjp_dense(d_y), strict=True):
        np.testing.assert_allclose(grad, grad_dense, rtol=1e-5, atol=1e-5)


def test_round_trip_in_bfloat16_adds_in_float32():
    x = jnp.array([[256.0], [1.0]], jnp.bfloat16)  # 256 + 1 is lost in bfloat16
    ids = jnp.array([[2, 0, 1], [0, 1, 2]])
    rows, _, row_map = permute(x, ids, 3)
    y = unpermute(rows, row_map, jnp.array([[1.0, 1 / 256, 1 / 256], [0.5, 0.25, 0.25]]))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), [[258], [1]])
    grad = jax.grad(lambda x: (permute(x, ids, 3)[0] * jnp.array([[1.0], [0], [1], [0], [256], [0]])).sum())(x)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad.astype(jnp.float32), [[258], [0]])


def test_no_scatter_adds_and_no_masks():
    """Scatter-adds make GPU results vary from run to run; a mask of tokens times experts does not fit."""
    (x, ids, _), _ = example_inputs(CASES[2])
    weights = jnp.ones(ids.shape)

    def loss(x, weights):
        rows, _, row_map = permute(x, ids, 1000)
        return (unpermute(rows**2, row_map, weights) ** 2).sum()

    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, weights))
    assert "gather" in program
    assert "scatter-add" not in program and "scatter_add" not in program
    assert f"{ids.size},1000]" not in program and f"{len(x)},1000]" not in program


def test_wrong_arguments():
    x, ids = jnp.ones((4, 3)), jnp.zeros((4, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"permute: expert_ids must have shape \[M, K\] = \[4, any\], got \[5, 2\]"):
        permute(x, jnp.zeros((5, 2), jnp.int32), 3)
    rows, _, row_map = permute(x, ids, 3)
    with pytest.raises(ValueError, match=r"unpermute: rows must have shape \[M\*K, D\] = \[8, any\], got \[7, 3\]"):
        unpermute(rows[:7], row_map, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="weights must have shape"):
        unpermute(rows, row_map, jnp.ones((4, 3)))
