"""`quantize_tiles` for Hopper (Pallas Mosaic GPU, sm_90a): w is read once, the operand is written once.

As in pallas_kernels/quantize_operands_mosaic.py a thread has 16 rows of two columns. Eight neighbours have a tile of
16x16, whose maximum they find by three exchanges, so that no pass over w is needed for it. What of a block of threads
hangs over the end of w is not there for TMA: it loads zeros and stores nothing.

Shapes: E tensors, each of M rows and N columns; a block of threads has A tiles down and B across.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import floats
from pallas_kernels.mosaic import Interpret, kernel_call
from pallas_kernels.nvfp4 import BLOCK
from pallas_kernels.nvfp4_mosaic import (
    UNDERFLOW_BFLOAT16,
    UNDERFLOW_FLOAT32,
    encoding,
    halves,
    iota,
    largest_of_neighbours,
    load_words,
    nearest_value,
    scaled,
)
from pallas_kernels.quantize_operands_mosaic import word_of

A, B = 4, 4
PAIRS = (A, 1, B, 8)  # what the threads hold of a row: pairs of columns


def unfit(w: jax.Array, dtype: DTypeLike) -> str:
    """Why the kernel cannot make operands of a dtype of w [..., M, N], or ""."""
    if dtype != jnp.bfloat16:
        return f"the operand must be bfloat16, got {jnp.dtype(dtype)}"
    return "" if w.size else "w is empty"


def quantize_tiles(w: jax.Array, amax: jax.Array, dtype: DTypeLike, interpret: Interpret = None) -> jax.Array:
    """Arguments and results as of `quantize_tiles.quantize_tiles`."""
    assert dtype == jnp.bfloat16
    *rest, m, n = w.shape
    tensors, rows = math.prod(rest), math.prod(rest) * m
    z = w.reshape(rows, n)
    if interpret is not None:  # which knows no ends
        z = jnp.pad(z, ((0, -rows % (A * BLOCK)), (0, -n % (B * BLOCK))))
    if w.dtype == jnp.bfloat16:
        z = lax.bitcast_convert_type(z.reshape(*z.shape[:1], -1, 2), jnp.uint32)
    kernel = _kernel(tensors, m // BLOCK, n // BLOCK, w.dtype == jnp.float32, interpret)
    if interpret is not None:
        z = z.reshape(-1, BLOCK, -(-n // (B * BLOCK)) * B, *_words(w.dtype == jnp.float32))
    (made,) = kernel(floats.bits_of(amax.reshape(tensors)), z)
    if interpret is not None:
        made = made.reshape(made.shape[0] * BLOCK, -1)[:rows, : n // 2]
    return lax.bitcast_convert_type(made, jnp.bfloat16).reshape(w.shape)


def _words(wide):
    """The 16 columns of a tile: pairs of float32, or words of two bfloat16."""
    return (8, 2) if wide else (8,)


@functools.lru_cache
def _kernel(tensors, tiles_m, tiles_n, wide, interpret):
    grid = (-(-tensors * tiles_m // A), -(-tiles_n // B))
    dtype = jnp.float32 if wide else jnp.uint32

    def body(amax_g, w_g, out_g, w_s, out_s, full):
        tile_a, tile_b = lax.axis_index("a") * A, lax.axis_index("b") * B
        plgpu.copy_gmem_to_smem(_part(w_g, tile_a, tile_b, interpret), _matrix(w_s, interpret), full)
        tensor = [jnp.minimum(lax.div(tile_a + a, jnp.int32(tiles_m)), tensors - 1) for a in range(A)]
        of_tensor = encoding(_of_each(amax_g, tensor), PAIRS, interpret)
        plgpu.barrier_wait(full)
        rows = [w_s.at[:, pl.ds(row, 1)] for row in range(BLOCK)]
        if wide:
            both = [tuple(load_words(row.at[:, :, :, :, i], PAIRS) for i in range(2)) for row in rows]
        else:
            both = [halves(load_words(row, PAIRS)) for row in rows]
        parts = [part for each in both for part in each]
        across = functools.partial(largest_of_neighbours, interpret=interpret)
        _, value, parts = scaled(
            parts, of_tensor, interpret, across, underflow=UNDERFLOW_FLOAT32 if wide else UNDERFLOW_BFLOAT16
        )
        made = [nearest_value(part, interpret) * value for part in parts]
        for row in range(BLOCK):
            out_s.at[:, pl.ds(row, 1)][...] = word_of(made[2 * row], made[2 * row + 1])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(_matrix(out_s, interpret), _part(out_g, tile_a, tile_b, interpret))
        plgpu.wait_smem_to_gmem(0)

    shape: tuple[int, ...] = (tensors * tiles_m * BLOCK, tiles_n * 8)
    if interpret is not None:
        shape = (grid[0] * A, BLOCK, grid[1] * B, 8)
    return kernel_call(
        body,
        warpgroups=1,
        interpret=interpret,
        auto_barriers=False,
        lanes=True,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.uint32)],
        grid=grid,
        grid_names=("a", "b"),
        scratch_types=[
            plgpu.SMEM((A, BLOCK, B, *_words(wide)), dtype),
            plgpu.SMEM((A, BLOCK, B, 8), jnp.uint32),
            plgpu.Barrier(num_arrivals=1),
        ],
    )


def _of_each(ref: Any, places: list[Any]) -> Any:
    """As PAIRS: a number for each of the A tiles down."""
    tile = iota(PAIRS, 0)
    found = lax.broadcast(ref[places[0]], PAIRS)
    for a in range(1, A):
        found = jnp.where(tile == a, lax.broadcast(ref[places[a]], PAIRS), found)
    return found


def _part(ref: Any, tile_a: Any, tile_b: Any, interpret: Interpret) -> Any:
    """A x B tiles of w or of the operand; as fine as `_matrix` leaves them."""
    if interpret is not None:
        return ref.at[pl.ds(tile_a, A), :, pl.ds(tile_b, B)]
    words = BLOCK if ref.dtype == jnp.float32 else BLOCK // 2
    return ref.at[pl.ds(tile_a * BLOCK, A * BLOCK), pl.ds(tile_b * words, B * words)]


def _matrix(ref: Any, interpret: Interpret) -> Any:
    """Shared memory as TMA copies it: runs of 16 bytes and more. The interpreter knows no reshaped refs."""
    return ref if interpret is not None else ref.reshape(A * BLOCK, math.prod(ref.shape[2:]))
