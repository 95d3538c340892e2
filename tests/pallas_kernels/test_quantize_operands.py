"""code * scale along both axes: the reference, and the kernel interpreted on the CPU, bit for bit `NVFP4.operand`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import floats, quantize, quantize_operands
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.quantize import Case, example_inputs
from pallas_kernels.quantize_operands import CASES, quantize_operands_reference
from pallas_kernels.quantize_operands_mosaic import quantize_operands as kernel
from pallas_kernels.quantize_operands_mosaic import unfit


def same(got, want):
    for found, expected in zip(got, want, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            np.testing.assert_array_equal(np.asarray(found[0]).view(np.uint16), np.asarray(expected[0]).view("u2"))
            np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name == "one_block" else pytest.mark.slow, id=case.name) for case in CASES],
)
def test_values_are_those_of_the_codes(case):
    (x, *maxima), settings = example_inputs(case, 1, jnp.bfloat16)
    rows, columns = quantize_operands(x, *maxima, **settings)
    of_rows, of_columns = quantize(x, *maxima, **settings)
    scales = (floats.e4m3_bits(each.scales) for each in (of_rows, of_columns))
    same((rows, columns), ((of_rows.operand(), next(scales)), (of_columns.operand().T, next(scales).T)))
    same(quantize_operands(x, None, maxima[1], **settings), (None, columns))
    same(quantize_operands(x, maxima[0], None, **settings), (rows, None))


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        pytest.param(Case("both", 128, 128, False), (True, True), marks=pytest.mark.slow),
        (Case("both, drawn", 256, 64, True, True), (True, True)),
        (Case("rows, drawn", 128, 64, False, True), (True, False)),
        (Case("columns", 128, 64, True), (False, True)),
        pytest.param(Case("padded, drawn", 144, 80, True, True), (True, True), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_kernel(case, wanted, interpret):
    (x, *maxima), settings = example_inputs(case, 1, jnp.bfloat16)
    x = x.at[3, 5].set(-0.0).at[17].set(0).at[:16, 9].set(0).at[40:60, 8:40].mul(300)
    maxima = [amax if given else None for amax, given in zip(maxima, wanted, strict=True)]
    seed = settings.get("seed")
    got = kernel(x, *maxima, case.hadamard, seed, interpret)
    same(got, quantize_operands_reference(x, *maxima, case.hadamard, seed))


def test_operands_that_do_not_fit():
    x, amax = jnp.ones((128, 192), jnp.bfloat16), jnp.float32(1)
    with pytest.raises(ValueError, match="give amax, amax_columns or both"):
        quantize_operands(x, None, None)
    with pytest.raises(ValueError, match=r"amax must have shape \[\] = \[\], got \[1\]"):
        quantize_operands(x, amax[None], None)
    with pytest.raises(ValueError, match=r"multiples of 16, got \[128, 40\]"):
        quantize_operands(x[:, :40], amax, None)
    with pytest.raises(ValueError, match="bfloat16 or float32, got float16"):
        quantize_operands(x.astype(jnp.float16), amax, amax)
    assert unfit(x) == ""
    assert unfit(x.astype(jnp.float32)) == "x must be bfloat16, got float32"
    assert unfit(x[:0]) == "x is empty"
    with compiling_for("sm_90a"):
        assert "mpmd_map" in str(jax.make_jaxpr(quantize_operands)(x, amax, amax))
        assert "mpmd_map" not in str(jax.make_jaxpr(quantize_operands)(x.astype(jnp.float32), amax, amax))
