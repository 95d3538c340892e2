"""code * scale of 16x16 tiles: the reference, and the kernel interpreted on the CPU, bit for bit `NVFP4.operand`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import floats, quantize_tiles
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.nvfp4 import quantize_nvfp4
from pallas_kernels.quantize_tiles import CASES, Case, example_inputs, quantize_tiles_reference, tile_scales
from pallas_kernels.quantize_tiles_mosaic import quantize_tiles as kernel
from pallas_kernels.quantize_tiles_mosaic import unfit


def bits(z):
    return np.asarray(z).view(np.uint16)


def example(case, seed=1):
    (w, _), _ = example_inputs(case, seed)
    return w


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.exponents else pytest.mark.slow, id=case.name) for case in CASES],
)
def test_values_are_those_of_the_codes_from_either_side(case):
    (w, amax), _ = example_inputs(case, 1)
    got, scales = quantize_tiles(w, amax), tile_scales(w, amax)
    matrices, values, steps = (z.reshape(-1, *z.shape[-2:]) for z in (w, got, scales))

    @jax.jit
    @jax.vmap
    def by_codes(w, amax):
        want = quantize_nvfp4(w, block="16x16", amax=amax)
        return want.operand(), quantize_nvfp4(w.T, block="16x16").operand().T, want.scales.astype(jnp.float32)

    want, from_the_side, of_rows = by_codes(matrices, amax.reshape(-1))
    np.testing.assert_array_equal(bits(values), bits(want))
    np.testing.assert_array_equal(bits(values), bits(from_the_side))
    np.testing.assert_array_equal(np.repeat(steps, 16, axis=1), of_rows)
    np.testing.assert_array_equal(quantize_tiles(w, amax, dtype=jnp.float32), got.astype(jnp.float32))


@pytest.mark.parametrize(
    "case",
    [
        Case("matrix", (64, 64), False),
        Case("tensors_in_a_block_of_threads", (5, 16, 80), True),
        pytest.param(Case("bfloat16", (2, 48, 144), False), marks=pytest.mark.slow),
        pytest.param(Case("float32", (2, 2, 64, 128), True), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_the_kernel(case, interpret):
    w = example(case).at[..., 3, 5].set(-0.0).at[..., :16, 16:32].set(0).at[..., 9, :].mul(300)
    w = w.at[..., 12, 40].set(1e-9)
    amax = floats.absolute_max(w, axis=(-2, -1))
    got, want = (f(w, amax, jnp.bfloat16) for f in (lambda *z: kernel(*z, interpret), quantize_tiles_reference))
    np.testing.assert_array_equal(bits(got), bits(want))
    assert got.shape == w.shape and len(np.unique(bits(want))) > 30


@pytest.mark.parametrize("float32", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_kernel_with_values_of_any_size(float32, interpret):
    """But those for which the CPU that interprets it has no subnormals: a GPU takes them, in the cases `any_size`."""
    w = example(Case("", (8, 32, 64), float32, (25, 25, 40, 124, 124, 124, 180, 246)))
    w = w.at[0].set(0).at[3, 3, 3].set(jnp.inf).at[3, 20, 40].set(-jnp.inf).at[4, 3, 3].set(jnp.nan)
    w = w.at[5, 16:, :16].mul(1e-9)  # its scales underflow
    amax = floats.absolute_max(w, axis=(1, 2)).at[2].mul(1000)  # of a larger tensor that it is a part of
    got, want = (f(w, amax, jnp.bfloat16) for f in (lambda *z: kernel(*z, interpret), quantize_tiles_reference))
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32), str(i))
    assert not got[0].any() and np.isnan(got[4].astype(jnp.float32)).all() and not got[5, 16:, :16].any()
    assert all(got[i].any() for i in (1, 2, 3, 5, 6, 7))


def test_operands_that_do_not_fit():
    w, amax = jnp.ones((2, 64, 48), jnp.bfloat16), jnp.ones(2)
    with pytest.raises(ValueError, match=r"amax must have shape \[...\] = \[2\], got \[\]"):
        quantize_tiles(w, amax[0])
    with pytest.raises(ValueError, match=r"both multiples of 16, got \[2, 64, 40\]"):
        quantize_tiles(w[:, :, :40], amax)
    with pytest.raises(ValueError, match="w must be bfloat16 or float32, got float16"):
        quantize_tiles(w.astype(jnp.float16), amax)
    with pytest.raises(ValueError, match="dtype must be bfloat16 or float32, got int8"):
        quantize_tiles(w, amax, dtype=jnp.int8)
    assert unfit(w, jnp.bfloat16) == ""
    assert unfit(w, jnp.float32) == "the operand must be bfloat16, got float32"
    assert unfit(w[:0], jnp.bfloat16) == "w is empty"
    with compiling_for("sm_90a"):
        for given in (w, w.astype(jnp.float32)):
            assert "mpmd_map" in str(jax.make_jaxpr(quantize_tiles)(given, amax))
        assert "mpmd_map" not in str(jax.make_jaxpr(lambda *z: quantize_tiles(*z, dtype=jnp.float32))(w, amax))
