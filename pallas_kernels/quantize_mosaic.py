"""`quantize` for Hopper (Pallas Mosaic GPU, sm_90a): x is read once, codes and scales of both orientations are written.

A block of threads owns a tile of 128 rows. It comes into shared memory as words of two neighbouring columns, and is
read from there twice: by threads that each own 16 columns of a row, and by threads that each own 16 rows of four
columns, whole blocks of NVFP4 both times. What they do with them is pallas_kernels/nvfp4_mosaic.py.

Shapes: M rows, N columns of x; a tile has A blocks of 16 rows and B blocks of 16 columns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import floats
from pallas_kernels.mosaic import Interpret, kernel_call
from pallas_kernels.nvfp4 import BLOCK, NVFP4
from pallas_kernels.nvfp4_mosaic import (
    encoding,
    gathered,
    halves,
    iota,
    load_words,
    quantized,
    row_bytes,
    transformed,
)
from pallas_kernels.random_bits import DGRAD, WGRAD, stream_bits, token_bits, word_bits

ROWS = 128  # of a tile
A = ROWS // BLOCK
COLUMNS = (128, 64)  # of a tile: the first that divides N
THREADS = 128


def unfit(x: jax.Array) -> str:
    """Why the kernel cannot take x [M, N], or ""."""
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {x.dtype}"
    if x.shape[0] % ROWS or x.shape[1] % COLUMNS[-1] or not x.size:
        return f"M must be a multiple of {ROWS} and N of {COLUMNS[-1]}, got {list(x.shape)}"
    return ""


def quantize(
    x: jax.Array,
    amax: jax.Array,
    amax_columns: jax.Array,
    hadamard: bool,
    seed: jax.Array | None,
    interpret: Interpret = None,
) -> tuple[NVFP4, NVFP4]:
    """Arguments and results as of `quantize`."""
    m, n = x.shape
    words = lax.bitcast_convert_type(x.reshape(m, n // 2, 2), jnp.uint32)
    kernel = _kernel(m, n, hadamard, seed is not None, interpret)
    if interpret is not None:
        words = words.reshape(m // BLOCK, BLOCK, n // BLOCK // 2, 2, 4, 2)
    numbers = block_numbers(amax, amax_columns, seed, m)
    codes, scales, codes_columns, scales_columns = kernel(*numbers, words)

    def result(codes, scales, of, along, amax):
        codes = lax.bitcast_convert_type(codes.reshape(of, along // 8), jnp.uint8).reshape(of, along // 2)
        return NVFP4(codes, floats.as_e4m3(scales.reshape(of, along // BLOCK)), amax)

    return result(codes, scales, m, n, amax), result(codes_columns, scales_columns, n, m, amax_columns)


def block_numbers(amax: jax.Array, amax_columns: jax.Array, seed: jax.Array | None, rows: int) -> list[jax.Array]:
    """uint32: the bits of both maxima, [1]; with a seed `token_bits` of each row, first those for rows, [2 M].

    The maxima are arrays of their own, and the bits are one: to join or part them would be a small kernel more.
    """
    numbers = [floats.bits_of(z.reshape(1)) for z in (amax, amax_columns)]
    if seed is not None:
        of_streams = jnp.stack([stream_bits(seed, stream) for stream in (DGRAD, WGRAD)])
        numbers.append(token_bits(of_streams[:, None], jnp.arange(rows, dtype=jnp.uint32)).reshape(-1))
    return numbers


@functools.lru_cache
def _kernel(m, n, hadamard, stochastic, interpret):
    b_blocks = next(size for size in COLUMNS if n % size == 0) // BLOCK
    pairs = b_blocks // 2
    together = THREADS // (BLOCK * b_blocks)  # blocks of rows that the threads have one row of each
    of_rows, of_columns = (together, BLOCK, pairs, 2), (2, A, 2, 4)  # what the threads hold of each array

    def body(amax_g, amax_columns_g, *refs):
        bits, refs = refs[:stochastic], refs[stochastic:]
        x_g, codes_g, scales_g, codes_t_g, scales_t_g, x_s, codes_s, codes_t_s, full = refs
        tile_a, tile_b = lax.axis_index("a") * A, lax.axis_index("b") * pairs
        copies: list[tuple[Any, ...]] = [
            (x_g, x_s, (tile_a, A, BLOCK), (tile_b, pairs, BLOCK)),
            (codes_g, codes_s, (tile_a, A, BLOCK), (tile_b, pairs, 4)),
            (codes_t_g, codes_t_s, (tile_b, pairs, 2 * BLOCK), (tile_a, A, 2), 4),
        ]
        (x_in, x_to), *results = [tile_ends(*copy, interpret=interpret) for copy in copies]
        plgpu.copy_gmem_to_smem(x_in, x_to, full)
        rows_encoding = encoding(amax_g[0], of_rows, interpret)
        columns_encoding = encoding(amax_columns_g[0], of_columns, interpret)
        plgpu.barrier_wait(full)

        def rows(i, _):
            here = pl.ds(i * together, together)
            draws = None
            if stochastic:
                along = functools.partial(iota, of_rows)
                row = (tile_a + i * together + along(0)) * BLOCK + along(1)
                block = (tile_b + along(2)) * 2 + along(3)
                draws = row_bytes(gathered(bits[0], row, interpret), block)
            words = [load_words(x_s.at[here, :, :, :, j // 2, j % 2], of_rows) for j in range(8)]
            parts = [half for word in words for half in halves(word)]
            scale, packed = quantized(parts, rows_encoding, draws, interpret)
            for w in range(2):
                codes_s.at[here, :, :, :, w][...] = packed[w]
            there = pl.ds(tile_a + i * together, together)
            scales_g.at[there, :, pl.ds(tile_b, pairs), :][...] = scale.astype(jnp.uint8)

        def columns(i, _):
            # Four neighbouring columns, which have one hash. What is a warp's: four of them in each of two blocks, and
            # four blocks of rows, so that few threads want the same bank when they read, and when they write.
            here, there = pl.ds(i * 2, 2), pl.ds(tile_b + i * 2, 2)
            words = [
                [load_words(x_s.at[:, r, here, :, :, j].transpose((1, 0, 2, 3)), of_columns) for r in range(BLOCK)]
                for j in range(2)
            ]
            hashes = []
            if stochastic:
                along = functools.partial(iota, of_columns)
                block = (tile_b + i * 2 + along(0)) * 2 + along(2)
                word = (block * 4 + along(3)).astype(jnp.uint32)
                row = m + (tile_a + along(1)) * BLOCK
                hashes = [word_bits(gathered(bits[0], row + r, interpret), word) for r in range(BLOCK)]
            for column in range(4):
                parts = [halves(word)[column % 2] for word in words[column // 2]]
                parts = transformed(parts, interpret) if hadamard else parts
                draws = [(word, column) for word in hashes] if stochastic else None
                scale, packed = quantized(parts, columns_encoding, draws, interpret)
                for w in range(2):
                    codes_t_s.at[here, :, :, column, :, w].transpose((0, 3, 1, 2))[...] = packed[w]
                to = scales_t_g.at[there, :, :, column, pl.ds(tile_a, A)]
                to.transpose((0, 3, 1, 2))[...] = scale.astype(jnp.uint8)

        lax.fori_loop(0, A // together, rows, None)
        lax.fori_loop(0, pairs // 2, columns, None)
        plgpu.commit_smem()
        for to, made in results:
            plgpu.copy_smem_to_gmem(made, to)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    blocks_m, blocks_n = m // BLOCK, n // BLOCK
    codes: list[tuple[int, ...]] = [(m, n // 8), (n, m // 8)]
    if interpret is not None:
        codes = [(blocks_m, BLOCK, blocks_n // 2, 2, 2), (blocks_n // 2, 2, 4, 4, blocks_m, 2)]
    scales: list[tuple[int, ...]] = [(blocks_m, BLOCK, blocks_n // 2, 2), (blocks_n // 2, 2, 4, 4, blocks_m)]
    of_codes, of_codes_t = (jax.ShapeDtypeStruct(shape, jnp.uint32) for shape in codes)
    of_scales, of_scales_t = (jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in scales)
    return kernel_call(
        body,
        warpgroups=1,
        interpret=interpret,
        auto_barriers=False,
        lanes=True,
        out_type=[of_codes, of_scales, of_codes_t, of_scales_t],
        grid=(blocks_m // A, blocks_n // b_blocks),
        grid_names=("a", "b"),
        scratch_types=[
            plgpu.SMEM((A, BLOCK, pairs, 2, 4, 2), jnp.uint32),
            plgpu.SMEM((A, BLOCK, pairs, 2, 2), jnp.uint32),
            plgpu.SMEM((pairs, 2, 4, 4, A, 2), jnp.uint32),
            plgpu.Barrier(num_arrivals=1),
        ],
    )


def tile_ends(
    in_gmem: Any,
    in_smem: Any,
    outer: tuple[Any, ...],
    inner: tuple[Any, ...],
    axis: int = 2,
    *,
    interpret: Interpret,
) -> tuple[Any, Any]:
    """The two refs of a copy, of ``outer`` (first block, blocks, rows in each) times ``inner`` (first, blocks, words).

    Copied as matrices: TMA moves runs of 16 bytes and more. The interpreter, which knows no reshaped refs, copies
    arrays as fine as those in shared memory, of which the blocks' axes, 0 and ``axis``, are cut.
    """
    (first_outer, outer_blocks, rows), (first_inner, inner_blocks, words) = outer, inner
    if interpret is None:
        cut = pl.ds(first_outer * rows, outer_blocks * rows), pl.ds(first_inner * words, inner_blocks * words)
        return in_gmem.at[cut], in_smem.reshape(outer_blocks * rows, inner_blocks * words)
    within = (slice(None),) * (axis - 1)
    return in_gmem.at[pl.ds(first_outer, outer_blocks), *within, pl.ds(first_inner, inner_blocks)], in_smem
