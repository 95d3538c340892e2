"""Products of few rows with packed NVFP4 weights on Hopper (Mosaic GPU, sm_90a): the weights are read once, packed.

    out[t, n, m] = sum over k of code[e, n, k] * block scale[e, n, k / 16] * x[t, m, k]        e = expert[t]

The weights are the left operand of wgmma and reach it in registers, so that the few rows of x are its narrow side. A
byte holds inputs 2j and 2j + 1. Both halves of a tile of bytes are multiplied as they lie, by the even and by the odd
columns of x: nothing is interleaved, and x, which is small, is the side that is sorted.

E2M1 becomes bfloat16 by moving its bits: the exponent and the mantissa bit, put at the lowest exponent, are the value
times 2^-126, 0.5 being a subnormal. An E4M3 scale becomes float32 in the same way. The scale is multiplied by 2^119 and
so makes up for it; the last 2^7 are left to the scale of the tensor. All of these products are exact.

A block takes 64 outputs for each of its warpgroups and up to SPAN inputs, all of whose loads start at once; the sums of
the spans are added afterwards.

Shapes: E experts, N outputs, K inputs, T tiles of M rows, S spans of inputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import floats
from pallas_kernels.mosaic import ROW, WGMMA, Interpret, along_rows, kernel_call, load, tiles
from pallas_kernels.nvfp4 import e2m1_value
from pallas_kernels.packed import Packed

MOST_ROWS = 64  # of x in all: beyond, the tensor cores are the limit, and dense weights serve them better
GROUP_ROWS = 8  # of a tile of one expert: the narrowest wgmma
OUTPUTS = 64  # of a warpgroup
WARPGROUPS = 2
STEP = 256  # inputs of one load: 128 bytes of codes
STEPS = 4
SPAN = STEP * STEPS
HALF = 64  # bytes of codes that are decoded at a time: 128 inputs
WORD = 64  # inputs whose four block scales make one uint32

# x * code 2^-126 * scale 2^119: what is left is 2^7.
LEFT_OVER = 128.0
INTERPRETED = 93  # in place of 119: XLA:CPU flushes subnormals


def unfit(x: jax.Array, w: Packed, rows: int) -> str:
    """Why the kernels cannot take `rows` rows of x and the weight w, or ""."""
    if w.block_scales is None:
        return "FP8 weights"
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {x.dtype}"
    inputs, outputs = w.shape[-2:]
    if inputs % (2 * HALF) or inputs < STEP or outputs < OUTPUTS:
        least = f"K must be a multiple of {2 * HALF} and at least {STEP}, N at least {OUTPUTS}"
        return f"{least}, got {inputs} and {outputs}"
    if not 0 < rows <= MOST_ROWS:  # any prompt: a reason without its length is said once
        return f"1 to {MOST_ROWS} rows"
    return ""


def multiply(x_MK: jax.Array, w: Packed, *, interpret: Interpret = None) -> jax.Array:
    """x [M, K] bfloat16, w [K, N] -> [M, N] float32."""
    assert w.block_scales is not None
    rows = x_MK.shape[0]
    x_TMK = jnp.pad(x_MK, ((0, -rows % 8), (0, 0)))[None]
    expert = jnp.zeros(1, jnp.int32)
    out_TNM = _multiply(x_TMK, w.codes[None], w.block_scales[None], expert, interpret)
    return out_TNM[0, :, :rows].T * (w.scale * LEFT_OVER)


def multiply_groups(lhs: jax.Array, rhs: Packed, group_sizes: jax.Array, *, interpret: Interpret = None) -> jax.Array:
    """lhs [M, K] bfloat16, rhs [E, K, N], group_sizes [E] int32 -> [M, N] float32; only experts with rows are read."""
    assert rhs.block_scales is not None
    rows, experts = lhs.shape[0], group_sizes.shape[0]
    # A masked sum is one kernel; a cumulative sum of so few numbers is four, a search in them twenty.
    group = jnp.arange(experts)
    until = group <= group[:, None]
    ends = jnp.minimum(jnp.where(until, group_sizes, 0).sum(1, dtype=jnp.int32), rows)
    starts = jnp.minimum(jnp.where(until & (group != group[:, None]), group_sizes, 0).sum(1, dtype=jnp.int32), rows)
    tiles_of = -(-(ends - starts) // GROUP_ROWS)
    last = jnp.where(until, tiles_of, 0).sum(1, dtype=jnp.int32)
    before = last - tiles_of

    tile = jnp.arange(min(rows, experts + rows // GROUP_ROWS))  # never more tiles than rows
    expert = (last <= tile[:, None]).sum(1, dtype=jnp.int32)  # E: not in use
    mine = jnp.minimum(expert, experts - 1)
    row_TM = (starts[mine] + (tile - before[mine]) * GROUP_ROWS)[:, None] + jnp.arange(GROUP_ROWS)
    x_TMK = lhs[jnp.clip(row_TM, 0, rows - 1)]
    out_TNM = _multiply(x_TMK, rhs.codes, rhs.block_scales, expert, interpret)

    row = jnp.arange(rows)
    owner = (ends <= row[:, None]).sum(1, dtype=jnp.int32)
    mine = jnp.minimum(owner, experts - 1)
    place = row - starts[mine]
    out = out_TNM[before[mine] + place // GROUP_ROWS, :, place % GROUP_ROWS]
    return jnp.where((owner < experts)[:, None], out * (rhs.scale[mine] * LEFT_OVER)[:, None], 0.0)


def _multiply(x_TMK, codes_ENK, scales_ENK, expert, interpret):
    """-> [T, N, M] float32, without the scales of the experts and 2^7; undefined where expert is E."""
    count, rows, inputs = x_TMK.shape
    x_T2MK = x_TMK.reshape(count, rows, inputs // 2, 2).transpose(0, 3, 1, 2)
    # Four scales in a word: one load, and rows of whole words whatever K is.
    scales = lax.bitcast_convert_type(scales_ENK, jnp.uint8).reshape(*scales_ENK.shape[:-1], inputs // WORD, 4)
    words_ENK = lax.bitcast_convert_type(scales, jnp.uint32)
    kernel = _kernel(codes_ENK.shape, count, rows, interpret)
    out_TNM = kernel(expert, codes_ENK, words_ENK, x_T2MK).sum(1)
    outputs = codes_ENK.shape[1]
    if tail := outputs % OUTPUTS:  # the last 64 outputs, of which the tile before has some
        out_TNM = jnp.concatenate([out_TNM[:, : outputs - tail], out_TNM[:, -tail:]], axis=1)
    return out_TNM


@functools.lru_cache
def _kernel(codes_shape, count, rows, interpret):
    experts, outputs, row_bytes = codes_shape
    spans = -(-2 * row_bytes // SPAN)
    words = 2 * row_bytes // WORD

    def body(expert_g, codes_g, words_g, x_g, out_g, codes_s, x_s, weight_s, full):
        warpgroup, block, span, tile = (lax.axis_index(name) for name in ("wg", "n", "s", "t"))
        expert = expert_g[tile]
        place = (block * WARPGROUPS + warpgroup) * OUTPUTS
        out_rows = pl.ds(jnp.minimum(place, outputs - OUTPUTS), OUTPUTS)  # the last ones start where they still fit
        first = span * (SPAN // 2)

        def in_use(step, act):
            if (step + 1) * STEP > 2 * row_bytes % SPAN > 0:  # the last span may not have it
                pl.when(first + step * (STEP // 2) < row_bytes)(act)
            else:
                act()

        def fetch(step):
            columns = pl.ds(first + step * (STEP // 2), STEP // 2)
            plgpu.copy_gmem_to_smem(codes_g.at[expert, out_rows, columns], codes_s.at[warpgroup, step], full.at[step])

            @pl.when(warpgroup == 0)
            def _():
                for parity in range(2):
                    plgpu.copy_gmem_to_smem(x_g.at[tile, parity, :, columns], x_s.at[step, parity], full.at[step])

        def load_word(i):
            word = jnp.minimum(span * (SPAN // WORD) + i, words - 1)
            return load(words_g.at[expert, out_rows, word], ROW)

        def accumulate(acc):
            words_of_span = [load_word(i) for i in range(SPAN // WORD)]

            def multiply(step):
                plgpu.barrier_wait(full.at[step])
                for half in range(STEP // 2 // HALF):
                    columns = pl.ds(half * HALF, HALF)
                    codes = plgpu.load(codes_s.at[warpgroup, step, :, columns], layout=WGMMA).astype(jnp.uint16)
                    at = (step * STEP + half * 2 * HALF) // WORD
                    # 8 bytes share a scale.
                    scales = [s for word in words_of_span[at : at + 2] for s in _scales(word, interpret)]
                    each = [along_rows(s, (OUTPUTS, 8)) for s in scales]
                    factor = jnp.concatenate(each, axis=1)
                    for parity, values in enumerate(_values(codes, interpret)):
                        weight = values * factor
                        if interpret is not None:  # which has no wgmma with an operand in registers
                            weight_s.at[warpgroup, parity][...] = weight
                            plgpu.commit_smem()
                            weight = weight_s.at[warpgroup, parity]
                        plgpu.wgmma(acc, weight, x_s.at[step, parity, :, columns].transpose((1, 0)))
                    plgpu.wgmma_wait(0)

            for step in range(STEPS):
                in_use(step, functools.partial(multiply, step))
            return acc[...]

        @pl.when(expert < experts)
        def _():
            for step in range(STEPS):
                in_use(step, functools.partial(fetch, step))
            total = pl.run_scoped(accumulate, plgpu.ACC((OUTPUTS, rows), jnp.float32))

            @pl.when(place < outputs)
            def _():
                out_g.at[tile, span, pl.ds(place, OUTPUTS)][...] = total

    by_64_bytes = (plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(HALF))  # type: ignore[abstract]
    return kernel_call(
        body,
        warpgroups=WARPGROUPS,
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((count, spans, -(-outputs // OUTPUTS) * OUTPUTS, rows), jnp.float32),
        grid=(-(-outputs // (OUTPUTS * WARPGROUPS)), spans, count),
        grid_names=("n", "s", "t"),
        scratch_types=[
            plgpu.SMEM((WARPGROUPS, STEPS, OUTPUTS, STEP // 2), jnp.uint8, transforms=by_64_bytes),
            tiles(STEPS, 2, rows, STEP // 2),
            tiles(WARPGROUPS, 2, OUTPUTS, HALF) if interpret is not None else None,
            plgpu.Barrier(num_arrivals=WARPGROUPS + 2, num_barriers=STEPS),
        ],
    )


def scale_bits(word: Any, byte: int) -> Any:
    """uint32 with four E4M3 codes -> the bits of float32 scale * 2^-120 of one of them."""
    field = (word >> np.uint32(8 * byte)) & np.uint32(0x7F)
    sign = (word << np.uint32(24 - 8 * byte)) & np.uint32(0x80000000)
    return field << np.uint32(20) | sign


def _scales(word, interpret):
    """bfloat16 scale * 2^119 of each of the four; NaN stays NaN."""
    found = []
    for byte in range(4):
        code = (word >> np.uint32(8 * byte)) & np.uint32(0x7F)
        if interpret is not None:
            scale = floats.e4m3_value((word >> np.uint32(8 * byte)).astype(jnp.uint8)) * 2.0**INTERPRETED
        else:
            scale = lax.bitcast_convert_type(scale_bits(word, byte), jnp.float32) * 2.0**120 * 2.0**119
            scale = jnp.where(code == np.uint32(0x7F), jnp.float32(jnp.nan), scale)
        found.append(scale.astype(jnp.bfloat16))
    return found


# Low and high half of a byte in 16 bits: (mask and left shift of exponent and mantissa, those of the sign).
E2M1_FIELDS = (((0x07, 6), (0x08, 12)), ((0x70, 2), (0x80, 8)))

_PAIR = plgpu.ShapeDtypeStruct((OUTPUTS, HALF), jnp.uint16, layout=WGMMA)


@plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=(_PAIR, _PAIR))
def _value_bits(_, codes):
    """E2M1_FIELDS applied to registers, two bytes at a time: Mosaic shifts 16-bit numbers one by one."""
    i32 = ir.IntegerType.get_signless(32)

    def constant(value):
        return mgpu.c(value, i32)

    def moved(pair, mask, left):
        return arith.shli(arith.andi(pair, constant(mask * 0x10001)), constant(left))

    def values(fields):
        registers = np.empty_like(codes.registers)
        for i in np.ndindex(registers.shape):
            register = codes.registers[i]
            pair = mgpu.utils.bitcast(register, i32)
            exponent, sign = (moved(pair, *field) for field in fields)
            registers[i] = mgpu.utils.bitcast(arith.ori(exponent, sign), register.type)
        return mgpu.FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=False)

    return tuple(values(fields) for fields in E2M1_FIELDS)


def _values(codes, interpret):
    """Bytes [64, 64] in uint16 -> bfloat16 value * 2^-126 of their low halves, and of their high halves."""
    if interpret is not None:  # which knows no registers
        both = (e2m1_value(half.astype(jnp.uint8)) for half in (codes & 15, codes >> 4))
        return tuple((values * 2.0 ** -(INTERPRETED + 7)).astype(jnp.bfloat16) for values in both)
    return tuple(lax.bitcast_convert_type(bits, jnp.bfloat16) for bits in _value_bits(codes))
