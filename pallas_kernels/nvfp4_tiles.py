"""Weights in NVFP4 with blocks of 16x16: code * scale where the weight lies, in two passes over it.

What `quantize_nvfp4(block="16x16")` rounds to, without packed codes in between and without a transposition: the tiles
are the same from both sides. Its maxima are small, so that whoever needs the operand twice can keep them.

Shapes: M rows, N columns, both multiples of 16; any axes before them.
"""

import functools

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import floats
from pallas_kernels.nvfp4 import BLOCK, e2m1_value, nvfp4_codes


def tile_maxima(w: Array) -> Array:
    """w [..., M, N], any float dtype -> max |w| of each tile, float32 [..., M / 16, N / 16]; NaN where there is one."""
    *rest, m, n = w.shape
    rows = w.reshape(*rest, m // BLOCK, BLOCK, n)
    # Elementwise, since a reduction over two axes that are apart would be two passes over w.
    sizes = [floats.bits_of(rows[..., i, :].astype(jnp.float32)) & jnp.uint32(0x7FFFFFFF) for i in range(BLOCK)]
    columns = functools.reduce(jnp.maximum, sizes)
    return floats.float_of(columns.reshape(*rest, m // BLOCK, n // BLOCK, BLOCK).max(-1))


def tile_operand(w: Array, maxima: Array, amax: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """code * scale of each element, exact in bfloat16; the global scale is left out.

    Args:
      w: [..., M, N].
      maxima: `tile_maxima` of w.
      amax: float32 [...], of the tensors.
      dtype: of the result.

    Returns:
      [..., M, N], and the values of the scales, float32 [..., M / 16, N / 16].
    """
    *rest, m, n = w.shape
    tiles = w.reshape(*rest, m // BLOCK, BLOCK, n // BLOCK, BLOCK)
    largest = maxima[..., :, None, :, None]
    codes, scales = nvfp4_codes(tiles, amax[..., None, None, None, None], axis=-1, largest=largest)
    steps = floats.e4m3_value(scales)
    return (e2m1_value(codes) * steps).astype(dtype).reshape(w.shape), steps[..., 0, :, 0]
