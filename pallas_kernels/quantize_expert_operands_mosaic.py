"""`quantize_expert_operands` for Hopper (Pallas Mosaic GPU, sm_90a).

Tiles and threads are those of pallas_kernels/quantize_operands_mosaic.py, but a tile starts at a row of an expert and
has no other's: its last may hang over what the expert has. TMA loads 128 rows from any row on. Rows that are another
expert's are zero for the blocks of 16 rows, are not stored with the blocks of 16 columns, and the next tile reads them
again. Results are stored block of 16 rows by block, the last of them as many rows as there are.

The maxima are a kernel of their own, since no tile can be rounded before all of its expert's have been seen. It reads
x once for both.

Shapes: M rows sorted by expert, N columns, E experts, T tiles of 128 rows, each of A blocks of 16 rows; B blocks of 16
columns.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import floats
from pallas_kernels.grouped_matmul_kernels import TILE_ROWS
from pallas_kernels.grouped_matmul_mosaic import row_tiles
from pallas_kernels.mosaic import Interpret, kernel_call
from pallas_kernels.nvfp4 import BLOCK
from pallas_kernels.nvfp4_mosaic import column_bytes, encoding, gathered, halves, iota, row_bytes, transformed
from pallas_kernels.quantize_mosaic import THREADS
from pallas_kernels.quantize_operands_mosaic import (
    COLUMNS,
    OF_COLUMNS,
    OF_ROWS,
    ROWS,
    A,
    B,
    round_columns,
    round_rows,
    words_of_columns,
)
from pallas_kernels.random_bits import DGRAD, WGRAD, stream_bits, token_bits
from pallas_kernels.whole_blocks import whole_rows

assert ROWS == TILE_ROWS
SPLITS = 3  # blocks of threads that share the columns of a row of tiles in `expert_maxima`
STAGES = 2  # tiles that each of them has in flight


class _Tiles(NamedTuple):
    """Int32 [T]: expert of each tile (E: no tile), first row, end of the expert's rows, first row in whole blocks."""

    group: jax.Array
    row: jax.Array
    end: jax.Array
    place: jax.Array


def quantize_expert_operands(
    x: jax.Array,
    group_sizes: jax.Array,
    amax: jax.Array | None,
    amax_columns: jax.Array | None,
    hadamard: bool,
    seed: jax.Array | None,
    entries: jax.Array | None,
    interpret: Interpret = None,
) -> tuple[Any, Any]:
    """Arguments and results as of `quantize_expert_operands.quantize_expert_operands`; see `_whole_tiles`."""
    columns = x.shape[1]
    x = _whole_tiles(x)
    m, n = x.shape
    experts = len(group_sizes)
    wanted = (amax is not None, amax_columns is not None)
    tiles = _tiles(group_sizes, m)
    nothing = jnp.ones(experts, jnp.float32)
    maxima = [nothing if each is None else each for each in (amax, amax_columns)]
    maxima = [floats.bits_of(each) for each in maxima]
    bits = _bits_of_tiles(tiles, seed, entries, wanted) if seed is not None else []
    kernel = _kernel(m, n, experts, len(tiles.group), wanted, hadamard, seed is not None, interpret)
    found = iter(kernel(*tiles, *maxima, *bits, _words(x, interpret)))

    def result(rows):
        return lax.bitcast_convert_type(next(found).reshape(rows, n // 2), jnp.bfloat16).reshape(rows, n)[:, :columns]

    return result(m) if wanted[0] else None, result(whole_rows(m, experts, BLOCK)) if wanted[1] else None


def expert_maxima(
    x: jax.Array, group_sizes: jax.Array | None, hadamard: bool, interpret: Interpret = None
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as of `quantize_expert_operands.expert_maxima`."""
    x = _whole_tiles(x)
    m, n = x.shape
    tiles = _tiles(group_sizes, m) if group_sizes is not None else _tiles_of_one(m)
    experts = len(group_sizes) if group_sizes is not None else 1
    kernel = _maxima_kernel(m, n, experts, len(tiles.group), hadamard, interpret)
    (of_tiles,) = kernel(tiles.group, tiles.row, tiles.end, _words(x, interpret))
    of_tiles = of_tiles.reshape(len(tiles.group), -1, 2, THREADS).max((1, 3))
    # No scatter, whose order is any: a masked maximum of so few numbers is one small kernel.
    of_expert = jnp.where(tiles.group == jnp.arange(experts)[:, None], of_tiles.T[:, None], 0).max(2)
    plain, turned = floats.float_of(of_expert.astype(jnp.uint32))
    return plain, turned


def _whole_tiles(x):
    """x with columns of zeros up to a multiple of COLUMNS: a copy, where there are any."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % COLUMNS)))


def _tiles(group_sizes, m):
    cut = row_tiles(group_sizes, m)
    group = jnp.arange(len(group_sizes) + 1, dtype=jnp.int32)
    blocks = (group_sizes + BLOCK - 1) // BLOCK * BLOCK
    filled_starts = jnp.where(group[:-1] < group[:, None], blocks, 0).sum(1, dtype=jnp.int32)
    return _Tiles(cut.group, cut.row, cut.end, cut.row + (filled_starts - cut.starts)[cut.group])


def _tiles_of_one(m):
    """Of one expert that has all rows: what `_tiles` needs many operations for."""
    tile = jnp.arange(-(-m // ROWS), dtype=jnp.int32)
    nothing = jnp.zeros_like(tile)
    return _Tiles(nothing, tile * ROWS, jnp.full_like(tile, m), nothing)


def _words(x, interpret):
    """x as words of two columns; in the interpreter as fine as they lie in shared memory, for want of reshaped refs."""
    m, n = x.shape
    words = lax.bitcast_convert_type(x.reshape(m, n // 2, 2), jnp.uint32)
    return words if interpret is None else words.reshape(m, n // BLOCK, 8)


def _bits_of_tiles(tiles, seed, entries, wanted):
    """`token_bits` of the rows of each tile, [T 128], for each of the results."""
    rows = jnp.minimum(tiles.row[:, None] + jnp.arange(ROWS, dtype=jnp.int32), len(entries) - 1)
    bits = (token_bits(stream_bits(seed, stream), entries)[rows].reshape(-1) for stream in (DGRAD, WGRAD))
    return [each for each, given in zip(bits, wanted, strict=True) if given]


@functools.lru_cache
def _kernel(m, n, experts, tiles, wanted, hadamard, stochastic, interpret):
    by_rows, by_columns = wanted
    both = by_rows and by_columns

    def body(group_g, row_g, end_g, place_g, amax_g, amax_columns_g, *refs):
        bits = list(refs[: sum(wanted) * stochastic])
        x_g, *rest = refs[len(bits) :]
        outputs, (x_s, full, *more) = rest[: sum(wanted)], rest[sum(wanted) :]
        tile, tile_b = lax.axis_index("tile"), lax.axis_index("b") * B
        group, row = group_g[tile], row_g[tile]
        count = end_g[tile] - row  # rows of the tile, or more

        def rows(a, rows_s, of_expert):
            draw = None
            if stochastic:
                row = tile * ROWS + (a + iota(OF_ROWS, 0)) * BLOCK + iota(OF_ROWS, 1)
                draw = row_bytes(gathered(bits[0], row, interpret), tile_b + iota(OF_ROWS, 2))
            round_rows(x_s, rows_s, a, of_expert, draw, interpret)

        def columns(a, of_expert):
            bytes_of = None
            if stochastic:
                first = tile * ROWS + (a + iota(OF_COLUMNS, 0)) * BLOCK
                of_tokens = [gathered(bits[-1], first + row, interpret) for row in range(BLOCK)]
                drawn = column_bytes(of_tokens, tile_b + iota(OF_COLUMNS, 2), iota(OF_COLUMNS, 3))
                kept = _kept([word for word, _ in drawn(0)], a, count)
                bytes_of = lambda parity: [(word, parity) for word in kept]  # noqa: E731
            words = _kept(words_of_columns(x_s, a), a, count)
            round_columns(words, x_s, a, of_expert, bytes_of, hadamard, interpret)

        @pl.when(group < experts)
        def work():
            _load_tile(x_g, row, tile_b, x_s, full, interpret)
            plgpu.barrier_wait(full)
            if by_rows:
                rows_s = more[0] if both else x_s
                of_rows = encoding(amax_g[group], OF_ROWS, interpret)
                lax.fori_loop(0, A // OF_ROWS[0], lambda i, _: rows(i * OF_ROWS[0], rows_s, of_rows), None)
                plgpu.commit_smem()
                lax.fori_loop(
                    0, A, lambda a, _: _store_rows(rows_s, a, outputs[0], row, count, tile_b, interpret), None
                )
            if by_columns:
                of_columns = encoding(amax_columns_g[group], OF_COLUMNS, interpret)
                lax.fori_loop(0, A // OF_COLUMNS[0], lambda i, _: columns(i * OF_COLUMNS[0], of_columns), None)
                plgpu.commit_smem()

                def store(a, _):
                    @pl.when(a * BLOCK < count)
                    def store_block():
                        _store(x_s, a, 0, BLOCK, outputs[-1], place_g[tile] + a * BLOCK, tile_b, interpret)

                lax.fori_loop(0, A, store, None)
            plgpu.wait_smem_to_gmem(0)

    sizes = (m, whole_rows(m, experts, BLOCK))
    tile_of_words = plgpu.SMEM((A, BLOCK, B, 8), jnp.uint32)
    return kernel_call(
        body,
        warpgroups=1,
        interpret=interpret,
        auto_barriers=False,
        lanes=True,
        out_type=[_matrix(rows, n, interpret) for rows, given in zip(sizes, wanted, strict=True) if given],
        grid=(tiles, n // COLUMNS),
        grid_names=("tile", "b"),
        scratch_types=[tile_of_words, _loaded(interpret), *([tile_of_words] if both else [])],
    )


@functools.lru_cache
def _maxima_kernel(m, n, experts, tiles, hadamard, interpret):
    column_tiles = n // COLUMNS
    splits = min(SPLITS, column_tiles)

    def body(group_g, row_g, end_g, x_g, out_g, x_s, full):
        tile, split = lax.axis_index("tile"), lax.axis_index("split")
        row = row_g[tile]
        count = end_g[tile] - row
        steps = lax.div(column_tiles - split + splits - 1, jnp.int32(splits))

        def load(step):
            slot = lax.rem(step, jnp.int32(STAGES))
            _load_tile(x_g, row, (split + step * splits) * B, x_s.at[slot], full.at[slot], interpret)

        def one_step(step, found):
            slot = lax.rem(step, jnp.int32(STAGES))
            plgpu.barrier_wait(full.at[slot])

            def blocks(i, found):
                a = i * OF_COLUMNS[0]
                return _larger(found, _kept(words_of_columns(x_s.at[slot], a), a, count), hadamard, interpret)

            found = lax.fori_loop(0, A // OF_COLUMNS[0], blocks, found)
            plgpu.commit_smem()  # every thread has read the slot

            @pl.when(step + STAGES < steps)
            def _():
                load(step + STAGES)

            return found

        @pl.when(group_g[tile] < experts)
        def _():
            for step in range(STAGES):
                pl.when(step < steps)(functools.partial(load, jnp.int32(step)))
            none = iota(OF_COLUMNS, 0) * 0
            found = lax.fori_loop(0, steps, one_step, (none, none))
            for which, largest in enumerate(found):
                out_g.at[tile, split, which][...] = largest

    return kernel_call(
        body,
        warpgroups=1,
        interpret=interpret,
        auto_barriers=False,
        lanes=True,
        out_type=[jax.ShapeDtypeStruct((tiles, splits, 2, *OF_COLUMNS), jnp.int32)],
        grid=(tiles, splits),
        grid_names=("tile", "split"),
        scratch_types=[plgpu.SMEM((STAGES, A, BLOCK, B, 8), jnp.uint32), _loaded(interpret, STAGES)],
    )


def _larger(found, words, hadamard, interpret):
    """The larger of what was found and of the bits of |x| and |H(x)|, thread by thread; NaN above all."""
    plain, turned = found
    for parity in range(2):
        parts = [halves(word)[parity] for word in words]
        plain = functools.reduce(jnp.maximum, map(_size, parts), plain)
        if hadamard:
            turned = functools.reduce(jnp.maximum, map(_size, transformed(parts, interpret)), turned)
    return plain, turned if hadamard else plain


def _size(part):
    """float32 -> int32, ordered as the sizes are."""
    return lax.bitcast_convert_type(part, jnp.int32) & jnp.int32(0x7FFFFFFF)


def _kept(words, a, count):
    """`words_of_columns` from the tile's a-th block of rows on, zero where the tile has no row."""
    first = (a + iota(OF_COLUMNS, 0)) * BLOCK
    return [jnp.where(first + row < count, word, jnp.uint32(0)) for row, word in enumerate(words)]


def _matrix(rows, n, interpret):
    return jax.ShapeDtypeStruct((rows, n // 2) if interpret is None else (rows, n // BLOCK, 8), jnp.uint32)


def _loaded(interpret, slots=1):
    """The barrier of a tile, or of some: arrivals of `_load_tile`."""
    return plgpu.Barrier(num_arrivals=1 if interpret is None else A, num_barriers=slots)


def _load_tile(x_g, row, tile_b, x_s, full, interpret):
    """128 rows from any on, 64 columns; past the end of x zeros, or anything."""
    if interpret is None:
        here = x_g.at[pl.ds(row, ROWS), pl.ds(tile_b * 8, B * 8)]
        plgpu.copy_gmem_to_smem(here, x_s.reshape(ROWS, B * 8), full)
        return
    for a in range(A):
        plgpu.copy_gmem_to_smem(x_g.at[pl.ds(row + a * BLOCK, BLOCK), pl.ds(tile_b, B)], x_s.at[a], full)


def _store(tile_s, a, first, size, out_g, row, tile_b, interpret):
    """``size`` rows of the tile's a-th block, from the first on -> out_g[row : row + size]."""
    if interpret is None:
        made = tile_s.reshape(ROWS, B * 8).at[pl.ds(a * BLOCK + first, size)]
        plgpu.copy_smem_to_gmem(made, out_g.at[pl.ds(row, size), pl.ds(tile_b * 8, B * 8)])
    else:
        made = tile_s.at[a, pl.ds(first, size)]
        plgpu.copy_smem_to_gmem(made, out_g.at[pl.ds(row, size), pl.ds(tile_b, B)])


def _store_rows(tile_s, a, out_g, row, count, tile_b, interpret):
    """Those of the ``count`` rows of a tile that its a-th block has -> out_g, whose row is the tile's first."""
    left = jnp.clip(count - a * BLOCK, 0, BLOCK)
    for size in (16, 8, 4, 2, 1):
        at = left & -2 * size

        @pl.when((left & size) != 0)
        def _(size=size, at=at):
            _store(tile_s, a, at, size, out_g, row + a * BLOCK + at, tile_b, interpret)
