"""NVFP4 against the oracle: codes, scales and amax bit for bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import floats
from pallas_kernels.nvfp4 import (
    NVFP4,
    e2m1_value,
    hadamard16,
    hadamard16_of,
    nvfp4_codes,
    pack,
    quantize_nvfp4,
    round_e2m1_stochastic,
    unpack,
)
from tests.pallas_kernels import nvfp4_oracle as oracle

TENSORS = oracle.tensors()
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@functools.cache
def compiled(**options):
    return jax.jit(lambda x, bits, amax: quantize_nvfp4(x, bits=bits, amax=amax, **options))


def run(x, *, bits=None, amax=None, **options):
    """Through jit, as everything is used."""
    return compiled(**options)(x, bits, amax)


def same(found, codes, scales, amax, name=""):
    np.testing.assert_array_equal(np.asarray(found.scales).view(np.uint8), scales.view(np.uint8), err_msg=name)
    np.testing.assert_array_equal(np.asarray(found.codes), oracle.pack(codes), err_msg=name)
    np.testing.assert_array_equal(np.asarray(found.amax), np.asarray(amax, np.float32), err_msg=name)
    assert found.codes.dtype == jnp.uint8 and found.scales.dtype == jnp.float8_e4m3fn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", ["1x16", "16x16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_nearest(block, dtype, transposed):
    for name, x in TENSORS.items():
        with np.errstate(over="ignore"):
            x = (x.T if transposed else x).astype(DTYPES[dtype])
        same(run(jnp.asarray(x), block=block), *oracle.quantize(x, block), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", ["1x16", "16x16"])
@pytest.mark.parametrize("choice", [("mae", 256), ("mse", 256), ("mae", 448), ("mse", 448)])
def test_four_over_six(choice, block, dtype):
    fours = 0
    for name, x in TENSORS.items():
        with np.errstate(over="ignore"):
            x = x.astype(DTYPES[dtype])
        expected = oracle.quantize(x, block, error=choice[0], bound=choice[1])
        found = run(jnp.asarray(x), block=block, four_over_six=choice)
        same(found, *expected, name)
        assert found.bound == choice[1]
        fours += (
            run(jnp.asarray(x), block=block, four_over_six=("mae", 448)).codes != run(jnp.asarray(x), block=block).codes
        ).sum()
    assert fours > 100  # the choice was one


def test_four_over_six_by_default_is_bounded_by_256():
    x = jnp.asarray(TENSORS["normal"])
    short, long = run(x, four_over_six="mse"), run(x, four_over_six=("mse", 256))
    np.testing.assert_array_equal(short.codes, long.codes)
    assert short.bound == 256
    plain = run(x).dequantize() - x
    assert float(jnp.sum((short.dequantize() - x) ** 2)) < float(jnp.sum(plain**2))


@pytest.mark.parametrize("shape", [(32,), (32, 1)])
def test_a_scale_for_each_row(shape):
    for name in ("normal", "wide", "wide and tiny", "signed zeros", "powers of two"):
        x = TENSORS[name]
        amax = np.abs(x).max(-1)
        found = run(jnp.asarray(x), amax=jnp.asarray(amax.reshape(shape)))
        codes, scales, _ = oracle.quantize(x, amax=amax)
        same(found, codes, scales, amax.reshape(shape), name)
        expected = oracle.dequantize(codes, scales, amax)
        np.testing.assert_allclose(found.dequantize(), expected, rtol=1e-6, atol=2e-45, err_msg=name)


def test_the_sixth_is_folded_into_the_scale_of_the_tensor():
    """amax_block * (encode * (1/6)), not (amax_block / 6) * encode: they round apart where bfloat16 gives a tie."""
    x = np.random.default_rng(3).normal(size=(16384, 16)).astype(ml_dtypes.bfloat16)
    codes, scales, amax = oracle.quantize(x)
    largest = np.abs(x.astype(np.float32)).max(-1, keepdims=True)
    older = oracle.e4m3((largest / np.float32(6)) * oracle.encode_scale(amax, 448))
    assert (older.view(np.uint8) != scales.view(np.uint8)).sum() == 100
    same(run(jnp.asarray(x)), codes, scales, amax)


def test_a_given_amax():
    """Smaller than the true one: scales saturate at 448, codes at 6. One of many devices' maximum is larger."""
    x = TENSORS["normal"]
    for amax in (0.5, 100.0, 0.0, 1e-40):
        codes, scales, _ = oracle.quantize(x, amax=np.float32(amax))
        same(run(jnp.asarray(x), amax=jnp.float32(amax)), codes, scales, amax, str(amax))


def test_stochastic_rounding_for_every_byte():
    rng = np.random.default_rng(3)
    edges = [
        0.0,
        -0.0,
        0.25,
        0.5,
        1.75,
        2.0,
        3.999999,
        4.0,
        5.0,
        5.999,
        6.0,
        7.5,
        1e30,
        1e-30,
        1e-45,
        np.inf,
        0.4999999,
    ]
    values = np.array(edges + [-v for v in edges] + list(rng.uniform(-7, 7, 60)), np.float32)
    random = np.arange(256)
    expected = np.array([[oracle.stochastic_value(v, r) for r in random] for v in values], np.float32)
    given = np.broadcast_to(values[:, None], expected.shape)
    for dtype in (jnp.uint8, jnp.int32):
        bits = jnp.asarray(np.broadcast_to(random, expected.shape), dtype)
        found = np.asarray(jax.jit(round_e2m1_stochastic)(jnp.asarray(given), bits))
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))
    half = np.float32(2.3)
    ups = [float(round_e2m1_stochastic(jnp.float32(half), jnp.uint8(r))) == 3.0 for r in random]
    assert sum(ups) == int(256 * (half - 2))  # floor(256 frac) of 256 bytes
    assert np.isnan(np.float32("nan")) and float(round_e2m1_stochastic(jnp.float32("nan"), jnp.uint8(0))) == 6.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_tensors(dtype):
    rng = np.random.default_rng(4)
    for name in ("normal", "wide", "zeros", "signed zeros", "ties", "scaled by 2^-127", "huge", "outlier"):
        with np.errstate(over="ignore"):
            x = TENSORS[name].astype(DTYPES[dtype])
        bits = rng.integers(0, 256, x.shape, dtype=np.uint8)
        found = run(jnp.asarray(x), rounding="stochastic", bits=jnp.asarray(bits))
        same(found, *oracle.quantize(x, bits=bits), name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard(dtype):
    for name in ("normal", "outlier", "wide", "zeros", "ties"):
        x = TENSORS[name].astype(DTYPES[dtype])
        turned = oracle.hadamard(x)
        found = np.asarray(jax.jit(hadamard16)(jnp.asarray(x)))
        assert found.dtype == x.dtype
        largest = np.abs(x.astype(np.float32)).max()
        # float32 sums of 16 against float64: almost always the same bfloat16
        np.testing.assert_allclose(found.astype(np.float32), turned.astype(np.float32), atol=1e-6 * largest, rtol=2**-8)
        assert (found != turned).mean() < (0.02 if dtype == "bfloat16" else 1)
        same(run(jnp.asarray(x), hadamard=True), *oracle.quantize(found), name)


def test_hadamard_is_rounded_inside_a_program():
    """To bfloat16, though everything after it is float32."""
    x = jnp.asarray(TENSORS["normal"], jnp.bfloat16)
    inside = jax.jit(lambda x: hadamard16(x).astype(jnp.float32))(x)
    assert (np.asarray(inside).view(np.uint32) & 0xFFFF == 0).all() and float(jnp.abs(inside).max()) > 1
    # and it cancels in a product over the transformed axis
    y = jnp.asarray(TENSORS["uniform"])
    product = hadamard16(jnp.asarray(TENSORS["normal"])) @ hadamard16(y).T
    np.testing.assert_allclose(product, jnp.asarray(TENSORS["normal"]) @ y.T, atol=1e-4)


def test_dequantize():
    for name, x in TENSORS.items():
        if name == "infinities":
            continue
        for bound, choice in ((448, None), (256, "mae")):
            found = run(jnp.asarray(x), four_over_six=choice)
            codes, scales, amax = oracle.quantize(x, bound=bound, error=choice)
            exact = oracle.dequantize(codes, scales, amax, bound)
            with np.errstate(over="ignore", invalid="ignore"):
                exact32 = exact.astype(np.float32)
            got = np.asarray(jax.jit(NVFP4.dequantize)(found))
            np.testing.assert_allclose(got, exact32, rtol=3e-7, atol=1e-45, err_msg=name)
            # a bfloat16 GEMM of operands is exact, and the global scale comes after
            operand = np.asarray(jax.jit(lambda t: t.operand(jnp.bfloat16))(found)).astype(np.float64)
            np.testing.assert_array_equal(
                operand, exact if amax == 0 else oracle.dequantize(codes, scales, 6 * bound, bound)
            )
            scale = np.asarray(jax.jit(NVFP4.global_scale)(found))
            np.testing.assert_allclose(
                scale, np.float32(amax) / np.float32(6 * bound), rtol=0, atol=2e-45, err_msg=name
            )
    assert found.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


def test_nan_poisons_the_tensor():
    x = TENSORS["normal"].copy()
    x[0, 0] = np.nan
    found = run(jnp.asarray(x))
    assert np.isnan(found.amax) and (np.asarray(found.scales).view(np.uint8) == 0x7F).all()
    assert (np.asarray(found.codes) == 0).all() and np.isnan(found.dequantize()).all()


def test_stacks_and_packing():
    x = np.stack([TENSORS["normal"], TENSORS["uniform"]])
    found = run(jnp.asarray(x), block="16x16")
    assert found.codes.shape == (2, 32, 32) and found.scales.shape == (2, 32, 4)
    for i in range(2):
        codes, scales, _ = oracle.quantize(x[i], "16x16", amax=np.abs(x).max())
        same(NVFP4(found.codes[i], found.scales[i], found.amax), codes, scales, np.abs(x).max())
    codes = jnp.asarray(np.arange(32) % 16, jnp.uint8)
    assert pack(codes)[0] == 0x10  # element 0 in the low nibble
    np.testing.assert_array_equal(unpack(pack(codes)), codes)


def test_a_weight_and_its_transpose_quantise_alike():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(48, 32)), jnp.float32)
    there, back = run(w, block="16x16"), run(w.T, block="16x16")
    np.testing.assert_array_equal(there.dequantize().T, back.dequantize())


X = jnp.ones((32, 32))
BITS = jnp.zeros((32, 32), jnp.uint8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "1x32"}, "block must be one of 1x16, 16x16, got '1x32'"),
        ({"rounding": "up"}, "rounding must be"),
        ({"rounding": "stochastic"}, "needs bits"),
        ({"bits": BITS}, "nothing else takes them"),
        ({"rounding": "stochastic", "bits": BITS[:16]}, r"bits must be uint8 \[32, 32\], got uint8 \[16, 32\]"),
        ({"rounding": "stochastic", "bits": BITS.astype(jnp.int32)}, "got int32"),
        ({"four_over_six": "max"}, "four_over_six must be"),
        ({"four_over_six": ("mae", 300)}, "four_over_six must be"),
        ({"four_over_six": "mae", "hadamard": True}, "without Hadamard"),
        ({"four_over_six": "mae", "rounding": "stochastic", "bits": BITS}, "nearest rounding"),
        ({"amax": jnp.ones(3)}, r"one for each row, \[32\], got \[3\]"),
        ({"x": jnp.ones((32, 24))}, r"multiples of 16, got x \[32, 24\]"),
        ({"x": jnp.ones((24, 32)), "block": "16x16"}, "multiples of 16"),
        ({"x": jnp.ones(32), "block": "16x16"}, "multiples of 16"),
        ({"x": jnp.ones(())}, "multiples of 16"),
        ({"x": jnp.ones((32, 32), jnp.int32)}, "float32, bfloat16 or float16, got int32"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quantize_nvfp4(options.pop("x", X), **options)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("axis", [1, 2])
def test_codes_of_blocks_along_either_axis(axis, rounding):
    """Those of quantize_nvfp4, with an amax of each row of blocks; zeros, outliers, NaN and subnormals among them."""
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(6, 16, 16)) * np.array([1, 1e-41, 0, 1e30, 1e-6, 1])[:, None, None]).astype(np.float32)
    x[0, 3, 4], x[5, 2, 1] = 1e4, np.nan
    x = jnp.asarray(x)
    bits = jnp.asarray(rng.integers(0, 256, x.shape, dtype=np.uint8)) if rounding == "stochastic" else None
    amax = floats.absolute_max(x, axis=(1, 2), keepdims=True)
    codes, scales = nvfp4_codes(x, amax, axis=axis, bits=bits)
    got = e2m1_value(codes) * floats.e4m3_value(scales)
    last, last_bits = (z if z is None or axis == 2 else jnp.swapaxes(z, 1, 2) for z in (x, bits))
    amax = jnp.broadcast_to(amax, (6, 16, 1))
    want = quantize_nvfp4(last, rounding=rounding, bits=last_bits, amax=amax).operand(jnp.float32)
    np.testing.assert_array_equal(got, want if axis == 2 else jnp.swapaxes(want, 1, 2))
    assert (np.asarray(got)[0] != 0).any() and np.isnan(np.asarray(got)[5]).all()


def test_hadamard_of_rows():
    x = jnp.asarray(np.random.default_rng(6).normal(size=(3, 16, 5)), jnp.bfloat16)
    got = hadamard16_of([x[:, i] for i in range(16)], axis=1)
    np.testing.assert_array_equal(got, jnp.swapaxes(hadamard16(jnp.swapaxes(x, 1, 2)), 1, 2))
