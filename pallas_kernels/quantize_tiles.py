"""Weights in NVFP4 with blocks of 16x16, as bfloat16 operands: code * scale where the weight lies, in one pass over it.

What `quantize_nvfp4(block="16x16")` rounds to, without packed codes in between and without a transposition: the tiles
are the same from both sides, so that one operand serves the products along either axis.

Shapes: E tensors, each of M rows and N columns, both multiples of 16.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import floats, quantize_tiles_mosaic
from pallas_kernels.cost import BF16, FLOAT32, Cost
from pallas_kernels.dispatch import choose, require_shape, sharded
from pallas_kernels.nvfp4 import BLOCK, block_scales, e2m1_value, nvfp4_codes


def quantize_tiles(
    w: jax.Array, amax: jax.Array, *, dtype: DTypeLike = "bfloat16", impl: str | None = None
) -> jax.Array:
    """code * scale of each element, exact in bfloat16; the global scales are left out, as in `NVFP4.operand`.

    Args:
      w: [..., M, N] bfloat16 or float32, M and N multiples of 16.
      amax: float32 [...]: max |w| of each tensor, or of a larger one that it is a part of.
      dtype: of the result, bfloat16 or float32.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      [..., M, N].

    Raises:
      ValueError: shapes or dtypes do not fit, or `impl` cannot run.
    """
    if w.ndim < 2 or any(size % BLOCK for size in w.shape[-2:]):
        raise ValueError(f"quantize_tiles: w must be [..., M, N], both multiples of {BLOCK}, got {list(w.shape)}")
    require_shape("quantize_tiles", "amax", amax, "[...]", w.shape[:-2])
    dtype = jnp.dtype(dtype)
    for name, given in (("w", w.dtype), ("dtype", dtype)):
        if given not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"quantize_tiles: {name} must be bfloat16 or float32, got {given}")
    unfit = quantize_tiles_mosaic.unfit(w, dtype) or sharded()
    return _IMPLEMENTATIONS[choose("quantize_tiles", impl, unfit={"mosaic": unfit})](w, amax, dtype)


def quantize_tiles_reference(w: jax.Array, amax: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Arguments and results as of `quantize_tiles`."""
    *rest, m, n = w.shape
    tiles = w.reshape(*rest, m // BLOCK, BLOCK, n // BLOCK, BLOCK)
    largest = _maxima(w)[..., :, None, :, None]
    codes, scales = nvfp4_codes(tiles, amax[..., None, None, None, None], axis=-1, largest=largest)
    return (e2m1_value(codes) * floats.e4m3_value(scales)).astype(dtype).reshape(w.shape)


def tile_scales(w: jax.Array, amax: jax.Array) -> jax.Array:
    """The scales of the tiles, float32 [..., M / 16, N / 16]; arguments as of `quantize_tiles`."""
    return floats.e4m3_value(block_scales(_maxima(w), amax[..., None, None]))


def _maxima(w: jax.Array) -> jax.Array:
    """w [..., M, N] -> max |w| of each tile, float32 [..., M / 16, N / 16]; NaN where there is one."""
    *rest, m, n = w.shape
    rows = w.reshape(*rest, m // BLOCK, BLOCK, n)
    # Elementwise, since a reduction over two axes that are apart would be two passes over w.
    sizes = [floats.bits_of(rows[..., i, :].astype(jnp.float32)) & jnp.uint32(0x7FFFFFFF) for i in range(BLOCK)]
    columns = functools.reduce(jnp.maximum, sizes)
    return floats.float_of(columns.reshape(*rest, m // BLOCK, n // BLOCK, BLOCK).max(-1))


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": quantize_tiles_mosaic.quantize_tiles,
    "reference": quantize_tiles_reference,
}


class Case(NamedTuple):
    """One test or benchmark case: the shape of w, which has the dtype of master weights or is bfloat16.

    ``exponents``: of each tensor the lowest of the 8 that its numbers have, as float32 stores them; else normal data.
    """

    name: str
    shape: tuple[int, ...]
    float32: bool
    exponents: tuple[int, ...] = ()


CASES = (
    Case("one_tile", (16, 16), False),
    Case("whole", (128, 192), True),
    Case("tensors", (3, 64, 128), False),
    Case("odd_tiles", (2, 3, 48, 80), True),
    Case("odd_tiles_bfloat16", (5, 16, 208), False),
    Case("any_size", (8, 32, 64), True, (0, 1, 9, 20, 40, 124, 240, 247)),
    Case("any_size_bfloat16", (4, 32, 64), False, (0, 10, 25, 247)),
)

# Weights of Nano: in_proj, whose 10,304 columns are 161 x 64, and the up-projections of the experts of a layer.
BENCHMARKS = (
    Case("in_proj", (2688, 10304), False),
    Case("in_proj_float32", (2688, 10304), True),
    Case("experts", (128, 2688, 1856), False),
    Case("experts_float32", (128, 2688, 1856), True),
)


def example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random (args, kwargs) of `quantize_tiles` for a case; rows are of different sizes. w has the case's dtype."""
    of_w, of_sizes = jax.random.split(jax.random.key(seed))
    if case.exponents:
        drawn = jax.random.bits(of_w, case.shape, jnp.uint32)
        lowest = jnp.array(case.exponents, jnp.uint32)[:, None, None]
        w = floats.float_of(drawn & jnp.uint32(0x807FFFFF) | (lowest + (drawn >> 23) % 8) << 23)
    else:
        sizes = jnp.exp2(jax.random.randint(of_sizes, (*case.shape[:-1], 1), -6, 3).astype(jnp.float32))
        w = jax.random.normal(of_w, case.shape, jnp.float32) * sizes
    w = w if case.float32 else floats.to_bfloat16(w)
    return (w, floats.absolute_max(w, axis=(-2, -1))), {"dtype": dtype}


def cost(case: Case) -> Cost:
    """w is read once, the operand is written once."""
    return Cost(0.0, math.prod(case.shape) * ((FLOAT32 if case.float32 else BF16) + BF16))
