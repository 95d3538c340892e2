"""Packed weights in products: values and the gradient of the other operand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.precision import modelopt
from nemotron_jax.precision.matmul import expert_matmul, matmul
from nemotron_jax.precision.recipe import Precision
from pallas_kernels import grouped_matmul
from pallas_kernels.packed import Packed, side_by_side

RNG = np.random.default_rng(0)


def packed(shape, format):
    """A random weight [..., K, N] and the same as float32."""
    weights = RNG.normal(size=(*shape[:-2], shape[-1], shape[-2])).astype(np.float32).reshape(-1, shape[-1], shape[-2])
    weights *= np.arange(1, len(weights) + 1)[:, None, None]  # experts with scales of their own
    if format == "fp8":
        parts = [modelopt.quantize_fp8(weight) for weight in weights]
        dense = [modelopt.dequantize_fp8(*part) for part in parts]
        codes, scale, blocks = (np.stack([p[0] for p in parts]), np.stack([p[1] for p in parts]), None)
    else:
        parts = [modelopt.quantize_nvfp4(weight) for weight in weights]
        dense = [modelopt.dequantize_nvfp4(*part) for part in parts]
        codes, blocks, scale = (np.stack([part[i] for part in parts]) for i in range(3))
    if len(shape) == 2:
        codes, scale, blocks = codes[0], scale[0], None if blocks is None else blocks[0]
    found = Packed(jnp.asarray(codes), None if blocks is None else jnp.asarray(blocks), jnp.asarray(scale))
    return found, jnp.asarray(np.swapaxes(np.stack(dense), -1, -2).reshape(shape))


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
def test_matmul(format, operands):
    w, dense = packed((64, 24), format)
    assert w.shape == (64, 24) and w.ndim == 2
    x = jnp.asarray(RNG.normal(size=(2, 5, 64)), operands)
    dy = jnp.asarray(RNG.normal(size=(2, 5, 24)), operands)
    y, pull = jax.vjp(jax.jit(lambda x: matmul(x, w, Precision(operands))), x)
    assert y.dtype == x.dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if operands == "float32" else {"rtol": 2**-7, "atol": 0.05}
    exact = np.asarray(x, np.float64) @ np.asarray(dense, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, **tolerance)
    exact = np.asarray(dy, np.float64) @ np.asarray(dense, np.float64).T
    np.testing.assert_allclose(np.asarray(pull(dy)[0], np.float64), exact, **tolerance)


def test_codes_are_exact_in_bfloat16():
    """With x exact in bfloat16 as well, only the result is rounded."""
    w, dense = packed((64, 8), "nvfp4")
    x = jnp.asarray(RNG.integers(-8, 9, (4, 64)), jnp.bfloat16)
    y = matmul(x, w, Precision("bfloat16")).astype(jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(dense, np.float64)
    np.testing.assert_allclose(y, exact, rtol=2**-8, atol=1e-5)
    np.testing.assert_array_equal(w.operand(jnp.bfloat16).astype(jnp.float32), w.operand(jnp.float32))


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
@pytest.mark.parametrize("activation", [None, "relu2"])
def test_grouped_matmul(format, activation):
    w, dense = packed((5, 32, 24), format)
    sizes = jnp.asarray([3, 0, 140, 1, 7], jnp.int32)  # 151 of 160 rows
    x = jnp.asarray(RNG.normal(size=(160, 32)), jnp.float32)
    dy = jnp.asarray(RNG.normal(size=(160, 24)), jnp.float32)
    y, pull = jax.vjp(jax.jit(lambda x: grouped_matmul(x, w, sizes, activation=activation)), x)
    expected, expected_pull = jax.vjp(lambda x: grouped_matmul(x, dense, sizes, activation=activation), x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(pull(dy)[0], expected_pull(dy)[0], rtol=1e-4, atol=1e-2)
    assert (np.asarray(y)[151:] == 0).all()
    y16 = expert_matmul(x, w, sizes, Precision("bfloat16"), activation=activation)
    assert y16.dtype == jnp.bfloat16
    error = jnp.linalg.norm(y16.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert 1e-4 < float(error) < 1e-2


def test_what_takes_no_packed_weights_says_so():
    w, _ = packed((2, 32, 24), "nvfp4")
    x, sizes = jnp.ones((4, 32)), jnp.asarray([2, 2], jnp.int32)
    with pytest.raises(ValueError, match="'reference' cannot take these operands: packed weights"):
        grouped_matmul(x, w, sizes, impl="reference")
    with pytest.raises(ValueError, match=r"rhs must have shape \[E, K, N\] = \[any, 48, any\], got \[2, 32, 24\]"):
        grouped_matmul(jnp.ones((4, 48)), w, sizes)


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_side_by_side(format):
    w, dense = packed((32, 48), format)
    blocks = [None, None] if w.block_scales is None else [w.block_scales[:16], w.block_scales[16:]]
    parts = [Packed(codes, block, w.scale) for codes, block in zip((w.codes[:16], w.codes[16:]), blocks, strict=True)]
    np.testing.assert_array_equal(side_by_side(parts).dequantize(), dense)
    np.testing.assert_array_equal(side_by_side([dense[:, :16], dense[:, 16:]]), dense)


def test_one_expert_of_many():
    w, dense = packed((3, 32, 16), "nvfp4")
    np.testing.assert_array_equal(w[1].dequantize(), dense[1])
    assert w[...] is w
