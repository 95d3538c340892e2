"""Grouped matmul on Hopper (Mosaic GPU, sm_90a): bfloat16 operands, float32 accumulators in registers.

    forward             out[i]    = act(lhs[i] @ rhs[group of row i])
    gradient to lhs     d_lhs[i]  = d_out[i] @ rhs[group of row i]^T
    gradient to rhs     d_rhs[e]  = lhs[rows of e]^T @ d_out[rows of e]

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


def choose_plan(direction: str, rows: int, inputs: int, outputs: int, groups: int) -> Plan:
    """The fastest plan measured for such shapes; direction: "forward", "d_lhs" or "d_rhs"."""
    del direction, inputs
    if rows <= 4 * groups:  # bound by reading the weights: many small tiles keep all multiprocessors at it
        return Plan(columns=64, stages=8)
    fits = min((192, 256, 128, 64), key=lambda c: (pl.cdiv(outputs, c) * c * (1 + 16 / c), -c))
    return Plan(columns=fits, stages={256: 4, 192: 4, 128: 6, 64: 8}[fits])


def unfit(lhs: jax.Array, rhs: jax.Array) -> str:
    """The reason why these operands cannot be taken, or ""."""
    if lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16:
        return f"lhs and rhs must be bfloat16, got {lhs.dtype} and {rhs.dtype}"
    if rhs.shape[1] % 64 or rhs.shape[2] % 64:
        return f"K and N must be multiples of 64, got {rhs.shape[1]} and {rhs.shape[2]}"
    if lhs.shape[0] == 0:
        return "lhs has no rows"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul_mosaic(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, activation: str | None) -> jax.Array:
    """[M, K], [E, K, N], [E] int32 -> [M, N], all bfloat16."""
    return _forward(lhs, rhs, group_sizes, activation)[0]


def _forward(lhs, rhs, group_sizes, activation):
    rows = lhs.shape[0]
    padded = _whole_atoms(lhs)
    tiles = row_tiles(group_sizes, padded.shape[0])
    plan = choose_plan("forward", rows, rhs.shape[1], rhs.shape[2], rhs.shape[0])
    out = multiply_rows(padded, rhs, tiles, plan, activation=activation)[:rows]
    # relu2 has derivative 2 max(z, 0) = 2 sqrt(out): rounding out to bfloat16 costs half of its relative error there.
    return out, (lhs, rhs, group_sizes, out if activation == "relu2" else None)


def _backward(activation, residuals, d_out):
    lhs, rhs, group_sizes, out = residuals
    rows = lhs.shape[0]
    groups, inputs, outputs = rhs.shape
    if activation == "relu2":
        d_out = (d_out.astype(jnp.float32) * 2 * jnp.sqrt(out.astype(jnp.float32))).astype(lhs.dtype)
    padded, d_out = _whole_atoms(lhs), _whole_atoms(d_out)
    tiles = row_tiles(group_sizes, padded.shape[0])
    plan = choose_plan("d_lhs", rows, outputs, inputs, groups)
    d_lhs = multiply_rows(d_out, rhs, tiles, plan, transposed=True)[:rows]
    plan = choose_plan("d_rhs", rows, inputs, outputs, groups)
    return d_lhs, outer_products(padded, d_out, tiles, plan, rhs.dtype), None


grouped_matmul_mosaic.defvjp(_forward, _backward)


def _whole_atoms(z):
    """Rows up to a multiple of 8: a copy, but of few rows, or of none where a batch is even."""
    return jnp.pad(z, ((0, -z.shape[0] % ALIGN), (0, 0))) if z.shape[0] % ALIGN else z


class RowTiles(NamedTuple):
    """Row tile t covers rows row[t] .. + 127 and owns begin[t] .. end[t] - 1 of them, which belong to group[t].

    The rows past the last group form one more group, number E, whose tiles store zeros. Int32.
    """

    group: jax.Array  # [T]
    row: jax.Array  # [T]
    begin: jax.Array  # [T]
    end: jax.Array  # [T]
    used: jax.Array  # [1], tiles in use
    starts: jax.Array  # [E + 1], first row of each group, and the end of the last


def row_tiles(group_sizes: jax.Array, rows: int) -> RowTiles:
    """Cut `rows` rows, sorted by group, into tiles; computed on the device in a few small fusions."""
    groups = group_sizes.shape[0]
    most = (rows + (groups + 1) * (TILE_ROWS + ALIGN - 2)) // TILE_ROWS
    starts = jnp.minimum(jnp.pad(jnp.cumsum(group_sizes), (1, 0)), rows).astype(jnp.int32)
    ends = jnp.append(starts[1:], rows)
    first = starts & -ALIGN
    tiles = jnp.where(ends > starts, (ends - first + TILE_ROWS - 1) // TILE_ROWS, 0)
    last = jnp.cumsum(tiles)
    tile = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum((last <= tile[:, None]).sum(1, dtype=jnp.int32), groups)
    row = first[group] + (tile - (last - tiles)[group]) * TILE_ROWS
    return RowTiles(group, row, starts[group], ends[group], last[-1:], starts)


def _swizzled() -> tuple[Any, ...]:
    return (plgpu.TilingTransform((ALIGN, 64)), plgpu.SwizzleTransform(128))


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


def _launch(body: Callable[..., None], plan: Plan, out: jax.ShapeDtypeStruct, scratch: list[Any], *operands: jax.Array):
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(NUM_SMS // plan.cluster,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        cluster=() if plan.cluster == 1 else (plan.cluster,),
        cluster_names=() if plan.cluster == 1 else ("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
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


def _multiply_tiles(ring, tiles, steps_of, work_of):
    """A multiplying warpgroup: its share of every tile.

    work_of(i) returns (has_rows, multiply, store) of tile i: multiply(acc, k, slot) starts the products of step k,
    store(acc) takes the sum.
    """
    plan, warpgroup = ring.plan, lax.axis_index("warpgroup")
    plgpu.set_max_registers(232, action="increase")
    rows = TILE_ROWS if plan.alternate else TILE_ROWS // 2

    def one_tile(i, first_step):
        steps = steps_of(i)

        def work():
            has_rows, multiply, store = work_of(i)

            @pl.when(has_rows)
            def compute():
                def products(acc):
                    def one_step(k, _):
                        slot = ring.slot(first_step + k)
                        plgpu.barrier_wait(ring.full_barrier(slot, i))
                        multiply(acc, k, slot)
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)  # the products before these are done
                        def _():
                            plgpu.barrier_arrive(ring.free.at[ring.slot(first_step + k - 1)])

                    lax.fori_loop(0, steps, one_step, None)
                    plgpu.wgmma_wait(0)

                    @pl.when(steps > 0)
                    def _():
                        plgpu.barrier_arrive(ring.free.at[ring.slot(first_step + steps - 1)])

                    return acc[...]

                store(pl.run_scoped(products, plgpu.ACC((rows, plan.columns), jnp.float32)))

            @pl.when(~has_rows)
            def pass_by():
                def one_step(k, _):
                    slot = ring.slot(first_step + k)
                    plgpu.barrier_wait(ring.full_barrier(slot, i))
                    plgpu.barrier_arrive(ring.free.at[slot])

                lax.fori_loop(0, steps, one_step, None)

        if plan.alternate:
            pl.when(lax.rem(i, jnp.int32(2)) == warpgroup)(work)
        else:
            work()
        return first_step + steps

    lax.fori_loop(0, tiles, one_tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _my_blocks(plan, row):
    """First row of each block of 64 of a tile that this warpgroup computes."""
    return [row, row + 64] if plan.alternate else [row + 64 * lax.axis_index("warpgroup")]


def multiply_rows(
    lhs: jax.Array,
    rhs_EKN: jax.Array,
    tiles: RowTiles,
    plan: Plan,
    *,
    transposed: bool = False,
    activation: str | None = None,
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
        # The same bytes twice: swizzled for whole blocks, row by row for the rest. One pair for each warpgroup, so that
        # the race detector sees what is whose.
        shape = (slots, 64, 64)
        union = plgpu.RefUnion(plgpu.SMEM(shape, lhs.dtype, transforms=_swizzled()), plgpu.SMEM(shape, lhs.dtype))
        pl.run_scoped(functools.partial(work, *refs), union, union, collective_axes="warpgroup")

    def work(group, row, begin, end, used, lhs_hbm, rhs_hbm, out_hbm, lhs_smem, rhs_smem, full, free, *buffers):
        warpgroup = lax.axis_index("warpgroup")
        ring = _Ring(plan, full, free)
        my_tiles, tile_of = _my_share(used[0] * column_tiles, plan)

        def place(i):
            """Row tile and first column of tile i."""
            column = _my_column(lax.rem(tile_of(i), jnp.int32(column_tiles)), plan)
            return lax.div(tile_of(i), jnp.int32(column_tiles)), column * columns

        def steps_of(i):
            return jnp.where(group[place(i)[0]] < groups, input_steps, 0)

        def load_of(i):
            tile, column = place(i)
            row_slice = pl.ds(pl.multiple_of(row[tile], ALIGN), TILE_ROWS)
            column_slice = pl.ds(column, columns)
            weight = rhs_hbm.at[jnp.minimum(group[tile], groups - 1)]

            def load(k, slot, barrier):
                k_slice = pl.ds(k * STEP, STEP)
                left = lhs_hbm.at[row_slice, k_slice]
                right = weight.at[column_slice, k_slice] if transposed else weight.at[k_slice, column_slice]
                plgpu.copy_gmem_to_smem(left, lhs_smem.at[slot], barrier, collective_axes=_shared_by_cluster(plan))
                plgpu.copy_gmem_to_smem(right, rhs_smem.at[slot], barrier)

            return load

        def work_of(i):
            tile, column = place(i)
            blocks = _my_blocks(plan, row[tile])
            owned = [(jnp.clip(begin[tile] - r, 0, 64), jnp.clip(end[tile] - r, 0, 64)) for r in blocks]

            def multiply(acc, k, slot):
                left, right = lhs_smem.at[slot], rhs_smem.at[slot]
                if not plan.alternate:
                    left = left.at[pl.ds(pl.multiple_of(64 * warpgroup, 64), 64)]
                plgpu.wgmma(acc, left, right.transpose((1, 0)) if transposed else right)

            def store(acc):
                if activation == "relu2":
                    acc = jnp.square(jnp.maximum(acc, 0.0))
                for w in (0, 1):
                    pl.when(warpgroup == w)(functools.partial(store_into, *buffers[w], acc))

            def store_into(whole_smem, part_smem, acc):
                for b, (low, high) in enumerate(owned):
                    for c in range(0, columns, 64):
                        buffer = _next_buffer(c, slots)

                        @pl.when((high > low) & (column + c < outputs))
                        def _(b=b, c=c, low=low, high=high, buffer=buffer):
                            block = acc[64 * b : 64 * (b + 1), c : c + 64].astype(out_hbm.dtype)
                            out = out_hbm.at[:, pl.ds(column + c, 64)]
                            _store_rows(block, low, high, whole_smem.at[buffer], part_smem.at[buffer], out, blocks[b])

            return sum(high - low for low, high in owned) > 0, multiply, store

        pl.when(warpgroup == 2)(lambda: _fill(ring, my_tiles, steps_of, load_of))
        pl.when(warpgroup < 2)(lambda: _multiply_tiles(ring, my_tiles, steps_of, work_of))

    scratch = [
        plgpu.SMEM((plan.stages, TILE_ROWS, STEP), lhs.dtype, transforms=_swizzled()),
        plgpu.SMEM(
            (plan.stages, columns, STEP) if transposed else (plan.stages, STEP, columns),
            rhs_EKN.dtype,
            transforms=_swizzled(),
        ),
        *_barriers(plan),
    ]
    out = jax.ShapeDtypeStruct((rows, outputs), lhs.dtype)
    return _launch(body, plan, out, scratch, *tiles[:5], lhs, rhs_EKN)


def _next_buffer(column, slots):
    """Wait until the buffer of a block [64, 64] may be written: they take turns along the columns of a tile."""
    plgpu.wait_smem_to_gmem(0 if column == 0 else slots - 1, wait_read_only=True)
    return column // 64 % slots


def _store_rows(block, low, high, whole_smem, part_smem, out_hbm, row):
    """Start to store rows low .. high - 1 of `block` [64, 64] -> out[row + low : row + high]."""
    owned = high - low

    @pl.when(owned == 64)
    def store_whole():
        whole_smem[...] = block
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(whole_smem, out_hbm.at[pl.ds(pl.multiple_of(row, ALIGN), 64)])

    @pl.when(owned < 64)
    def store_part():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        part_smem[...] = block
        plgpu.commit_smem()
        for size in (32, 16, 8, 4, 2, 1):
            at = low + (owned & -2 * size)

            @pl.when((owned & size) != 0)
            def _(size=size, at=at):
                plgpu.copy_smem_to_gmem(part_smem.at[pl.ds(at, size)], out_hbm.at[pl.ds(row + at, size)])


def outer_products(lhs: jax.Array, d_out: jax.Array, tiles: RowTiles, plan: Plan, dtype: Any) -> jax.Array:
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
        warpgroup = lax.axis_index("warpgroup")
        ring = _Ring(plan, full, free)
        my_tiles, tile_of = _my_share(jnp.int32(groups * per_group), plan)

        def place(i):
            """Group, first row (an input) and first column (an output) of tile i."""
            within = lax.rem(tile_of(i), jnp.int32(per_group))
            column = _my_column(lax.rem(within, jnp.int32(column_tiles)), plan)
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
                plgpu.copy_gmem_to_smem(
                    d_out_hbm.at[row_slice, pl.ds(column * columns, columns)], d_out_smem.at[slot], barrier
                )

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
                plgpu.wgmma(acc, left.transpose((1, 0)), right)

            def store(acc):
                for b, first_row in enumerate(rows):
                    for c in range(0, columns, 64):
                        at = column * columns + c
                        buffer = _next_buffer(c, slots)

                        @pl.when((first_row < inputs) & (at < outputs))
                        def _(b=b, c=c, first_row=first_row, at=at, buffer=buffer):
                            block = store_smem.at[warpgroup, buffer]
                            block[...] = acc[64 * b : 64 * (b + 1), c : c + 64].astype(dtype)
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(block, out_hbm.at[group, pl.ds(first_row, 64), pl.ds(at, 64)])

            # The two warpgroups meet where d_out is masked: there, neither may pass by.
            meets = first + steps_of(i) * STEP > starts[groups]
            return (rows[0] < inputs) | meets, multiply, store

        pl.when(warpgroup == 2)(lambda: _fill(ring, my_tiles, steps_of, load_of))
        pl.when(warpgroup < 2)(lambda: _multiply_tiles(ring, my_tiles, steps_of, work_of))

    scratch = [
        plgpu.SMEM((plan.stages, STEP, TILE_ROWS), lhs.dtype, transforms=_swizzled()),
        plgpu.SMEM((plan.stages, STEP, columns), d_out.dtype, transforms=_swizzled()),
        plgpu.SMEM((2, slots, 64, 64), dtype, transforms=_swizzled()),
        *_barriers(plan),
        plgpu.Barrier(num_arrivals=2),
    ]
    out = jax.ShapeDtypeStruct((groups, inputs, outputs), dtype)
    return _launch(body, plan, out, scratch, tiles.starts, lhs, d_out)


def _keep_rows(ref, low, high):
    """Zero the rows of `ref` [64, 64] outside low .. high - 1."""
    row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (64, 64), 0), plgpu.Layout.WGMMA)
    ref[...] = jnp.where((row >= low) & (row < high), ref[...].astype(jnp.float32), 0.0).astype(ref.dtype)
