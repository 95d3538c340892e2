"""FP8 and MXFP8 against numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import floats
from pallas_kernels.fp8 import quantize_fp8, quantize_mxfp8
from tests.pallas_kernels.nvfp4_oracle import tensors

TENSORS = tensors()
E4M3 = ml_dtypes.float8_e4m3fn
FP8, MXFP8 = jax.jit(quantize_fp8), jax.jit(quantize_mxfp8)


def to_e4m3(values):
    return np.clip(values, -448, 448).astype(E4M3)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fp8(dtype):
    for name, x in TENSORS.items():
        with np.errstate(all="ignore"):
            x = x.astype(dtype)
            x32 = x.astype(np.float32)
            amax = np.abs(x32).max()
            safe = np.float32(448) if amax in (0, np.inf) else max(amax, np.float32(2.0**-110))
            encode = np.float32(448) / safe
            codes = to_e4m3(x32 * encode)
        found = FP8(jnp.asarray(x))
        np.testing.assert_array_equal(np.asarray(found.codes).view(np.uint8), codes.view(np.uint8), err_msg=name)
        assert np.asarray(found.scale) == np.float32(1) / encode, name
        if amax > 1e-30 and amax < np.inf:
            exact = codes.astype(np.float64) / encode
            np.testing.assert_allclose(jax.jit(type(found).dequantize)(found), exact, rtol=3e-7, atol=1e-37)


def test_fp8_with_a_given_amax():
    x = jnp.asarray([0.5, -1.0, 3.5, 5.0])
    found = quantize_fp8(x, amax=jnp.float32(4.0))
    np.testing.assert_allclose(found.dequantize(), [0.5, -1.0, 3.428572, 4.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_mxfp8(dtype):
    for name, x in TENSORS.items():
        with np.errstate(all="ignore"):
            x = x.astype(dtype)
            blocks = x.astype(np.float64).reshape(32, 2, 32)
            amax = np.abs(blocks).max(-1)
            exponent = np.ceil(np.log2(amax / 448))
            exponent = np.where(amax == 0, -127, np.where(np.isinf(amax), 127, np.clip(exponent, -127, 127)))
            codes = to_e4m3(blocks / 2.0 ** exponent[..., None])
        found = MXFP8(jnp.asarray(x))
        np.testing.assert_array_equal(found.scales, exponent + 127, err_msg=name)
        codes = codes.reshape(32, 64)
        np.testing.assert_array_equal(np.asarray(found.codes).view(np.uint8), codes.view(np.uint8), name)
        with np.errstate(over="ignore"):
            exact = (codes.astype(np.float64) * 2.0 ** exponent.repeat(32, -1)).astype(np.float32)
        restored = jax.jit(type(found).dequantize)(found)
        np.testing.assert_allclose(restored, exact, rtol=0, atol=1.2e-38, err_msg=name)


def test_nan():
    x = np.ones((2, 64), np.float32)
    x[0, 3] = np.nan
    found = MXFP8(jnp.asarray(x))
    assert found.scales[0].tolist() == [255, 119] and found.scales[1].tolist() == [119, 119]
    assert np.isnan(found.dequantize()).sum() == 32
    assert np.isnan(FP8(jnp.asarray(x)).dequantize()).all()


def test_the_last_axis_is_a_multiple_of_32():
    with pytest.raises(ValueError, match=r"multiple of 32, got x \[4, 48\]"):
        quantize_mxfp8(jnp.ones((4, 48)))


def test_every_e4m3_code_and_what_lies_between():
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(E4M3).astype(np.float32)
    np.testing.assert_array_equal(floats.e4m3_value(jnp.asarray(codes)), values)
    finite = np.sort(np.unique(values[np.isfinite(values)]))
    middles = (finite[1:] + finite[:-1]) / 2
    beside = [np.nextafter(middles, np.float32(end)) for end in (9e9, -9e9)]
    large = np.array([449, 464, 465, 1e9, -1e9, np.inf, -np.inf, 1e-40, -1e-40, -0.0], np.float32)
    tested = np.concatenate([finite, middles, *beside, large])
    found = np.asarray(jax.jit(floats.e4m3_code)(jnp.asarray(tested)))
    np.testing.assert_array_equal(found, to_e4m3(tested).view(np.uint8))


@pytest.mark.parametrize("numerator", [1.0, 256.0, 448.0, 1536.0, 2688.0])
def test_quotients_are_rounded_correctly(numerator):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.uniform(1, 2, 20000), 2.0 ** rng.integers(-20, 20, 200), 1 + rng.integers(0, 9, 99) * 2.0**-23]
    )
    x = x.astype(np.float32)
    exact = np.float32(numerator) / x
    for off in (-2, -1, 0, 1, 2):  # whatever the backend's division gives
        guess = (exact.view(np.int32) + off).view(np.float32)
        q = (guess.view(np.uint32) & 0x7FFFFF) | 0x800000
        m = (x.view(np.uint32) & 0x7FFFFF) | 0x800000
        error = (m * q).view(np.int32)
        got = floats._corrected(jnp.asarray(guess), jnp.asarray(q), jnp.asarray(error), jnp.asarray(m.astype(np.int32)))
        np.testing.assert_array_equal(got, exact)
    np.testing.assert_array_equal(jax.jit(lambda x: floats.divide_into(numerator, x))(x), exact)


@pytest.mark.parametrize("divisor", [6.0, 1536.0, 2688.0])
def test_division_by_a_constant(divisor):
    x = np.random.default_rng(0).uniform(1, 4, 50000).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: floats.divide_by(x, divisor))(x), x / np.float32(divisor))
