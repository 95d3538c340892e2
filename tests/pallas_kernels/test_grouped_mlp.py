"""Every portable implementation of the experts' two products against a loop over the groups, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_mlp
from pallas_kernels.dispatch import OPS
from pallas_kernels.grouped_mlp import CASES, example_inputs


def loop(x, up, down, sizes, d_out):
    """The result and the gradients of x, up and down in float64, group by group; zero past the last."""
    x, up, down, d_out = (np.asarray(z, np.float64) for z in (x, up, down, d_out))
    out, d_x, d_up, d_down = (np.zeros_like(z) for z in (x, x, up, down))
    start = 0
    for i, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        start += size
        positive = np.maximum(x[rows] @ up[i], 0)
        d_product = 2 * positive * (d_out[rows] @ down[i].T)
        out[rows], d_x[rows] = positive**2 @ down[i], d_product @ up[i].T
        d_up[i], d_down[i] = x[rows].T @ d_product, (positive**2).T @ d_out[rows]
    return out, d_x, d_up, d_down


# The Hopper kernels take bfloat16: test_grouped_matmul_mosaic.py.
@pytest.mark.parametrize("impl", [impl for impl in OPS["grouped_mlp"] if impl != "mosaic"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case, impl):
    (x, up, down, sizes), _ = example_inputs(case)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    out, vjp = jax.vjp(jax.jit(lambda x, up, down: grouped_mlp(x, up, down, sizes, impl=impl)), x, up, down)
    for got, want in zip((out, *vjp(d_out)), loop(x, up, down, sizes, d_out), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_wrong_arguments():
    x, up, down, sizes = jnp.ones((5, 3)), jnp.ones((2, 3, 4)), jnp.ones((2, 4, 3)), jnp.array([2, 3])
    with pytest.raises(ValueError, match=r"grouped_mlp: down must have shape \[E, F, L\] = \[2, 4, 3\], got \[2, 3, 4"):
        grouped_mlp(x, up, up, sizes)
    with pytest.raises(ValueError, match="group_sizes must have shape"):
        grouped_mlp(x, up, down, jnp.array([5]))
    with pytest.raises(ValueError, match="grouped_mlp: implementation 'mosaic' cannot run on cpu"):
        grouped_mlp(x, up, down, sizes, impl="mosaic")
