"""Zeros that XLA takes for no constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.zeros import zeros_after


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32"])
def test_zeros_after_anything_are_zeros(dtype):
    values = np.arange(-3, 4) if dtype == "int32" else [0.0, -0.0, 1.1, -1e-30, np.inf, -np.inf, np.nan]
    for value in values:
        made = jax.jit(lambda x: zeros_after(x, (2, 3), jnp.bfloat16))(jnp.full((4, 5), value, dtype))
        assert made.dtype == jnp.bfloat16
        np.testing.assert_array_equal(made.view(jnp.uint16), np.zeros((2, 3)))


def test_zeros_after_something_are_no_constant():
    compiled = jax.jit(lambda x: zeros_after(x, (2, 3), "float32")).lower(jnp.zeros((4, 5))).compile().as_text()
    assert "bitcast-convert" in compiled  # of a number of x


def test_loops_of_many_products_do_not_start_together():
    """Each of a chain of products has its result and its operand at a time, not room for the results of all."""
    sizes = jnp.array([100, 156], jnp.int32)

    def bytes_of(products):
        def chain(x, w):
            for _ in range(products):
                x = grouped_matmul(x, w, sizes, impl="blocked")
            return x

        shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 512), (2, 512, 512)))
        return jax.jit(chain).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(8) < 1.1 * bytes_of(4)
