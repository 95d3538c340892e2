"""Both orientations at once: the reference, and the kernel interpreted on the CPU, bit for bit `quantize_nvfp4`."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize
from pallas_kernels.nvfp4 import quantize_nvfp4
from pallas_kernels.quantize import CASES, DGRAD, WGRAD, Case, absolute_maxima, example_inputs
from pallas_kernels.random_bits import random_bytes
from tests.pallas_kernels import nvfp4_oracle as oracle


def same(got, want):
    for found, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(found.scales).view(np.uint8), np.asarray(expected.scales).view("u1"))
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.amax, expected.amax)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_orientation_is_the_tensor_quantised_on_its_own(case, dtype):
    """With the largest value found after the transform, and bytes by token and column whatever the orientation."""
    (x, *maxima), settings = example_inputs(case, 1, dtype)
    rounding = {"rounding": "stochastic" if case.stochastic else "nearest"}
    bits = [None, None]
    if case.stochastic:
        tokens = jnp.arange(case.rows, dtype=jnp.uint32)
        bits = [random_bytes(settings["seed"], stream, tokens, case.columns) for stream in (DGRAD, WGRAD)]
        bits[1] = bits[1].T
    rows = quantize_nvfp4(x, bits=bits[0], **rounding)
    columns = quantize_nvfp4(x.T, bits=bits[1], hadamard=case.hadamard, **rounding)
    same(quantize(x, *maxima, **settings), (rows, columns))


def test_against_the_oracle():
    (x, *maxima), _ = example_inputs(Case("", 48, 80, False), 1, jnp.bfloat16)
    for found, z in zip(quantize(x, *maxima), (x, x.T), strict=True):
        codes, scales, _ = oracle.quantize(np.asarray(z))
        np.testing.assert_array_equal(found.codes, oracle.pack(codes))
        np.testing.assert_array_equal(np.asarray(found.scales).view(np.uint8), scales.view(np.uint8))


def test_operands_that_do_not_fit():
    x, amax = jnp.ones((32, 48)), jnp.float32(1)
    with pytest.raises(ValueError, match=r"quantize: x must have shape \[M, N\]"):
        quantize(x[None], amax, amax)
    with pytest.raises(ValueError, match=r"amax_columns must have shape \[\] = \[\], got \[1\]"):
        quantize(x, amax, amax[None])
    with pytest.raises(ValueError, match="bfloat16 or float32, got float16"):
        quantize(x.astype(jnp.float16), amax, amax)
    with pytest.raises(ValueError, match=r"multiples of 16, got \[32, 40\]"):
        quantize(x[:, :40], amax, amax)


def test_maxima():
    x = jnp.zeros((32, 5)).at[19, 2].set(-8.0)  # the transform spreads it over its 16 rows
    assert [float(z) for z in absolute_maxima(x)] == [8.0, 8.0]
    assert [float(z) for z in absolute_maxima(x, hadamard=True)] == [8.0, 2.0]
