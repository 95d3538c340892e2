"""`quantize_operands` for Hopper (Pallas Mosaic GPU, sm_90a): x is read once, each result is written once.

As in pallas_kernels/quantize_mosaic.py a thread owns whole blocks: 16 columns of a row, then 16 rows of two columns.
Results are as large as x and take its place in shared memory, thread by thread; where both are wanted, the rows get
memory of their own, since the columns still read x.

Shapes: M rows, N columns of x; a tile has A blocks of 16 rows and B blocks of 16 columns.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import Interpret, kernel_call
from pallas_kernels.nvfp4 import BLOCK
from pallas_kernels.nvfp4_mosaic import (
    UNDERFLOW_BFLOAT16,
    Draw,
    Encoding,
    column_bytes,
    encoding,
    gathered,
    halves,
    iota,
    load_words,
    nearest_value,
    row_bytes,
    scaled,
    stochastic_value,
    transformed,
)
from pallas_kernels.quantize_mosaic import THREADS, block_numbers, tile_ends

A, B = 8, 4  # a tile of 128 rows and 64 columns
ROWS, COLUMNS = A * BLOCK, B * BLOCK
OF_ROWS = (THREADS // COLUMNS, BLOCK, B, 1)  # what the threads hold of each array: blocks of 16 columns ...
OF_COLUMNS = (THREADS // (8 * B), 1, B, 8)  # ... and pairs of columns in blocks of 16 rows


def unfit(x: jax.Array) -> str:
    """Why the kernel cannot take x [M, N], or ""."""
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {x.dtype}"
    return "" if x.size else "x is empty"


def quantize_operands(
    x: jax.Array,
    amax: jax.Array | None,
    amax_columns: jax.Array | None,
    hadamard: bool,
    seed: jax.Array | None,
    interpret: Interpret = None,
) -> tuple[Any, Any]:
    """Arguments and results as of `quantize_operands.quantize_operands`.

    M that is no multiple of ROWS, and N of COLUMNS, are padded: a copy of x and of the results.
    """
    shape = x.shape
    x = jnp.pad(x, ((0, -shape[0] % ROWS), (0, -shape[1] % COLUMNS)))
    m, n = x.shape
    wanted = (amax is not None, amax_columns is not None)
    words = lax.bitcast_convert_type(x.reshape(m, n // 2, 2), jnp.uint32)
    if interpret is not None:
        words = words.reshape(m // BLOCK, BLOCK, n // BLOCK, 8)
    of_rows, of_columns = (jnp.ones((), jnp.float32) if each is None else each for each in (amax, amax_columns))
    numbers = block_numbers(of_rows, of_columns, seed, m)
    found = iter(_kernel(m, n, wanted, hadamard, seed is not None, interpret)(*numbers, words))

    def result(in_rows, in_columns):  # elements of a scale
        values = lax.bitcast_convert_type(next(found).reshape(m, n // 2), jnp.bfloat16).reshape(m, n)
        scales = next(found).reshape(m // in_rows, n // in_columns)
        return values[: shape[0], : shape[1]], scales[: shape[0] // in_rows, : shape[1] // in_columns]

    return result(1, BLOCK) if wanted[0] else None, result(BLOCK, 1) if wanted[1] else None


@functools.lru_cache
def _kernel(m, n, wanted, hadamard, stochastic, interpret):
    by_rows, by_columns = wanted
    both = by_rows and by_columns

    def body(amax_g, amax_columns_g, *refs):
        bits_g = refs[0] if stochastic else None
        x_g, refs = refs[stochastic], refs[stochastic + 1 :]
        outputs, (x_s, full, *more) = refs[: 2 * sum(wanted)], refs[2 * sum(wanted) :]
        tile_a, tile_b = lax.axis_index("a") * A, lax.axis_index("b") * B
        here = (tile_a, A, BLOCK), (tile_b, B, 8)
        plgpu.copy_gmem_to_smem(*tile_ends(x_g, x_s, *here, interpret=interpret), full)
        of_rows = encoding(amax_g[0], OF_ROWS, interpret)
        of_columns = encoding(amax_columns_g[0], OF_COLUMNS, interpret)
        plgpu.barrier_wait(full)

        def write(made, to):
            plgpu.commit_smem()
            to, made = tile_ends(to, made, *here, interpret=interpret)
            plgpu.copy_smem_to_gmem(made, to)

        if by_rows:
            rows_s = more[0] if both else x_s
            rows = functools.partial(_rows, of_rows, x_s, rows_s, outputs[1], tile_a, tile_b, bits_g, interpret)
            lax.fori_loop(0, A // OF_ROWS[0], lambda i, _: rows(i * OF_ROWS[0]), None)
            write(rows_s, outputs[0])
        if by_columns:
            columns = functools.partial(
                _columns, of_columns, x_s, outputs[-1], tile_a, tile_b, hadamard, bits_g, interpret
            )
            lax.fori_loop(0, A // OF_COLUMNS[0], lambda i, _: columns(i * OF_COLUMNS[0]), None)
            write(x_s, outputs[-2])
        plgpu.wait_smem_to_gmem(0)

    blocks_m, blocks_n = m // BLOCK, n // BLOCK
    fine = interpret is not None  # as in `tile_ends`
    values = jax.ShapeDtypeStruct((blocks_m, BLOCK, blocks_n, 8) if fine else (m, n // 2), jnp.uint32)
    scales = [(blocks_m, BLOCK, blocks_n, 1), (blocks_m, 1, blocks_n, 8, 2)]
    of_scales = [jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in scales]
    tile = plgpu.SMEM((A, BLOCK, B, 8), jnp.uint32)
    return kernel_call(
        body,
        warpgroups=1,
        interpret=interpret,
        auto_barriers=False,
        lanes=True,
        out_type=[z for i in range(2) if wanted[i] for z in (values, of_scales[i])],
        grid=(blocks_m // A, blocks_n // B),
        grid_names=("a", "b"),
        scratch_types=[tile, plgpu.Barrier(num_arrivals=1), *([tile] if both else [])],
    )


def _rows(of_tensor, x_s, rows_s, scales_g, tile_a, tile_b, bits_g, interpret, a):
    """Blocks of 16 columns of the rows of some blocks of rows, from the a-th of the tile on."""
    draw = None
    if bits_g is not None:
        along = functools.partial(iota, OF_ROWS)
        row = (tile_a + a + along(0)) * BLOCK + along(1)
        draw = row_bytes(gathered(bits_g, row, interpret), tile_b + along(2))
    scale = round_rows(x_s, rows_s, a, of_tensor, draw, interpret)
    scales_g.at[pl.ds(tile_a + a, OF_ROWS[0]), :, pl.ds(tile_b, B), :][...] = scale.astype(jnp.uint8)


def _columns(of_tensor, x_s, scales_g, tile_a, tile_b, hadamard, bits_g, interpret, a):
    """Blocks of 16 rows, from the a-th of the tile on, of all columns; in place."""
    bytes_of = None
    if bits_g is not None:
        along = functools.partial(iota, OF_COLUMNS)
        first = bits_g.shape[0] // 2 + (tile_a + a + along(0)) * BLOCK
        of_tokens = [gathered(bits_g, first + row, interpret) for row in range(BLOCK)]
        bytes_of = column_bytes(of_tokens, tile_b + along(2), along(3))
    words = words_of_columns(x_s, a)
    scales = round_columns(words, x_s, a, of_tensor, bytes_of, hadamard, interpret)
    for parity, scale in enumerate(scales):
        there = scales_g.at[pl.ds(tile_a + a, OF_COLUMNS[0]), :, pl.ds(tile_b, B), :, parity]
        there[...] = scale.astype(jnp.uint8)


def round_rows(
    x_s: Any, rows_s: Any, a: Any, of_tensor: Encoding, draw: list[Draw] | None, interpret: Interpret
) -> Any:
    """Tile x_s [A, 16, B, 8], from its a-th block of rows on -> the same of rows_s; e4m3 codes uint32 of the scales.

    The other arguments are those of `nvfp4_mosaic.scaled`, and a byte of each part for stochastic rounding; arrays
    are as OF_ROWS.
    """
    here = pl.ds(a, OF_ROWS[0])
    words = [load_words(x_s.at[here, :, :, pl.ds(j, 1)], OF_ROWS) for j in range(8)]
    parts = [half for word in words for half in halves(word)]
    scale, operands = _operands(parts, of_tensor, draw, interpret)
    for j in range(8):
        rows_s.at[here, :, :, pl.ds(j, 1)][...] = word_of(operands[2 * j], operands[2 * j + 1])
    return scale


def words_of_columns(x_s: Any, a: Any) -> list[Any]:
    """The 16 rows of blocks of a tile [A, 16, B, 8], from its a-th block on: each as OF_COLUMNS."""
    here = pl.ds(a, OF_COLUMNS[0])
    return [load_words(x_s.at[here, pl.ds(row, 1), :, :], OF_COLUMNS) for row in range(BLOCK)]


def round_columns(
    words: list[Any],
    to_s: Any,
    a: Any,
    of_tensor: Encoding,
    bytes_of: Callable[[int], list[Draw]] | None,
    hadamard: bool,
    interpret: Interpret,
) -> list[Any]:
    """`words_of_columns` -> the same place of to_s; codes of the scales of even and of odd columns."""
    scales, made = [], []
    for parity in range(2):
        parts = [halves(word)[parity] for word in words]
        parts = transformed(parts, interpret) if hadamard else parts
        scale, operands = _operands(parts, of_tensor, bytes_of(parity) if bytes_of else None, interpret)
        scales.append(scale)
        made.append(operands)
    for row, pair in enumerate(zip(*made, strict=True)):
        to_s.at[pl.ds(a, OF_COLUMNS[0]), pl.ds(row, 1), :, :][...] = word_of(*pair)
    return scales


def _operands(parts, of_tensor, draw, interpret):
    """The codes of scales, and 16 arrays of code * scale, float32 that are bfloat16."""
    scale, value, parts = scaled(parts, of_tensor, interpret, underflow=UNDERFLOW_BFLOAT16 if draw is None else None)
    if draw is None:
        return scale, [nearest_value(part, interpret) * value for part in parts]
    return scale, [stochastic_value(part, each, interpret) * value for part, each in zip(parts, draw, strict=True)]


def word_of(low: Any, high: Any) -> Any:
    """Two float32 that are bfloat16 -> uint32."""
    low, high = (lax.bitcast_convert_type(z, jnp.uint32) for z in (low, high))
    return low >> jnp.uint32(16) | high & jnp.uint32(0xFFFF0000)
