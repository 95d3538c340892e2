"""Both orientations at once: the reference, and the kernel interpreted on the CPU, bit for bit `quantize_nvfp4`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.floats import bits_of
from pallas_kernels.nvfp4 import (
    SIGNS,
    e2m1_nearest_code,
    e2m1_stochastic_size,
    e2m1_value,
    hadamard16_of,
    quantize_nvfp4,
)
from pallas_kernels.nvfp4_mosaic import (
    EXCESS,
    nearest_size,
    nearest_value,
    stochastic_size,
    stochastic_value,
    transformed,
)
from pallas_kernels.quantize import CASES, Case, absolute_maxima, example_inputs, quantize_reference
from pallas_kernels.quantize_mosaic import quantize as kernel
from pallas_kernels.quantize_mosaic import unfit
from pallas_kernels.random_bits import DGRAD, WGRAD, random_bytes
from tests.pallas_kernels import nvfp4_oracle as oracle


def same(got, want):
    for found, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(found.scales).view(np.uint8), np.asarray(expected.scales).view("u1"))
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.amax, expected.amax)


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16], ids=str)
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

    @jax.jit
    def each(x, of_rows, of_columns):
        columns = quantize_nvfp4(x.T, bits=of_columns, hadamard=case.hadamard, **rounding)
        return quantize_nvfp4(x, bits=of_rows, **rounding), columns

    same(jax.jit(lambda *z: quantize(*z, **settings))(x, *maxima), each(x, *bits))


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


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("the other width of a tile, more than one of them", 256, 192, False), marks=pytest.mark.slow),
        Case("hadamard", 128, 128, True),
        Case("stochastic", 128, 64, True, True),
        pytest.param(Case("stochastic, wide", 256, 256, False, True), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_the_kernel(case, interpret):
    (x, *maxima), settings = example_inputs(case, 1, jnp.bfloat16)
    x = x.at[3, 5].set(-0.0).at[17].set(0).at[:16, 9].set(0).at[40:60, 8:40].mul(300)
    seed = settings.get("seed")
    got = kernel(x, *maxima, case.hadamard, seed, interpret)
    same(got, quantize_reference(x, *maxima, case.hadamard, seed))
    assert all(one.codes.any() for one in got)


@pytest.mark.parametrize("amax", [0.0, 1e-3, np.inf, np.nan])
def test_the_kernel_with_another_amax(amax, interpret):
    """Too small, where codes and scales saturate; and what comes of infinities."""
    (x, *_), _ = example_inputs(Case("", 128, 64, False), 1, jnp.bfloat16)
    maxima = jnp.float32(amax), jnp.float32(2 * amax)
    same(kernel(x, *maxima, False, None, interpret), quantize_reference(x, *maxima, False, None))


def test_nan_and_infinities_in_the_kernel(interpret):
    (x, *_), _ = example_inputs(Case("", 128, 64, False), 1, jnp.bfloat16)
    x = x.at[5, 20].set(jnp.nan).at[40, 3].set(jnp.inf).at[41, 3].set(-jnp.inf)
    one = jnp.float32(1)
    same(kernel(x, one, one, False, None, interpret), quantize_reference(x, one, one, False, None))


def test_the_sums_of_the_transform_are_added_in_one_order(interpret):
    """Terms that are up to 60 binades apart: their sums are rounded; in another order, some to another bfloat16."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(16, 100_000)) * 2.0 ** random.integers(-30, 31, (16, 100_000)), jnp.bfloat16)
    want = hadamard16_of(list(x), axis=0).astype(jnp.float32)
    np.testing.assert_array_equal(jnp.stack(transformed([row.astype(jnp.float32) for row in x], interpret)), want)
    terms = [sign * 0.25 * row.astype(jnp.float32) for sign, row in zip(SIGNS, x, strict=True)]
    backwards = functools.reduce(jnp.add, terms[::-1]).astype(jnp.bfloat16).astype(jnp.float32)
    assert 0 < (backwards != want[0]).sum() < 100


def near_steps():
    """float32 of both signs about every value of E2M1 and every tie, a few last bits to each side, and beyond."""
    sizes = np.float32([0, 2.0**-149, 2.0**-126, 1e-9, 0.1, 6.4, 7.9, 8, 12, 1e30, np.inf, *np.arange(0.25, 6.5, 0.25)])
    bits = sizes.view(np.uint32)[:, None] + np.arange(-3, 4, dtype=np.int64)
    bits = bits[(bits >= 0) & (bits <= 0x7F800000)].astype(np.uint32)
    return jnp.asarray(np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32))


def test_rounding_to_nearest_by_sums(interpret):
    x = near_steps()
    codes = e2m1_nearest_code(x)
    np.testing.assert_array_equal(nearest_size(x, interpret) - jnp.uint32(EXCESS), codes & 7)
    x = jnp.where(x == 0, 0.0, x)  # which it is given without a sign
    np.testing.assert_array_equal(bits_of(nearest_value(x, interpret)), bits_of(e2m1_value(codes)))


@pytest.mark.parametrize("place", range(4))
def test_stochastic_rounding_by_sums(place, interpret):
    """Every byte; and sums that come within their last places of 1/2 from below, some of which round to it."""
    near_half = np.float32(0.5) - np.arange(256, dtype=np.float32) / 512
    near_half = (near_half.view(np.int32)[:, None] + np.arange(-6, 4)).view(np.float32)
    x = jnp.concatenate([near_steps(), jnp.asarray(near_half).ravel()])
    x, byte = jnp.broadcast_arrays(x, jnp.arange(256, dtype=jnp.uint32)[:, None])
    size = e2m1_stochastic_size(jnp.abs(x), byte)
    draw = (byte << 8 * place | ~(jnp.uint32(255) << 8 * place), place)
    np.testing.assert_array_equal(stochastic_size(x, draw, interpret) >> 16, size + 0x4300)
    want = e2m1_value(size | (bits_of(x) >> 28) & 8)
    np.testing.assert_array_equal(bits_of(stochastic_value(x, draw, interpret)), bits_of(want))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case("nearest", 256, 192, True), Case("stochastic", 256, 192, True, True)], ids=str)
def test_on_a_gpu_with_values_that_the_interpreter_does_not_have(case):
    """Subnormals, which the CPU flushes, NaN, whose bits differ, and tensors of tiny and huge values."""
    (x, *_), settings = example_inputs(case, 1, jnp.bfloat16)
    tiny = x.at[5, 20].set(1e-39).at[:, 3].mul(1e-38)
    special = tiny.at[7, 9].set(jnp.inf).at[40, 30].set(-jnp.inf).at[50, 60].set(0 if case.stochastic else jnp.nan)
    apart = x.at[:, ::4].mul(1e33).at[:, 1::4].set(-1e-39).at[:, 2::4].set(-0.0)  # products underflow: no sign
    for z, amax in (
        (tiny, None),
        (special, 1.0),
        (x * 1e-38, None),
        (x * 1e-36, None),
        (x * 1e36, None),
        (apart, None),
    ):
        z = z.astype(jnp.bfloat16)
        maxima = absolute_maxima(z, hadamard=True) if amax is None else (jnp.float32(amax),) * 2
        got = quantize(z, *maxima, **settings, impl="mosaic")
        same(got, quantize(z, *maxima, **settings, impl="reference"))


def test_what_the_kernel_takes():
    x = jnp.ones((256, 192), jnp.bfloat16)
    assert unfit(x) == ""
    assert unfit(x.astype(jnp.float32)) == "x must be bfloat16, got float32"
    for bad in (x[:64], x[:, :96], x[:0]):
        assert unfit(bad).startswith("M must be a multiple of 128 and N of 64, got")
    with compiling_for("sm_90a"):
        assert "mpmd_map" in str(jax.make_jaxpr(quantize)(x, jnp.float32(1), jnp.float32(1)))
        assert "mpmd_map" not in str(jax.make_jaxpr(quantize)(x[:, :96], jnp.float32(1), jnp.float32(1)))
