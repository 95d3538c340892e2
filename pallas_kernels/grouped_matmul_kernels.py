"""The kernels of the grouped matmul on Hopper (Mosaic GPU, sm_90a); grouped_matmul_mosaic.py calls them.

One schedule serves the product and both gradients. A persistent grid, one block per multiprocessor, walks over the
tiles of the output, 128 rows of `columns` columns each. Warpgroup 2 of a block loads operands by TMA into a ring of
slots that runs on across tiles, so that the loads of the next tile start during the epilogue of this one; warpgroups 0
and 1 multiply, 64 of the tile's rows each. Where one of them has no rows it lets the other have the tensor cores, and
the last tile of N is multiplied only as far as N goes.

Nothing is padded or copied in device memory. In products with the weights the tiles of a group start at its first row,
and those past its last are not stored: every row is written once, by one block, so results are the same bit for bit in
every run. In the gradient to rhs, steps start at multiples of 8 rows, and rows of other groups are zeroed in shared
memory, in the first and last step of a group alone.

Shapes: M rows, K inputs, N outputs, E groups, T row tiles.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.mosaic import WGMMA, Interpret, kernel_call
from pallas_kernels.mosaic import tiles as swizzled

NUM_SMS = 132  # H100 SXM, H200, GH200
TILE_ROWS = 128
STEP = 64  # contraction per slot of the ring: one swizzle atom of 128 bytes
STAGES = 4  # slots of the ring
ALIGN = 8  # rows of a swizzle atom


def _out_buffers(columns):
    """Buffers [64, 64] for each warpgroup's results on their way out: a tile's, or as many as the ring leaves."""
    return min(columns // 64, 3 if columns <= 192 else 2)


class RowTiles(NamedTuple):
    """Row tile t is rows row[t] .. min(row[t] + 128, end[t]) - 1, of group[t], which ends at row end[t].

    The rows past the last group form one more group, number E, whose tiles store zeros. Int32.
    """

    group: jax.Array  # [T]
    row: jax.Array  # [T]
    end: jax.Array  # [T]
    last: jax.Array  # [E + 1], tiles up to each group's last: at the end, how many are in use
    starts: jax.Array  # [E + 1], first row of each group, and the end of the last


class _Ring(NamedTuple):
    """Barriers of the slots: `full` after both loads, `free` after both multiplying warpgroups are done."""

    full: Any
    free: Any


_BARRIERS = _Ring(*[plgpu.Barrier(num_arrivals=2, num_barriers=STAGES)] * 2)


def _slot(step):
    return lax.rem(step, jnp.int32(STAGES))


def _launch(body, out, scratch, interpret, *operands):
    call = kernel_call(
        body,
        warpgroups=3,
        interpret=interpret,
        out_type=out,
        scratch_types=scratch,
        grid=(NUM_SMS,),
        grid_names=("sm",),
    )
    return call(*operands)


def _my_share(tiles):
    """This block's tiles, number and function of the index: neighbours in time are neighbours in memory."""
    sm = lax.axis_index("sm")
    return lax.div(tiles - sm + (NUM_SMS - 1), jnp.int32(NUM_SMS)), lambda i: sm + i * NUM_SMS


def _fill(ring, tiles, steps_of, load_of):
    """The loading warpgroup: every step of every tile in turn. load_of(i)(k, slot, barrier) loads step k of tile i."""
    plgpu.set_max_registers(40, action="decrease")

    def one_tile(i, step):
        load = load_of(i)

        def one_step(k, step):
            slot = _slot(step)

            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(ring.free.at[slot])

            load(k, slot, ring.full.at[slot])
            return step + 1

        return lax.fori_loop(0, steps_of(i), one_step, step)

    steps = lax.fori_loop(0, tiles, one_tile, jnp.int32(0))

    def drain(step, _):  # a barrier's phases must all be waited for
        plgpu.barrier_wait(ring.free.at[_slot(step)])

    lax.fori_loop(jnp.maximum(steps - STAGES, 0), steps, drain, None)


class _Work(NamedTuple):
    """A multiplying warpgroup's part of a tile: 64 rows."""

    needed: Any  # whether there is any
    columns_left: Any  # from the tile's first column on
    products: Any  # steps that are multiplied; the others of the tile are for `store`, which frees their slots
    multiply: Callable[..., None]  # (accumulator, step, slot): start the products of a step
    store: Callable[..., None]  # (sum [64, the tile's columns], the ring's step after the products)


def _multiply_tiles(ring, tiles, columns, outputs, steps_of, work_of):
    """A multiplying warpgroup: its part of every tile; work_of(i): the `_Work` of tile i."""
    plgpu.set_max_registers(232, action="increase")
    last_columns = outputs % columns

    def one_tile(i, first_step):
        steps, work = steps_of(i), work_of(i)

        def compute(width):
            def products(acc):
                def one_step(k, _):
                    slot = _slot(first_step + k)
                    plgpu.barrier_wait(ring.full.at[slot])
                    work.multiply(acc, k, slot)
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)  # the products before these are done
                    def free_slot():
                        plgpu.barrier_arrive(ring.free.at[_slot(first_step + k - 1)])

                lax.fori_loop(0, work.products, one_step, None)
                plgpu.wgmma_wait(0)

                @pl.when(work.products > 0)
                def free_last_slot():
                    plgpu.barrier_arrive(ring.free.at[_slot(first_step + work.products - 1)])

                return acc[...]

            work.store(pl.run_scoped(products, plgpu.ACC((64, width), jnp.float32)), first_step + work.products)

        def pass_by():
            def one_step(k, _):
                slot = _slot(first_step + k)
                plgpu.barrier_wait(ring.full.at[slot])
                plgpu.barrier_arrive(ring.free.at[slot])

            lax.fori_loop(0, steps, one_step, None)

        is_whole = work.columns_left >= columns
        if outputs >= columns:
            pl.when(work.needed & is_whole)(lambda: compute(columns))
        if last_columns:
            pl.when(work.needed & ~is_whole)(lambda: compute(last_columns))
        pl.when(~work.needed)(pass_by)
        return first_step + steps

    lax.fori_loop(0, tiles, one_tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _next_buffer(block, columns):
    """The buffer for a tile's block of this number, once its last store has left it: buffers take turns."""
    buffers = _out_buffers(columns)
    plgpu.wait_smem_to_gmem(0 if block == 0 else buffers - 1, wait_read_only=True)
    return block % buffers


def multiply_rows(
    lhs: jax.Array,
    rhs_EKN: jax.Array,
    tiles: RowTiles,
    columns: int,
    *,
    transposed: bool = False,
    activation: str | None = None,
    slope_at: jax.Array | None = None,
    scale: jax.Array | None = None,
    interpret: Interpret = None,
) -> jax.Array:
    """lhs [M, K] times each group's matrix, rhs [E, K, N] or, transposed, [E, N, K] -> [M, N], bfloat16.

    K and N are multiples of 64. Before the result is rounded, scale, float32 [E], multiplies the rows of its group,
    activation "relu2" makes max(z, 0)^2 of them, and slope_at [M, N], an earlier result max(z, 0)^2, multiplies them by
    the derivative 2 max(z, 0) = 2 sqrt(slope_at). Its blocks travel through the ring behind the operands of their tile.
    """
    rows, inputs = lhs.shape
    groups = rhs_EKN.shape[0]
    outputs = rhs_EKN.shape[1 if transposed else 2]
    column_tiles = pl.cdiv(outputs, columns)
    input_steps = pl.cdiv(inputs, STEP)

    def body(*refs):
        views = [_any_row(STAGES, TILE_ROWS, STEP, interpret), _any_row(2 * _out_buffers(columns), 64, 64, interpret)]
        pl.run_scoped(functools.partial(work, *refs), *views, collective_axes="wg")

    def work(group, row, end, last, lhs_hbm, rhs_hbm, *rest):
        scales, rest = (rest[0], rest[1:]) if scale is not None else (None, rest)
        *slope_hbm, out_hbm, rhs_smem, full, free, lhs_views, out_views = rest
        warpgroup = lax.axis_index("wg")
        ring = _Ring(full, free)
        my_tiles, tile_of = _my_share(last[groups] * column_tiles)
        lhs_smem, lhs_by_row = _views(lhs_views, interpret)
        out_smem, out_by_row = _views(out_views, interpret)

        def place(i):
            """Row tile and first column of tile i."""
            tile, column = lax.div(tile_of(i), jnp.int32(column_tiles)), lax.rem(tile_of(i), jnp.int32(column_tiles))
            return tile, column * columns

        def products_of(i):
            return jnp.where(group[place(i)[0]] < groups, input_steps, 0)

        def steps_of(i):
            blocks = jnp.minimum(columns, outputs - place(i)[1]) // 64 if slope_hbm else 0
            return products_of(i) + blocks

        def load_of(i):
            tile, column = place(i)
            products = products_of(i)
            row_slice, column_slice = pl.ds(row[tile], TILE_ROWS), pl.ds(column, columns)
            weight = rhs_hbm.at[jnp.minimum(group[tile], groups - 1)]

            def load(k, slot, barrier):
                def operands():
                    k_slice = pl.ds(k * STEP, STEP)
                    right = weight.at[column_slice, k_slice] if transposed else weight.at[k_slice, column_slice]
                    plgpu.copy_gmem_to_smem(lhs_hbm.at[row_slice, k_slice], lhs_by_row.at[slot], barrier)
                    plgpu.copy_gmem_to_smem(right, rhs_smem.at[slot], barrier)

                def slope_block():
                    block = slope_hbm[0].at[row_slice, pl.ds(column + (k - products) * 64, 64)]
                    plgpu.copy_gmem_to_smem(block, lhs_by_row.at[slot], barrier)
                    plgpu.barrier_arrive(barrier)  # in place of the second operand

                if not slope_hbm:
                    return operands()
                pl.when(k < products)(operands)
                pl.when(k >= products)(slope_block)

            return load

        def work_of(i):
            tile, column = place(i)
            first = row[tile] + 64 * warpgroup
            size = jnp.clip(end[tile] - first, 0, 64)
            mine = pl.ds(pl.multiple_of(64 * warpgroup, 64), 64)

            def multiply(acc, k, slot):
                left = lhs_smem.at[slot, mine]
                used = pl.ds(0, acc.shape[1])
                right = rhs_smem.at[slot]
                plgpu.wgmma(acc, left, right.at[used].transpose((1, 0)) if transposed else right.at[:, used])

            def slope(step):
                slot = _slot(step)
                plgpu.barrier_wait(ring.full.at[slot])
                activated = lhs_smem.at[slot, mine][...].astype(jnp.float32)
                plgpu.commit_smem()  # these reads come before the next copy into the slot
                plgpu.barrier_arrive(ring.free.at[slot])
                return 2.0 * jnp.sqrt(activated)

            def store(acc, step):
                if scales is not None:
                    acc = acc * scales[jnp.minimum(group[tile], groups - 1)]
                if activation == "relu2":
                    acc = jnp.square(jnp.maximum(acc, 0.0))
                for c in range(0, acc.shape[1], 64):
                    block = acc[:, c : c + 64]
                    if slope_hbm:
                        block = block * slope(step + c // 64)
                    buffer = warpgroup * _out_buffers(columns) + _next_buffer(c // 64, columns)
                    out_smem[buffer] = block.astype(out_hbm.dtype)
                    plgpu.commit_smem()
                    _store_rows(out_by_row.at[buffer], out_hbm.at[:, pl.ds(column + c, 64)], first, size)

            return _Work(size > 0, outputs - column, products_of(i), multiply, store)

        pl.when(warpgroup == 2)(lambda: _fill(ring, my_tiles, steps_of, load_of))
        pl.when(warpgroup < 2)(lambda: _multiply_tiles(ring, my_tiles, columns, outputs, steps_of, work_of))

    right = swizzled(STAGES, *((columns, STEP) if transposed else (STEP, columns)))
    out = jax.ShapeDtypeStruct((rows, outputs), lhs.dtype)
    more = [z for z in (scale, slope_at) if z is not None]
    return _launch(body, out, [right, *_BARRIERS], interpret, *tiles[:4], lhs, rhs_EKN, *more)


def _any_row(count, rows, columns, interpret):
    """bfloat16 [count, rows, 64] in shared memory, of which a TMA copy may take any rows, to and from any rows.

    wgmma wants swizzled tiles of 8 rows; where an array is one tile wide they follow each other, so the same bytes are
    swizzled rows. The swizzle goes by the address, so it is the same wherever a copy starts (CUDA C++ programming
    guide, "Swizzle pattern pointer offset computation"). The interpreter has no layouts and needs no second view.
    """
    by_tile = swizzled(count, rows, columns)
    if interpret is not None:
        return by_tile
    swizzle = plgpu.SwizzleTransform(128)  # type: ignore[abstract]
    return plgpu.RefUnion(by_tile, plgpu.SMEM((count, rows, columns), jnp.bfloat16, transforms=(swizzle,)))


def _views(allocated, interpret):
    """The two views of `_any_row`: for wgmma and stores of registers, and for TMA."""
    return (allocated, allocated) if interpret is not None else tuple(allocated)


def _store_rows(block_smem, out_hbm, row, count):
    """Start to store the first `count` rows, 1 to 64, of a block [64, 64] -> out[row : row + count]."""
    for size in (64, 32, 16, 8, 4, 2, 1):
        at = count & -2 * size

        @pl.when((count & size) != 0)
        def _(size=size, at=at):
            plgpu.copy_smem_to_gmem(block_smem.at[pl.ds(at, size)], out_hbm.at[pl.ds(row + at, size)])


def outer_products(
    lhs: jax.Array,
    d_out: jax.Array,
    tiles: RowTiles,
    columns: int,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    scale: jax.Array | None = None,
    interpret: Interpret = None,
) -> jax.Array:
    """lhs [M, K], d_out [M, N] -> [E, K, N]: per group lhs^T d_out, zero for empty groups.

    dtype: of the result, bfloat16 or float32; before it is rounded, scale, float32 [E], multiplies its group. M is a
    multiple of 8, K and N of 64. Rows past the last group may hold anything.
    """
    inputs, outputs = lhs.shape[1], d_out.shape[1]
    groups = tiles.starts.shape[0] - 1
    column_tiles = pl.cdiv(outputs, columns)
    per_group = pl.cdiv(inputs, TILE_ROWS) * column_tiles
    width = 128 // jnp.dtype(dtype).itemsize  # columns of a block that is stored: those of a swizzle atom

    def body(starts, lhs_hbm, d_out_hbm, *rest):
        scales, rest = (rest[0], rest[1:]) if scale is not None else (None, rest)
        out_hbm, lhs_smem, d_out_smem, out_smem, full, free, masked = rest
        warpgroup = lax.axis_index("wg")
        ring = _Ring(full, free)
        my_tiles, tile_of = _my_share(jnp.int32(groups * per_group))

        def place(i):
            """Group, first row (an input) and first column (an output) of tile i."""
            within = lax.rem(tile_of(i), jnp.int32(per_group))
            row, column = lax.div(within, jnp.int32(column_tiles)), lax.rem(within, jnp.int32(column_tiles))
            return lax.div(tile_of(i), jnp.int32(per_group)), row * TILE_ROWS, column * columns

        def span(group):
            """Rows of the group, and the aligned row that its first step starts at."""
            return starts[group], starts[group + 1], starts[group] & -ALIGN

        def steps_of(i):
            begin, end, first = span(place(i)[0])
            return jnp.where(end > begin, lax.div(end - first + (STEP - 1), jnp.int32(STEP)), 0)

        def load_of(i):
            group, row, column = place(i)
            first = span(group)[2]

            def load(k, slot, barrier):
                row_slice = pl.ds(pl.multiple_of(first + k * STEP, ALIGN), STEP)
                plgpu.copy_gmem_to_smem(lhs_hbm.at[row_slice, pl.ds(row, TILE_ROWS)], lhs_smem.at[slot], barrier)
                plgpu.copy_gmem_to_smem(d_out_hbm.at[row_slice, pl.ds(column, columns)], d_out_smem.at[slot], barrier)

            return load

        def work_of(i):
            group, tile_row, column = place(i)
            begin, end, first = span(group)
            row = tile_row + 64 * warpgroup

            def multiply(acc, k, slot):
                low, high = begin - first - k * STEP, end - first - k * STEP
                left = lhs_smem.at[slot, :, pl.ds(pl.multiple_of(64 * warpgroup, 64), 64)]
                right = d_out_smem.at[slot]

                @pl.when((low > 0) | (high < STEP))
                def mask_lhs():  # the columns that only this warpgroup reads
                    _keep_rows(left, low, high)
                    plgpu.commit_smem()

                # Rows past the last group may be NaN, and 0 * NaN is NaN: there, each masks half of what both read.
                @pl.when(first + (k + 1) * STEP > starts[groups])
                def mask_d_out():
                    for n in range(columns // 64):
                        block = right.at[:, pl.ds(64 * n, 64)]
                        pl.when(warpgroup == n % 2)(functools.partial(_keep_rows, block, low, high))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(masked)
                    plgpu.barrier_wait(masked)

                plgpu.wgmma(acc, left.transpose((1, 0)), right.at[:, pl.ds(0, acc.shape[1])])

            def store(acc, _):
                if scales is not None:
                    acc = acc * scales[group]
                for c in range(0, acc.shape[1], width):
                    buffer = _next_buffer(c // width, columns)

                    @pl.when(row < inputs)
                    def _(c=c, buffer=buffer):
                        block = out_smem.at[warpgroup, buffer]
                        block[...] = acc[:, c : c + width].astype(out_hbm.dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(block, out_hbm.at[group, pl.ds(row, 64), pl.ds(column + c, width)])

            # The two warpgroups meet where d_out is masked: there, neither may pass by.
            meets = first + steps_of(i) * STEP > starts[groups]
            return _Work((row < inputs) | meets, outputs - column, steps_of(i), multiply, store)

        pl.when(warpgroup == 2)(lambda: _fill(ring, my_tiles, steps_of, load_of))
        pl.when(warpgroup < 2)(lambda: _multiply_tiles(ring, my_tiles, columns, outputs, steps_of, work_of))

    scratch = [
        swizzled(STAGES, STEP, TILE_ROWS),
        swizzled(STAGES, STEP, columns),
        swizzled(2, _out_buffers(columns), 64, width, dtype=dtype),
        *_BARRIERS,
        plgpu.Barrier(num_arrivals=2),
    ]
    out = jax.ShapeDtypeStruct((groups, inputs, outputs), dtype)
    return _launch(body, out, scratch, interpret, tiles.starts, lhs, d_out, *([] if scale is None else [scale]))


def _keep_rows(ref, low, high):
    """Zero the rows of `ref` [64, 64] outside low .. high - 1."""
    row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (64, 64), 0), WGMMA)
    ref[...] = jnp.where((row >= low) & (row < high), ref[...].astype(jnp.float32), 0.0).astype(ref.dtype)
