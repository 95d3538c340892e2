"""The kernels of the grouped matmul on Hopper (Mosaic GPU, sm_90a); grouped_matmul_mosaic.py calls them.

One schedule serves the three. A persistent grid, one block per multiprocessor, walks over the tiles of the output.
Warpgroup 2 of a block loads operands by TMA into a ring of `stages` slots that runs on across tiles, so that the loads
of the next tile start during the epilogue of this one; warpgroups 0 and 1 multiply. They either share each tile, 64
of its 128 rows each, or take whole tiles in turn (`alternate`), which hides one's epilogue behind the other's products.

Groups start at any row, and nothing is padded or copied in device memory. The tiles of a group start at its first row
rounded down to 8 (the granularity of a swizzled TMA load) and store only the rows that they own: whole blocks of 64
rows by one TMA store, others by a ladder of stores of 32, 16, .. 1 rows, so that every row is written once, by one
block, and results are the same bit for bit in every run. In the gradient to rhs the rows of other groups are zeroed in
shared memory, in the first and last step of a group alone.

Shapes: M rows, K inputs, N outputs, E groups, T row tiles, S slots of a ring.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import WGMMA, Interpret, kernel_call
from pallas_kernels.mosaic import tiles as swizzled

NUM_SMS = 132  # H100 SXM, H200, GH200
SHARED_MEMORY = 232448 - 2048  # bytes a block may use, less barriers and alignment
TILE_ROWS = 128
STEP = 64  # contraction per slot of the ring: one swizzle atom of 128 bytes
ALIGN = 8  # rows of a swizzle atom


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is cut: the output in tiles of 128 rows and `columns` columns."""

    columns: int
    stages: int
    cluster: int = 1  # 2: two blocks take neighbouring columns and receive the tile of lhs that they share by multicast
    alternate: bool = False

    @property
    def store_slots(self) -> int:
        """Buffers [64, 64] for each warpgroup's results on their way out: as many as fit, at most one tile's."""
        left = SHARED_MEMORY - self.stages * (TILE_ROWS + self.columns) * STEP * 2
        return min(left // (2 * 64 * 64 * 2), self.columns // 64, 4)


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
    """Slots of shared memory between the loading and the multiplying warpgroups."""

    plan: Plan
    full: Any
    free: Any

    def slot(self, step):
        return lax.rem(step, jnp.int32(self.plan.stages))

    def full_barrier(self, slot, tile):
        """Who waits at a barrier has to wait for each of its phases: warpgroups that take turns need their own."""
        owner = lax.rem(tile, jnp.int32(2)) if self.plan.alternate else 0
        return self.full.at[owner * self.plan.stages + slot]


def _barriers(plan: Plan) -> list[Any]:
    """`full`: the two loads of a slot; `free`: its readers, in every block that a multicast writes to."""
    readers = 1 if plan.alternate else 2
    full = plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages * (2 if plan.alternate else 1))
    if plan.cluster == 1:
        return [full, plgpu.Barrier(num_arrivals=readers, num_barriers=plan.stages)]
    free = plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=readers, num_barriers=plan.stages)
    return [full, free]


def _shared_by_cluster(plan):
    return None if plan.cluster == 1 else "block"


def _launch(body, plan, out, scratch, interpret, *operands):
    return kernel_call(
        body,
        warpgroups=3,
        interpret=interpret,
        out_type=out,
        scratch_types=scratch,
        grid=(NUM_SMS // plan.cluster,),
        grid_names=("sm",),
        cluster=() if plan.cluster == 1 else (plan.cluster,),
        cluster_names=() if plan.cluster == 1 else ("block",),
    )(*operands)


def _my_share(tiles, plan):
    """Tiles of this cluster, number and function of the index: neighbours in time are neighbours in memory."""
    sm, stride = lax.axis_index("sm"), NUM_SMS // plan.cluster
    return lax.div(tiles - sm + (stride - 1), jnp.int32(stride)), lambda i: sm + i * stride


def _my_column(column, plan):
    return column if plan.cluster == 1 else column * plan.cluster + lax.axis_index("block")


def _fill(ring, tiles, steps_of, load_of):
    """The loading warpgroup: every step of every tile in turn."""
    plgpu.set_max_registers(40, action="decrease")

    def one_tile(i, step):
        load = load_of(i)

        def one_step(k, step):
            slot = ring.slot(step)

            @pl.when(step >= ring.plan.stages)
            def _():
                plgpu.barrier_wait(ring.free.at[slot])

            load(k, slot, ring.full_barrier(slot, i))
            return step + 1

        return lax.fori_loop(0, steps_of(i), one_step, step)

    steps = lax.fori_loop(0, tiles, one_tile, jnp.int32(0))

    def drain(step, _):  # a block may not leave before its last slots were read
        plgpu.barrier_wait(ring.free.at[ring.slot(step)])

    lax.fori_loop(jnp.maximum(steps - ring.plan.stages, 0), steps, drain, None)


class _Work(NamedTuple):
    """A multiplying warpgroup's part of a tile."""

    needed: Any  # whether there is any
    columns_left: Any  # from the tile's first column on: a tile may be the narrower last one
    multiply: Callable[..., None]  # (accumulator, step, slot): start the products of a step
    store: Callable[..., None]  # (sum)


def _multiply_tiles(ring, tiles, outputs, steps_of, work_of):
    """A multiplying warpgroup: its share of every tile; work_of(i): the `_Work` of tile i."""
    plan, warpgroup = ring.plan, lax.axis_index("wg")
    plgpu.set_max_registers(232, action="increase")
    rows = TILE_ROWS if plan.alternate else TILE_ROWS // 2
    last_width = outputs % plan.columns

    def one_tile(i, first_step):
        steps = steps_of(i)

        def compute(work, width):
            def products(acc):
                def one_step(k, _):
                    slot = ring.slot(first_step + k)
                    plgpu.barrier_wait(ring.full_barrier(slot, i))
                    work.multiply(acc, k, slot)
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)  # the products before these are done
                    def free_slot():
                        plgpu.barrier_arrive(ring.free.at[ring.slot(first_step + k - 1)])

                lax.fori_loop(0, steps, one_step, None)
                plgpu.wgmma_wait(0)

                @pl.when(steps > 0)
                def free_last_slot():
                    plgpu.barrier_arrive(ring.free.at[ring.slot(first_step + steps - 1)])

                return acc[...]

            work.store(pl.run_scoped(products, plgpu.ACC((rows, width), jnp.float32)))

        def pass_by():
            def one_step(k, _):
                slot = ring.slot(first_step + k)
                plgpu.barrier_wait(ring.full_barrier(slot, i))
                plgpu.barrier_arrive(ring.free.at[slot])

            lax.fori_loop(0, steps, one_step, None)

        def my_part():
            work = work_of(i)
            is_last = (work.columns_left == last_width) if last_width else False
            pl.when(work.needed & ~jnp.bool_(is_last))(lambda: compute(work, plan.columns))
            if last_width:
                pl.when(work.needed & is_last)(lambda: compute(work, last_width))
            pl.when(~work.needed)(pass_by)

        if plan.alternate:
            pl.when(lax.rem(i, jnp.int32(2)) == warpgroup)(my_part)
        else:
            my_part()
        return first_step + steps

    lax.fori_loop(0, tiles, one_tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _my_blocks(plan, row):
    """First row of each block of 64 of a tile that this warpgroup computes."""
    return [row, row + 64] if plan.alternate else [row + 64 * lax.axis_index("wg")]


def multiply_rows(
    lhs: jax.Array,
    rhs_EKN: jax.Array,
    tiles: RowTiles,
    plan: Plan,
    *,
    transposed: bool = False,
    activation: str | None = None,
    interpret: Interpret = None,
) -> jax.Array:
    """lhs [M, K] times each group's matrix, rhs [E, K, N] or, transposed, [E, N, K] -> [M, N].

    M is a multiple of 8, K and N of 64. activation "relu2": max(z, 0)^2, before the result is rounded.
    """
    rows, inputs = lhs.shape
    groups = rhs_EKN.shape[0]
    outputs = rhs_EKN.shape[1 if transposed else 2]
    columns, slots = plan.columns, plan.store_slots
    column_tiles = pl.cdiv(outputs, columns * plan.cluster)
    input_steps = pl.cdiv(inputs, STEP)

    def body(*refs):
        buffers = (
            _any_row(plan.stages, TILE_ROWS, STEP, interpret=interpret),
            _any_row(2, slots, 64, 64, interpret=interpret),
        )
        pl.run_scoped(functools.partial(work, *refs), *buffers, collective_axes="wg")

    def work(group, row, end, last, lhs_hbm, rhs_hbm, out_hbm, rhs_smem, full, free, lhs_views, out_views):
        warpgroup = lax.axis_index("wg")
        ring = _Ring(plan, full, free)
        my_tiles, tile_of = _my_share(last[groups] * column_tiles, plan)
        lhs_smem, lhs_by_row = _views(lhs_views, interpret)
        out_smem, out_by_row = _views(out_views, interpret)

        def place(i):
            """Row tile and first column of tile i."""
            column = _my_column(lax.rem(tile_of(i), jnp.int32(column_tiles)), plan)
            return lax.div(tile_of(i), jnp.int32(column_tiles)), column * columns

        def steps_of(i):
            return jnp.where(group[place(i)[0]] < groups, input_steps, 0)

        def load_of(i):
            tile, column = place(i)
            row_slice, column_slice = pl.ds(row[tile], TILE_ROWS), pl.ds(column, columns)
            weight = rhs_hbm.at[jnp.minimum(group[tile], groups - 1)]

            def load(k, slot, barrier):
                k_slice = pl.ds(k * STEP, STEP)
                left = lhs_hbm.at[row_slice, k_slice]
                right = weight.at[column_slice, k_slice] if transposed else weight.at[k_slice, column_slice]
                plgpu.copy_gmem_to_smem(left, lhs_by_row.at[slot], barrier, collective_axes=_shared_by_cluster(plan))
                plgpu.copy_gmem_to_smem(right, rhs_smem.at[slot], barrier)

            return load

        def work_of(i):
            tile, column = place(i)
            blocks = _my_blocks(plan, row[tile])
            owned = [jnp.clip(end[tile] - first, 0, 64) for first in blocks]

            def multiply(acc, k, slot):
                left, right = lhs_smem.at[slot], rhs_smem.at[slot]
                if not plan.alternate:
                    left = left.at[pl.ds(pl.multiple_of(64 * warpgroup, 64), 64)]
                if transposed:
                    plgpu.wgmma(acc, left, right.at[pl.ds(0, acc.shape[1])].transpose((1, 0)))
                else:
                    plgpu.wgmma(acc, left, right.at[:, pl.ds(0, acc.shape[1])])

            def store(acc):
                if activation == "relu2":
                    acc = jnp.square(jnp.maximum(acc, 0.0))
                for b, (first, size) in enumerate(zip(blocks, owned, strict=True)):
                    for c in range(0, acc.shape[1], 64):
                        buffer = _next_buffer(c, slots)

                        @pl.when((size > 0) & (column + c < outputs))
                        def _(b=b, c=c, first=first, size=size, buffer=buffer):
                            block = acc[64 * b : 64 * (b + 1), c : c + 64]
                            out_smem[warpgroup, buffer] = block.astype(out_hbm.dtype)
                            plgpu.commit_smem()
                            out = out_hbm.at[:, pl.ds(column + c, 64)]
                            _store_rows(out_by_row.at[warpgroup, buffer], out, first, size)

            return _Work((owned[0] > 0) & (column < outputs), outputs - column, multiply, store)

        pl.when(warpgroup == 2)(lambda: _fill(ring, my_tiles, steps_of, load_of))
        pl.when(warpgroup < 2)(lambda: _multiply_tiles(ring, my_tiles, outputs, steps_of, work_of))

    scratch = [
        swizzled(plan.stages, *((columns, STEP) if transposed else (STEP, columns)), dtype=rhs_EKN.dtype),
        *_barriers(plan),
    ]
    out = jax.ShapeDtypeStruct((rows, outputs), lhs.dtype)
    return _launch(body, plan, out, scratch, interpret, *tiles[:4], lhs, rhs_EKN)


def _any_row(*shape, interpret):
    """bfloat16 [.., rows, 64] in shared memory that a TMA copy may start at any row of.

    The bytes lie as wgmma wants them, in swizzled tiles of 8 rows, which are consecutive where a tile is as wide as the
    array: so they are swizzled rows too, and TMA sees those. The interpreter has no layouts and needs no second view.
    """
    if interpret is not None:
        return swizzled(*shape)
    by_row = plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.SwizzleTransform(128),))  # type: ignore[abstract]
    return plgpu.RefUnion(swizzled(*shape), by_row)


def _views(allocated, interpret):
    """The two views of an array made by `_any_row`: for wgmma and stores of registers, and for TMA."""
    return (allocated, allocated) if interpret is not None else tuple(allocated)


def _next_buffer(column, slots):
    """Wait until the buffer of a block [64, 64] may be written: they take turns along the columns of a tile."""
    plgpu.wait_smem_to_gmem(0 if column == 0 else slots - 1, wait_read_only=True)
    return column // 64 % slots


def _store_rows(block_smem, out_hbm, row, count):
    """Start to store the first `count` rows, 1 to 64, of a block [64, 64] -> out[row : row + count]."""
    for size in (64, 32, 16, 8, 4, 2, 1):
        at = count & -2 * size

        @pl.when((count & size) != 0)
        def _(size=size, at=at):
            plgpu.copy_smem_to_gmem(block_smem.at[pl.ds(at, size)], out_hbm.at[pl.ds(row + at, size)])


def outer_products(
    lhs: jax.Array, d_out: jax.Array, tiles: RowTiles, plan: Plan, dtype: Any, interpret: Interpret = None
) -> jax.Array:
    """lhs [M, K], d_out [M, N] -> [E, K, N] of `dtype` (2 bytes): per group lhs^T d_out, zero for empty groups.

    M is a multiple of 8, K and N of 64. Rows past the last group may hold anything.
    """
    inputs, outputs = lhs.shape[1], d_out.shape[1]
    groups = tiles.starts.shape[0] - 1
    columns, slots = plan.columns, plan.store_slots
    column_tiles = pl.cdiv(outputs, columns * plan.cluster)
    row_tiles_ = pl.cdiv(inputs, TILE_ROWS)
    per_group = row_tiles_ * column_tiles

    def body(starts, lhs_hbm, d_out_hbm, out_hbm, lhs_smem, d_out_smem, store_smem, full, free, masked):
        warpgroup = lax.axis_index("wg")
        ring = _Ring(plan, full, free)
        my_tiles, tile_of = _my_share(jnp.int32(groups * per_group), plan)

        def place(i):
            """Group, first row (an input) and first column (an output) of tile i."""
            within = lax.rem(tile_of(i), jnp.int32(per_group))
            column = _my_column(lax.rem(within, jnp.int32(column_tiles)), plan) * columns
            return lax.div(tile_of(i), jnp.int32(per_group)), lax.div(within, jnp.int32(column_tiles)), column

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
                plgpu.copy_gmem_to_smem(
                    lhs_hbm.at[row_slice, pl.ds(row * TILE_ROWS, TILE_ROWS)],
                    lhs_smem.at[slot],
                    barrier,
                    collective_axes=_shared_by_cluster(plan),
                )
                plgpu.copy_gmem_to_smem(d_out_hbm.at[row_slice, pl.ds(column, columns)], d_out_smem.at[slot], barrier)

            return load

        def work_of(i):
            group, row, column = place(i)
            begin, end, first = span(group)
            rows = _my_blocks(plan, row * TILE_ROWS)

            def multiply(acc, k, slot):
                low, high = begin - first - k * STEP, end - first - k * STEP
                right = d_out_smem.at[slot]
                columns_read = [0, 64] if plan.alternate else [pl.multiple_of(64 * warpgroup, 64)]
                mine = [lhs_smem.at[slot, :, pl.ds(c, 64)] for c in columns_read]

                # Rows of other groups: zeros in the columns of lhs that this warpgroup reads. Past the last group
                # d_out is masked too, since 0 * NaN is NaN.
                @pl.when((low > 0) | (high < STEP))
                def _():
                    for ref in mine:
                        _keep_rows(ref, low, high)
                    plgpu.commit_smem()

                @pl.when(first + (k + 1) * STEP > starts[groups])
                def _():
                    for n in range(columns // 64):
                        mask = functools.partial(_keep_rows, right.at[:, pl.ds(64 * n, 64)], low, high)
                        if plan.alternate:
                            mask()
                        else:
                            pl.when(warpgroup == n % 2)(mask)
                    plgpu.commit_smem()
                    if not plan.alternate:
                        plgpu.barrier_arrive(masked)
                        plgpu.barrier_wait(masked)

                left = lhs_smem.at[slot] if plan.alternate else mine[0]
                plgpu.wgmma(acc, left.transpose((1, 0)), right.at[:, pl.ds(0, acc.shape[1])])

            def store(acc):
                for b, first_row in enumerate(rows):
                    for c in range(0, acc.shape[1], 64):
                        at = column + c
                        buffer = _next_buffer(c, slots)

                        @pl.when((first_row < inputs) & (at < outputs))
                        def _(b=b, c=c, first_row=first_row, at=at, buffer=buffer):
                            block = store_smem.at[warpgroup, buffer]
                            block[...] = acc[64 * b : 64 * (b + 1), c : c + 64].astype(dtype)
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(block, out_hbm.at[group, pl.ds(first_row, 64), pl.ds(at, 64)])

            # The two warpgroups meet where d_out is masked: there, neither may pass by.
            meets = first + steps_of(i) * STEP > starts[groups]
            needed = (rows[0] < inputs) & (column < outputs) | meets
            return _Work(needed, outputs - column, multiply, store)

        pl.when(warpgroup == 2)(lambda: _fill(ring, my_tiles, steps_of, load_of))
        pl.when(warpgroup < 2)(lambda: _multiply_tiles(ring, my_tiles, outputs, steps_of, work_of))

    scratch = [
        swizzled(plan.stages, STEP, TILE_ROWS, dtype=lhs.dtype),
        swizzled(plan.stages, STEP, columns, dtype=d_out.dtype),
        swizzled(2, slots, 64, 64, dtype=dtype),
        *_barriers(plan),
        plgpu.Barrier(num_arrivals=2),
    ]
    out = jax.ShapeDtypeStruct((groups, inputs, outputs), dtype)
    return _launch(body, plan, out, scratch, interpret, tiles.starts, lhs, d_out)


def _keep_rows(ref, low, high):
    """Zero the rows of `ref` [64, 64] outside low .. high - 1."""
    row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (64, 64), 0), WGMMA)
    ref[...] = jnp.where((row >= low) & (row < high), ref[...].astype(jnp.float32), 0.0).astype(ref.dtype)
