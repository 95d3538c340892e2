"""`quantize` for Hopper (Pallas Mosaic GPU, sm_90a): x is read once, codes and scales of both orientations are written.

A block of threads owns a tile of 128 rows. It comes into shared memory as words of two neighbouring columns, and is
read from there twice: by threads that each own 16 columns of a row, and by threads that each own 16 rows of two
columns. A block of NVFP4 so lies within one thread, as 16 registers of as many arrays: maxima, the Hadamard transform
and packing are elementwise, and no thread needs another's values.

The arithmetic is that of pallas_kernels/nvfp4.py as its first lines put it. The GPU keeps subnormals, so that what
nvfp4.py does for a backend that does not is not needed; its own conversion to E4M3 and its division are used. A
product and a sum may become one instruction that rounds once: those here have exact products, or a minimum between.
The order of additions matters in one place, the 16 float32 terms of the Hadamard transform. Their sum is exact while
their exponents are at most 12 apart; beyond, it is rounded, and both add in the same order (`signed_sums`). Sums of
pairs of pairs would take 4 additions an element in place of 11, and round 1 in three million of normal data otherwise.

Shapes: M rows, N columns of x; a tile has A blocks of 16 rows and B blocks of 16 columns.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import floats
from pallas_kernels.mosaic import Interpret, kernel_call
from pallas_kernels.nvfp4 import (
    BLOCK,
    NVFP4,
    e2m1_stochastic_size,
    signed_sums,
)
from pallas_kernels.random_bits import DGRAD, WGRAD, stream_bits, token_bits, word_bits

ROWS = 128  # of a tile
A = ROWS // BLOCK
COLUMNS = (128, 64)  # of a tile: the first that divides N
THREADS = 128

Encoding = tuple[Any, Any]  # encode * (1/6) and decode of pallas_kernels/nvfp4.py, float32


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
        words = words.reshape(m // BLOCK, BLOCK, n // BLOCK, 8)
    codes, scales, codes_columns, scales_columns = kernel(block_numbers(amax, amax_columns, seed), words)

    def result(codes, scales, of, along, amax):
        codes = lax.bitcast_convert_type(codes.reshape(of, along // 8), jnp.uint8).reshape(of, along // 2)
        return NVFP4(codes, floats.as_e4m3(scales.reshape(of, along // BLOCK)), amax)

    return result(codes, scales, m, n, amax), result(codes_columns, scales_columns, n, m, amax_columns)


def block_numbers(amax: jax.Array, amax_columns: jax.Array, seed: jax.Array | None) -> jax.Array:
    """uint32: the bits of the maxima of rows and of columns; with a seed their `stream_bits`."""
    numbers = [floats.bits_of(z) for z in (amax, amax_columns)]
    if seed is not None:
        numbers += [stream_bits(seed, stream) for stream in (DGRAD, WGRAD)]
    return jnp.stack(numbers)


@functools.lru_cache
def _kernel(m, n, hadamard, stochastic, interpret):
    b_blocks = next(size for size in COLUMNS if n % size == 0) // BLOCK
    together = THREADS // (BLOCK * b_blocks)  # blocks of rows that the threads have one row of each

    def body(numbers_g, x_g, codes_g, scales_g, codes_t_g, scales_t_g, x_s, codes_s, codes_t_s, full):
        tile_a, tile_b = lax.axis_index("a") * A, lax.axis_index("b") * b_blocks
        copies: list[tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]] = [
            (x_g, x_s, (tile_a, A, BLOCK), (tile_b, b_blocks, 8)),
            (codes_g, codes_s, (tile_a, A, BLOCK), (tile_b, b_blocks, 2)),
            (codes_t_g, codes_t_s, (tile_b, b_blocks, BLOCK), (tile_a, A, 2)),
        ]
        (x_in, x_to), *results = [tile_ends(*copy, interpret) for copy in copies]
        plgpu.copy_gmem_to_smem(x_in, x_to, full)
        of_rows, of_columns = (together, BLOCK, b_blocks, 1), (4, 8, 4, 1)  # what the threads hold of each array
        encodings = [encoding(numbers_g[i], shape, interpret) for i, shape in enumerate((of_rows, of_columns))]
        plgpu.barrier_wait(full)

        def rows(i, _):
            here = pl.ds(i * together, together)
            draw = None
            if stochastic:
                along = functools.partial(iota, of_rows)
                token = (tile_a + i * together + along(0)) * BLOCK + along(1)
                draw = row_bytes(bits_of_rows(numbers_g[2], token), tile_b + along(2))
            words = [load_words(x_s.at[here, :, :, pl.ds(j, 1)], of_rows) for j in range(8)]
            parts = [half for word in words for half in halves(word)]
            scale, packed = _quantized(parts, encodings[0], draw, interpret)
            for w in range(2):
                codes_s.at[here, :, :, pl.ds(w, 1)][...] = packed[w]
            there = pl.ds(tile_a + i * together, together)
            scales_g.at[there, :, pl.ds(tile_b, b_blocks), :][...] = scale.astype(jnp.uint8)

        def columns(i, _):
            # 8 pairs of columns in each of 4 blocks, 4 blocks of rows: few of a warp's threads want the same bank.
            b, a = lax.rem(i, b_blocks // 4) * 4, lax.div(i, b_blocks // 4) * 4
            words = [
                load_words(x_s.at[pl.ds(a, 4), pl.ds(r, 1), pl.ds(b, 4), :].transpose((2, 3, 0, 1)), of_columns)
                for r in range(BLOCK)
            ]
            bytes_of = None
            if stochastic:
                along = functools.partial(iota, of_columns)
                of_tokens = bits_of_blocks(numbers_g[3], tile_a + a + along(2))
                bytes_of = column_bytes(of_tokens, tile_b + b + along(0), along(1))
            for parity in range(2):
                parts = [halves(word)[parity] for word in words]
                parts = transformed(parts, interpret) if hadamard else parts
                draw = bytes_of(parity) if bytes_of else None
                scale, packed = _quantized(parts, encodings[1], draw, interpret)
                for w in range(2):
                    codes_t_s.at[pl.ds(b, 4), :, parity, pl.ds(a, 4), pl.ds(w, 1)][...] = packed[w]
                there = scales_t_g.at[pl.ds(tile_b + b, 4), :, parity, pl.ds(tile_a + a, 4), :]
                there[...] = scale.astype(jnp.uint8)

        lax.fori_loop(0, A // together, rows, None)
        lax.fori_loop(0, A // 4 * (b_blocks // 4), columns, None)
        plgpu.commit_smem()
        for to, made in results:
            plgpu.copy_smem_to_gmem(made, to)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    blocks_m, blocks_n = m // BLOCK, n // BLOCK
    codes: list[tuple[int, ...]] = [(m, n // 8), (n, m // 8)]
    if interpret is not None:
        codes = [(blocks_m, BLOCK, blocks_n, 2), (blocks_n, 8, 2, blocks_m, 2)]
    scales = [(blocks_m, BLOCK, blocks_n, 1), (blocks_n, 8, 2, blocks_m, 1)]
    of_codes, of_columns = (jax.ShapeDtypeStruct(shape, jnp.uint32) for shape in codes)
    of_scales, of_columns_scales = (jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in scales)
    return kernel_call(
        body,
        warpgroups=1,
        interpret=interpret,
        auto_barriers=False,
        lanes=True,
        out_type=[of_codes, of_scales, of_columns, of_columns_scales],
        grid=(blocks_m // A, blocks_n // b_blocks),
        grid_names=("a", "b"),
        scratch_types=[
            plgpu.SMEM((A, BLOCK, b_blocks, 8), jnp.uint32),
            plgpu.SMEM((A, BLOCK, b_blocks, 2), jnp.uint32),
            plgpu.SMEM((b_blocks, 8, 2, A, 2), jnp.uint32),
            plgpu.Barrier(num_arrivals=1),
        ],
    )


def tile_ends(
    in_gmem: Any, in_smem: Any, outer: tuple[Any, ...], inner: tuple[Any, ...], interpret: Interpret
) -> tuple[Any, Any]:
    """The two refs of a copy, of ``outer`` (first block, blocks, rows in each) times ``inner`` (first, blocks, words).

    Copied as matrices: TMA moves runs of 16 bytes and more. The interpreter, which knows no reshaped refs, copies
    arrays as fine as those in shared memory, of which the blocks' axes are cut.
    """
    (first_outer, outer_blocks, rows), (first_inner, inner_blocks, words) = outer, inner
    if interpret is None:
        cut = pl.ds(first_outer * rows, outer_blocks * rows), pl.ds(first_inner * words, inner_blocks * words)
        return in_gmem.at[cut], in_smem.reshape(outer_blocks * rows, inner_blocks * words)
    within = (slice(None),) * (len(in_smem.shape) - 3)
    cut = pl.ds(first_outer, outer_blocks), *within, pl.ds(first_inner, inner_blocks), slice(None)
    return in_gmem.at[cut], in_smem


def _strided(shape):
    return plgpu.Layout.WG_STRIDED(shape, vec_size=1)


def load_words(ref: Any, shape: tuple[int, ...]) -> Any:
    """Shared memory -> registers: one word a thread."""
    return plgpu.load(ref, layout=_strided(shape), optimized=False)


def iota(shape: tuple[int, ...], axis: int) -> Any:
    """int32, laid out as what `load_words` loads."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_strided(shape))


def halves(word: Any) -> tuple[Any, Any]:
    """Two bfloat16 in each uint32 -> float32 of the low ones, and of the high ones."""
    low, high = word << jnp.uint32(16), word & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(low, jnp.float32), lax.bitcast_convert_type(high, jnp.float32)


def row_bytes(of_token: Any, block: Any) -> list[Any]:
    """What `random_bytes` gives for 16 columns; ``of_token``: `token_bits` of the row; ``block``: int32, which 16."""
    first = (block * 4).astype(jnp.uint32)
    words = [word_bits(of_token, first + jnp.uint32(word)) for word in range(4)]
    return [(words[j // 4] >> jnp.uint32(8 * (j % 4))) & jnp.uint32(255) for j in range(BLOCK)]


def column_bytes(of_tokens: list[Any], block: Any, pair: Any) -> Callable[[int], list[Any]]:
    """The same for 16 rows of a pair of columns, of the 8 in a block: a function of which of the two."""
    word = (block * 4 + (pair >> 1)).astype(jnp.uint32)
    low = ((pair & 1) * 16).astype(jnp.uint32)
    words = [word_bits(of_token, word) >> low for of_token in of_tokens]
    return lambda parity: [(each >> jnp.uint32(8 * parity)) & jnp.uint32(255) for each in words]


def bits_of_rows(stream: Any, row: Any) -> Any:
    """`token_bits` where a token is a row, int32."""
    return token_bits(lax.broadcast(stream, row.shape), row.astype(jnp.uint32))


def bits_of_blocks(stream: Any, block_of_rows: Any) -> list[Any]:
    """The same of each of the 16 rows of a block, int32."""
    return [bits_of_rows(stream, block_of_rows * BLOCK + row) for row in range(BLOCK)]


def transformed(parts: list[Any], interpret: Interpret) -> list[Any]:
    """The Hadamard transform of 16 arrays, rounded to bfloat16: opaque to XLA, this cast is not removed."""
    sums = signed_sums([part * 0.25 for part in parts])
    if interpret is not None:
        return [z.astype(jnp.bfloat16).astype(jnp.float32) for z in sums]
    # Two at a time: a conversion of one goes to a pipe that takes one every eight cycles.
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return [half for pair in pairs for half in halves(_asm("cvt.rn.bf16x2.f32 $0, $2, $1;", jnp.uint32, *pair))]


def encoding(amax: Any, shape: tuple[int, ...], interpret: Interpret) -> Encoding:
    """Of tensors with the maxima whose bits (uint32) are ``amax``: one for all, or like what the threads hold."""
    amax = amax if amax.shape else plgpu.layout_cast(lax.broadcast(amax, shape), _strided(shape))
    encode = _divide(2688.0, lax.bitcast_convert_type(amax, jnp.float32), interpret)
    encode = jnp.where(encode > floats.FLOAT32_MAX, floats.FLOAT32_MAX, encode)  # NaN stays
    none = (amax == jnp.uint32(0)) | (amax == jnp.uint32(0x7F800000))
    encode = jnp.where(none, jnp.float32(1), encode)
    if interpret is None:
        return encode * (1 / 6), _divide(1.0, encode, interpret)
    encode = lax.optimization_barrier(encode)  # XLA:CPU would draw constants together, and round elsewhere
    return lax.optimization_barrier((encode * (1 / 6), _divide(1.0, encode, interpret)))


def scaled(
    parts: list[Any],
    of_tensor: Encoding,
    interpret: Interpret,
    across: Callable[[Any], Any] = lambda largest: largest,
) -> tuple[Any, Any, list[Any]]:
    """16 float32 arrays, element by element one block, in units of its scale; or any number of them, part of it.

    Args:
      of_tensor: of the parts' shape.
      across: from the largest of the parts to that of the block, where others have more of it.

    Returns:
      the scale: its e4m3 code uint32, and its value; the parts, which E2M1 is to round.
    """
    sixth, decode = of_tensor
    largest = across(functools.reduce(jnp.maximum, [jnp.abs(part) for part in parts]))
    scale, value = _e4m3(largest * sixth, interpret)
    inverse = jnp.minimum(_divide(1.0, value * decode, interpret), floats.FLOAT32_MAX)
    return scale, value, [part * inverse for part in parts]


def stochastic_code(x: Any, draw: Any) -> Any:
    """E2M1 code uint32 of float32 by a byte (uint32)."""
    sign = (lax.bitcast_convert_type(x, jnp.uint32) >> jnp.uint32(28)) & jnp.uint32(8)
    return e2m1_stochastic_size(jnp.abs(x), draw) | sign


def _quantized(parts, of_tensor, draw, interpret):
    """The codes of scales, and 8 E2M1 codes each in two arrays uint32; ``draw``: a byte for each of the parts."""
    scale, value, parts = scaled(parts, of_tensor, interpret)
    if draw is None:
        codes = [nearest_code(part, interpret) for part in parts]
    else:
        codes = [stochastic_code(part, each) for part, each in zip(parts, draw, strict=True)]
    packed = [functools.reduce(lambda word, code: word * jnp.uint32(16) + code, codes[w : w + 8][::-1]) for w in (0, 8)]
    if draw is None:  # to nearest, NaN is 0; a GPU's NaN has all bits set
        excess = jnp.uint32(sum(EXCESS << 4 * i for i in range(8)) % 2**32)
        kept = jnp.where(jnp.isnan(value), jnp.uint32(0), jnp.uint32(0xFFFFFFFF))
        packed = [(word - excess) & kept for word in packed]
    return scale, packed


ROUNDING = 1.5 * 2.0**25  # what is added to it is rounded to fours, ties to even, and the lowest bits count them
EXCESS = 0x4C400000  # its own bits


def nearest_code(x: Any, interpret: Interpret) -> Any:
    """E2M1 code of float32, to nearest, ties to even; uint32, with EXCESS beyond the lowest four bits.

    A GPU compares and selects half as fast as it adds, but it clips a sum to 0 .. 1 for nothing. Sizes up to 2 are four
    codes, from there to 4 are two and to 6 are one: what is clipped counts so often, and is rounded as it is added. A
    tie goes to an even sum, and the sums before are even.
    """
    half = jnp.abs(x) * 0.5
    code = jnp.where(x < 0, jnp.float32(ROUNDING + 4 * 8), jnp.float32(ROUNDING))
    for codes, begin in ((4, 0.0), (2, 1.0), (1, 2.0)):
        code = code + jnp.float32(4 * codes) * _clipped(half, begin, interpret)  # twice would become a sum of its own
    return lax.bitcast_convert_type(code, jnp.uint32)


def nearest_value(x: Any, interpret: Interpret) -> Any:
    """The value of E2M1 that is nearest to a float32, ties to even; any where x is NaN. -0 is 0, as its code is.

    Added to 1.5 * 2^22 of the steps of E2M1 about x, a float32 is rounded to whole steps.
    """
    x = x + 0.0 if interpret is None else jnp.where(x == 0, 0.0, x)  # a sum that XLA would leave out
    x = jnp.clip(x, -6.0, 6.0)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    power = jnp.maximum(bits & jnp.uint32(0x7F800000), jnp.uint32(0x3F800000))  # of x, 1 at least
    large = lax.bitcast_convert_type(power + jnp.uint32((22 << 23) + (1 << 22)), jnp.float32)
    nearest = lax.bitcast_convert_type((x + large) - large, jnp.uint32)
    return lax.bitcast_convert_type(nearest | bits & jnp.uint32(0x80000000), jnp.float32)


def stochastic_value(x: Any, draw: Any, interpret: Interpret) -> Any:
    """The value of `stochastic_code`, with the sign of zero; any where x is NaN.

    The sum of |x| and a share of its step is cut to whole steps, of |x| too: one that reaches the next power of two
    stays there.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    power = jnp.maximum(bits & jnp.uint32(0x7F800000), jnp.uint32(0x3F800000))  # of x, 1 at least; twice its step
    share = lax.bitcast_convert_type(power - jnp.uint32(9 << 23), jnp.float32)  # a 256th of the step
    # A byte in the lowest bits of 2^23: a conversion takes the pipe that is the slowest.
    byte = lax.bitcast_convert_type(draw | jnp.uint32(0x4B000000), jnp.float32) - jnp.float32(2.0**23)
    moved = jnp.abs(x) + byte * share
    if interpret is None:
        large = lax.bitcast_convert_type(power + jnp.uint32(22 << 23), jnp.float32)
        cut = _asm("add.rz.f32 $0, $1, $2;", jnp.float32, moved, large) - large
    else:
        step = share * 256
        cut = jnp.floor(moved / step) * step
    size = lax.bitcast_convert_type(jnp.minimum(cut, 6.0), jnp.uint32)
    return lax.bitcast_convert_type(size | bits & jnp.uint32(0x80000000), jnp.float32)


def _clipped(x, begin, interpret):
    """x - begin within 0 .. 1."""
    if interpret is not None:
        return jnp.clip(x - begin, 0.0, 1.0)
    return _asm(f"add.sat.f32 $0, $1, 0f{int(np.float32(-begin).view(np.uint32)):08X};", jnp.float32, x)


def _e4m3(x, interpret):
    """float32 >= 0 -> (e4m3 code uint32, its value): `floats.e4m3_code`, which takes twenty instructions."""
    if interpret is not None:  # which knows no registers
        code = floats.e4m3_code(x)
        return code.astype(jnp.uint32), floats.e4m3_value(code)
    registers = ".reg .b16 two, high; .reg .b32 pair;"
    code = _asm(registers + "cvt.rn.satfinite.e4m3x2.f32 two, 0f00000000, $1; cvt.u32.u16 $0, two;", jnp.uint32, x)
    halves = "cvt.u16.u32 two, $1; cvt.rn.f16x2.e4m3x2 pair, two; mov.b32 {two, high}, pair; cvt.f32.f16 $0, two;"
    return code, _asm(registers + halves, jnp.float32, code)


def _divide(numerator, x, interpret):
    """numerator / x of float32, correctly rounded, subnormal or not. (Mosaic divides approximately.)"""
    if interpret is not None:
        return numerator / x
    bits = np.float32(numerator).view(np.uint32)
    instruction = "rcp.rn.f32 $0, $1;" if numerator == 1 else f"div.rn.f32 $0, 0f{bits:08X}, $1;"
    return _asm(instruction, jnp.float32, x)


def largest_of_neighbours(x: Any, interpret: Interpret) -> Any:
    """float32 [..., 8], laid out as what `load_words` loads -> the largest of each 8 threads, in all of them."""
    if interpret is not None:
        return lax.broadcast_in_dim(jnp.max(x, axis=-1), x.shape, range(x.ndim - 1))
    for distance in (1, 2, 4):
        x = jnp.maximum(x, _asm(f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;", jnp.float32, x))
    return x


def _asm(instructions, dtype, *operands):
    """PTX from $1, $2, ..., each a float32 or uint32, to $0, one of the two; for every element."""
    shape = operands[0].shape
    layout = _strided(shape)

    @plgpu.inline_mgpu(
        arg_types=(layout,) * len(operands), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)
    )
    def apply(_, *arrays):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        kinds = {jnp.dtype(jnp.float32): (f32, "f"), jnp.dtype(jnp.uint32): (i32, "r")}
        of_result, result_kind = kinds[jnp.dtype(dtype)]
        constraints = ",".join([f"={result_kind}", *(kinds[x.dtype][1] for x in operands)])
        registers = np.empty_like(arrays[0].registers)
        for i in np.ndindex(registers.shape):
            given = [vector.extract(array.registers[i], [], [0]) for array in arrays]
            result = llvm.inline_asm(of_result, given, "{ " + instructions + " }", constraints)
            registers[i] = vector.broadcast(ir.VectorType.get((1,), of_result), result)
        signed = None if of_result == f32 else False
        return mgpu.FragmentedArray(_registers=registers, _layout=arrays[0].layout, _is_signed=signed)

    return apply(*operands)
