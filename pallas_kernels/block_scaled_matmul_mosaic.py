"""Products of few rows with packed NVFP4 weights on Hopper (Mosaic GPU, sm_90a): the weights are read once, packed.

    out[m, n] = scale[e] * sum over k of code[e, n, k] * block scale[e, n, k / 16] * x[m, k]       e = expert of row m

One kernel does it all, since the next one would start microseconds later: it reads x and the weight as they are stored
and writes the result. A warpgroup takes 64 outputs and a part of the inputs; the blocks of a cluster and their
warpgroups share the inputs out, and add up their sums in shared memory, in a fixed order. All loads of up to `units`
times 128 inputs start at once. The weights are the left operand of the tensor cores, so that the few rows of x are the
narrow side; `block_scaled_matmul_lanes` has what a lane does.

Shapes: E experts, N outputs, K inputs, M rows; T tiles of rows of one expert each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import block_scaled_matmul_lanes as lanes
from pallas_kernels import floats
from pallas_kernels.block_scaled_matmul_lanes import GROUP_ROWS, MOST_EXPERTS, OUTPUTS, UNIT
from pallas_kernels.mosaic import WGMMA, Interpret, kernel_call
from pallas_kernels.nvfp4 import BLOCK, e2m1_value, unpack
from pallas_kernels.packed import Packed

MOST_ROWS = 64  # of x in all: beyond, the tensor cores are the limit, and dense weights serve them better
MULTIPROCESSORS = 132


class Plan(NamedTuple):
    """How the work is cut. split: blocks of a cluster; groups: warpgroups of a block, units: of 128 inputs at once."""

    split: int
    groups: int
    units: int


def plan(rows: int, inputs: int, outputs: int, tiles: int) -> Plan:
    """rows of a tile, a multiple of 8."""
    blocks = -(-outputs // OUTPUTS) * tiles
    total = inputs // UNIT
    groups = 4 if rows <= 32 else 2  # sums of more rows need the registers
    split = 1
    while split < 4 and total > 8 * groups * split and 2 * blocks * split <= MULTIPROCESSORS:
        split *= 2
    each = -(-total // (split * groups))
    most = max(1, min(8, 128 // rows))
    return Plan(split, groups, -(-each // -(-each // most)))


def unfit(x: jax.Array, w: Packed, rows: int) -> str:
    """Why the kernel cannot take `rows` rows of x and the weight w, or ""."""
    if w.block_scales is None:
        return "FP8 weights"
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {x.dtype}"
    inputs, outputs = w.shape[-2:]
    if inputs % UNIT or inputs < 2 * UNIT or outputs < OUTPUTS:
        least = f"K must be a multiple of {UNIT} and at least {2 * UNIT}, N at least {OUTPUTS}"
        return f"{least}, got {inputs} and {outputs}"
    if w.ndim == 3 and w.codes.shape[0] > MOST_EXPERTS:
        return f"more than {MOST_EXPERTS} experts"
    if not 0 < rows <= MOST_ROWS:  # any prompt: a reason without its length is said once
        return f"1 to {MOST_ROWS} rows"
    return ""


def multiply(x_MK: jax.Array, w: Packed, dtype: DTypeLike = jnp.float32, *, interpret: Interpret = None) -> jax.Array:
    """x [M, K] bfloat16, w [K, N] -> [M, N], float32 or bfloat16."""
    assert w.block_scales is not None
    packed = Packed(w.codes[None], w.block_scales[None], w.scale[None])
    return _multiply(x_MK, packed, None, -(-x_MK.shape[0] // 8) * 8, dtype, interpret)


def multiply_groups(
    lhs: jax.Array,
    rhs: Packed,
    group_sizes: jax.Array,
    dtype: DTypeLike = jnp.float32,
    *,
    interpret: Interpret = None,
) -> jax.Array:
    """lhs [M, K] bfloat16, rhs [E, K, N], group_sizes [E] int32 -> [M, N]; only experts with rows are read."""
    assert rhs.block_scales is not None
    return _multiply(lhs, rhs, group_sizes, GROUP_ROWS, dtype, interpret)


def _multiply(x_MK, w, group_sizes, rows, dtype, interpret):
    """w [E, K, N]; rows: of a tile. Without group sizes, all rows are one tile of the only expert."""
    experts, inputs, outputs = w.shape
    most_rows = x_MK.shape[0]
    tiles = 1
    if group_sizes is not None:  # never more tiles than rows
        tiles = min(most_rows, experts + 1 + most_rows // GROUP_ROWS)
    chosen = plan(rows, inputs, outputs, tiles)
    if interpret is not None:  # which has no shared memory of clusters
        chosen = chosen._replace(split=1)
    grouped = group_sizes is not None
    sizes = (experts, inputs, outputs)
    kernel = _kernel(sizes, most_rows, tiles, rows, grouped, jnp.dtype(dtype), chosen, interpret)
    scales = lax.bitcast_convert_type(w.block_scales, jnp.uint8)
    return kernel(w.codes, scales, x_MK, w.scale, *([group_sizes] if grouped else []))


@functools.lru_cache
def _kernel(sizes, most_rows, tiles, rows, grouped, dtype, chosen, interpret):
    experts, inputs, outputs = sizes
    split, groups, units = chosen
    total = inputs // UNIT
    chunks = -(-total // (split * groups * units))
    ragged = total != chunks * split * groups * units
    number = plgpu.Layout.WG_SPLAT(())
    ref = plgpu.RefType()

    def body(codes_g, scales_g, x_g, scale_g, *rest):
        *sizes_g, out_g, x_s, sums_s, full = rest
        group, block, tile = (lax.axis_index(name) for name in ("wg", "n", "t"))
        part = (lax.axis_index("s") if split > 1 else 0) * groups + group
        if grouped:
            if interpret is not None:
                found = _find(sizes_g[0][...], tile, most_rows)
            else:
                returned = (plgpu.ShapeDtypeStruct((), jnp.int32, layout=number),) * 3
                function = lanes.find(experts, most_rows)
                found = plgpu.inline_mgpu(arg_types=(ref, number), return_type=returned)(function)(sizes_g[0], tile)
            expert, first_row, rows_here = found
            scale = jnp.where(expert < experts, scale_g[jnp.minimum(expert, experts - 1)], 0.0)
        else:
            expert, first_row, rows_here = (jnp.int32(i) for i in (0, 0, most_rows))
            scale = scale_g[0]
        first_output = jnp.minimum(block * OUTPUTS, outputs - OUTPUTS)  # the last ones start where they still fit
        first_unit = part * (chunks * units)
        weight_refs = (codes_g, scales_g, x_g, x_s.at[group])

        def add(chunk, acc):
            place = (expert, first_output, first_row, first_row + rows_here - 1, first_unit + chunk * units)
            if interpret is not None:
                return _products(acc, *weight_refs, *place, units=units, total=total)
            function = lanes.products(units, total, experts, (outputs, inputs), ragged, chunks > 1)
            types = (WGMMA, *(ref,) * 4, *(number,) * 5)
            returned = plgpu.ShapeDtypeStruct((OUTPUTS, rows), jnp.float32, layout=WGMMA)
            return plgpu.inline_mgpu(arg_types=types, return_type=returned)(function)(acc, *weight_refs, *place)

        def finish(acc):
            if interpret is not None:
                return _finish(acc, sums_s, full, out_g, group, block, scale, first_row, rows_here)
            place = (scale, first_output, block * OUTPUTS, first_row, rows_here)
            function = lanes.finish(groups, split, outputs, dtype == jnp.bfloat16)
            types = (WGMMA, *(ref,) * 2, *(number,) * 5)
            plgpu.inline_mgpu(arg_types=types, return_type=())(function)(acc, sums_s, out_g, *place)

        def zeros():
            value = jnp.zeros((OUTPUTS, rows), jnp.float32)
            return value if interpret is not None else plgpu.layout_cast(value, WGMMA)

        def multiply():
            finish(add(0, zeros()) if chunks == 1 else lax.fori_loop(0, chunks, add, zeros()))

        if grouped:
            pl.when((rows_here > 0) & (expert < experts))(multiply)
            pl.when((rows_here > 0) & (expert == experts))(lambda: finish(zeros()))
        else:
            multiply()

    each = OUTPUTS // split
    if interpret is not None:
        sums = plgpu.SMEM((groups, OUTPUTS, rows), jnp.float32)
    else:
        sums = plgpu.SMEM((split * groups * rows * (each + 4),), jnp.float32)
    return kernel_call(
        body,
        warpgroups=groups,
        interpret=interpret,
        lanes=True,
        auto_barriers=interpret is not None,
        out_type=jax.ShapeDtypeStruct((most_rows, outputs), dtype),
        grid=(-(-outputs // OUTPUTS), tiles),
        grid_names=("n", "t"),
        scratch_types=[
            plgpu.SMEM((groups, units * rows * UNIT), jnp.bfloat16),
            sums,
            plgpu.Barrier(num_arrivals=groups) if interpret is not None else None,
        ],
        cluster=(split,) if split > 1 else (),
        cluster_names=("s",) if split > 1 else (),
    )


def _find(sizes, tile, rows):
    """What `lanes.find` does, for the interpreter, which knows no lanes."""
    sizes = jnp.append(sizes, rows - sizes.sum())  # rows past the sum are those of no expert
    last = jnp.cumsum(-(-sizes // GROUP_ROWS))
    expert = jnp.minimum((last <= tile).sum(dtype=jnp.int32), sizes.size - 1)
    start = jnp.cumsum(sizes)[expert] - sizes[expert]
    first = start + (tile - last[expert] + -(-sizes[expert] // GROUP_ROWS)) * GROUP_ROWS
    return expert, first, jnp.minimum(start + sizes[expert] - first, GROUP_ROWS)


def _products(acc, codes_g, scales_g, x_g, _, expert, first_output, first_row, last_row, first_unit, *, units, total):
    """What `lanes.products` does."""
    rows = acc.shape[1]
    these = pl.ds(first_output, OUTPUTS)
    for i in range(units):
        unit = jnp.minimum(first_unit + i, total - 1)
        codes = codes_g[expert, these, pl.ds(unit * (UNIT // 2), UNIT // 2)]
        scales = floats.e4m3_value(scales_g[expert, these, pl.ds(unit * (UNIT // BLOCK), UNIT // BLOCK)])
        weight = e2m1_value(unpack(codes)) * jnp.repeat(scales, BLOCK, axis=1)
        x_rows = [x_g[jnp.minimum(first_row + m, last_row), pl.ds(unit * UNIT, UNIT)] for m in range(rows)]
        x = jnp.where(first_unit + i < total, jnp.stack(x_rows).astype(jnp.float32), 0.0)
        acc += weight @ x.T
    return acc


def _finish(acc, sums_s, full, out_g, group, block, scale, first_row, count):
    """What `lanes.finish` does."""
    groups, _, rows = sums_s.shape
    sums_s.at[group][...] = acc
    plgpu.barrier_arrive(full)
    plgpu.barrier_wait(full)

    def store(width):  # the last outputs of the 64
        total = sums_s[0, OUTPUTS - width :]
        for i in range(1, groups):
            total += sums_s[i, OUTPUTS - width :]
        total = (total * scale).astype(out_g.dtype)
        for m in range(rows):

            @pl.when(m < count)
            def _(m=m):
                out_g.at[first_row + m, pl.ds(block * OUTPUTS, width)][...] = total[:, m]

    whole, tail = divmod(out_g.shape[1], OUTPUTS)
    pl.when((group == 0) & (block < whole))(functools.partial(store, OUTPUTS))
    if tail:
        pl.when((group == 0) & (block == whole))(functools.partial(store, tail))
