"""The arithmetic of NVFP4 in the registers of a GPU, for the kernels that quantise (Pallas Mosaic GPU, lane semantics).

A block of NVFP4 lies within one thread, as 16 registers of as many arrays: maxima, the Hadamard transform and packing
are elementwise, and no thread needs another's values.

The arithmetic is that of pallas_kernels/nvfp4.py as its first lines put it. The GPU keeps subnormals, so that what
nvfp4.py does for a backend that does not is not needed; its own conversion to E4M3 and its division are used. A
product and a sum may become one instruction that rounds once: those here have exact products, or a minimum between.
The order of additions matters in one place, the 16 float32 terms of the Hadamard transform. Their sum is exact while
their exponents are at most 12 apart; beyond, it is rounded, and both add in the same order (`signed_sums`). Sums of
pairs of pairs would take 4 additions an element in place of 11, and round otherwise.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref, scf, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import floats
from pallas_kernels.mosaic import Interpret
from pallas_kernels.nvfp4 import BLOCK, signed_sums
from pallas_kernels.random_bits import word_bits

Encoding = tuple[Any, Any]  # encode * (1/6) and decode of pallas_kernels/nvfp4.py, float32
Draw = tuple[Any, int]  # a random byte: uint32, and which of its bytes, the lowest first


def _strided(shape):
    return plgpu.Layout.WG_STRIDED(shape, vec_size=1)


def load_words(ref: Any, shape: tuple[int, ...]) -> Any:
    """Shared memory -> registers: one word a thread."""
    return plgpu.load(ref, layout=_strided(shape), optimized=False)


def gathered(ref: Any, index: Any, interpret: Interpret) -> Any:
    """uint32 ref [...] -> ref[index], like index; the same layout."""
    if interpret is not None:
        return ref[...][index]
    layout = _strided(index.shape)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout),
        return_type=plgpu.ShapeDtypeStruct(index.shape, jnp.uint32, layout=layout),
    )
    def load(_, ref, index):
        i32 = ir.IntegerType.get_signless(32)
        registers = np.empty_like(index.registers)
        for i in np.ndindex(registers.shape):
            place = arith.index_cast(ir.IndexType.get(), vector.extract(index.registers[i], [], [0]))
            registers[i] = vector.broadcast(ir.VectorType.get((1,), i32), memref.load(ref, [place]))
        return mgpu.FragmentedArray(_registers=registers, _layout=index.layout, _is_signed=False)

    return load(ref, index)


def iota(shape: tuple[int, ...], axis: int) -> Any:
    """int32, laid out as what `load_words` loads."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_strided(shape))


def halves(word: Any) -> tuple[Any, Any]:
    """Two bfloat16 in each uint32 -> float32 of the low ones, and of the high ones."""
    low, high = word << jnp.uint32(16), word & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(low, jnp.float32), lax.bitcast_convert_type(high, jnp.float32)


def row_bytes(of_token: Any, block: Any) -> list[Draw]:
    """What `random_bytes` gives for 16 columns; ``of_token``: `token_bits` of the row; ``block``: int32, which 16."""
    first = (block * 4).astype(jnp.uint32)
    words = [word_bits(of_token, first + jnp.uint32(word)) for word in range(4)]
    return [(words[j // 4], j % 4) for j in range(BLOCK)]


def column_bytes(of_tokens: list[Any], block: Any, pair: Any) -> Callable[[int], list[Draw]]:
    """The same for 16 rows of a pair of columns, of the 8 in a block: a function of which of the two."""
    word = (block * 4 + (pair >> 1)).astype(jnp.uint32)
    low = ((pair & 1) * 16).astype(jnp.uint32)
    words = [word_bits(of_token, word) >> low for of_token in of_tokens]
    return lambda parity: [(each, parity) for each in words]


def transformed(parts: list[Any], interpret: Interpret) -> list[Any]:
    """The Hadamard transform of 16 arrays, rounded to bfloat16: opaque to XLA, this cast is not removed."""
    sums = signed_sums([part * 0.25 for part in parts])
    if interpret is not None:
        return [z.astype(jnp.bfloat16).astype(jnp.float32) for z in sums]
    # A conversion of two, the other 0, gives what is the float32 already. (That of one takes a slower pipe.)
    rounded = [_asm("cvt.rn.bf16x2.f32 $0, $1, 0f00000000;", jnp.uint32, z) for z in sums]
    return [lax.bitcast_convert_type(z, jnp.float32) for z in rounded]


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
    *,
    underflow: float | None,
) -> tuple[Any, Any, list[Any]]:
    """16 float32 arrays, element by element one block, in units of its scale; or any number of them, part of it.

    Args:
      of_tensor: of the parts' shape.
      across: from the largest of the parts to that of the block, where others have more of it.
      underflow: for rounding to nearest, which gives zeros no sign: the least inverse of a scale with which no part
        underflows, by the dtype of x. None: signs stay.

    Returns:
      the scale: its e4m3 code uint32, and its value; the parts, which E2M1 is to round.
    """
    sixth, decode = of_tensor
    largest = across(functools.reduce(jnp.maximum, [jnp.abs(part) for part in parts]))
    scale, value = _e4m3(largest * sixth, interpret)
    inverse = jnp.minimum(_divide(1.0, value * decode, interpret), floats.FLOAT32_MAX)
    units = [part * inverse for part in parts]
    return scale, value, units if underflow is None else _positive_zeros(units, inverse, underflow, interpret)


UNDERFLOW_BFLOAT16, UNDERFLOW_FLOAT32 = 2.0**-16, 1.0


def _positive_zeros(units, inverse, underflow, interpret):
    """Products of ``inverse``, where -0 becomes 0.

    A sum with 0 does that. The compiler makes one instruction of it and the product, which rounds once: what underflows
    keeps its sign. That takes a block of more than 100 binades, so that the second sum is hardly needed.
    """
    if interpret is not None:
        return [jnp.where(unit == 0, 0.0, unit) for unit in units]
    layout = _strided(inverse.shape)
    like_inverse = plgpu.ShapeDtypeStruct(inverse.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * (1 + len(units)), return_type=(like_inverse,) * len(units))
    def summed(_, inverse, *units):
        f32 = ir.F32Type.get()
        made = [np.empty_like(inverse.registers) for _ in units]
        for i in np.ndindex(inverse.registers.shape):
            factor, *given = (vector.extract(array.registers[i], [], [0]) for array in (inverse, *units))
            least = mgpu.c(underflow, f32)
            small = arith.cmpf(arith.CmpFPredicate.OLT, factor, least)
            branch = scf.IfOp(small, [f32] * len(units), has_else=True)  # type: ignore[call-arg]
            with ir.InsertionPoint(branch.then_block):
                scf.yield_([llvm.inline_asm(f32, [z], "add.f32 $0, $1, 0f00000000;", "=f,f") for z in given])
            with ir.InsertionPoint(branch.else_block):
                scf.yield_(given)
            for registers, result in zip(made, branch.results, strict=True):
                registers[i] = vector.broadcast(ir.VectorType.get((1,), f32), result)
        return tuple(
            mgpu.FragmentedArray(_registers=registers, _layout=inverse.layout, _is_signed=None) for registers in made
        )

    return list(summed(inverse, *(unit + 0.0 for unit in units)))


def quantized(parts: list[Any], of_tensor: Encoding, draws: list[Draw] | None, interpret: Interpret) -> Any:
    """The codes of scales, and 8 E2M1 codes each in two arrays uint32; ``draws``: for stochastic rounding."""
    scale, value, units = scaled(parts, of_tensor, interpret, underflow=UNDERFLOW_BFLOAT16 if draws is None else None)
    valid = ~jnp.isnan(value)
    packed = []
    for w in (0, 8):
        eight = slice(w, w + 8)
        if draws is None:  # NaN is 0; a GPU's NaN has all bits set
            sizes = [nearest_size(unit, interpret) for unit in units[eight]]
            word = functools.reduce(lambda word, size: word * jnp.uint32(16) + size, sizes[::-1])
            word = (word - jnp.uint32(sum(EXCESS << 4 * i for i in range(8)) % 2**32)) | _signs(units[eight], interpret)
            packed.append(jnp.where(valid, word, jnp.uint32(0)))
        else:
            sizes = [stochastic_size(*each, interpret) for each in zip(units[eight], draws[eight], strict=True)]
            even, odd = (bytes_of_four(sizes[first::2], 2, interpret) for first in (0, 1))
            word = even + (odd << jnp.uint32(4)) | _signs(parts[eight], interpret)
            packed.append(jnp.where(valid, word, jnp.uint32(0x77777777)))
    return scale, packed


def _signs(eight, interpret):
    """The sign of each float32, as the highest bit of four: those of a uint32, the first's lowest."""
    bits = [lax.bitcast_convert_type(each, jnp.uint32) for each in eight]
    even, odd = (bytes_of_four(bits[first::2], 3, interpret) for first in (0, 1))
    return (even >> jnp.uint32(4)) & jnp.uint32(0x08080808) | odd & jnp.uint32(0x80808080)


ROUNDING = 1.5 * 2.0**25  # what is added to it is rounded to fours, ties to even, and the lowest bits count them
EXCESS = 0x4C400000  # its own bits


def nearest_size(x: Any, interpret: Interpret) -> Any:
    """E2M1 code of |x| float32, to nearest, ties to even; uint32, with EXCESS beyond the lowest three bits.

    A GPU compares and selects half as fast as it adds, but it clips a sum to 0 .. 1 for nothing. Sizes up to 2 are four
    codes, from there to 4 are two and to 6 are one: what is clipped counts so often, and is rounded as it is added. A
    tie goes to an even sum, and the sums before are even.
    """
    half = jnp.abs(x) * 0.5
    code = jnp.float32(ROUNDING)
    for codes, begin in ((4, 0.0), (2, 1.0), (1, 2.0)):
        code = code + jnp.float32(4 * codes) * _clipped(half, begin, interpret)  # twice would become a sum of its own
    return lax.bitcast_convert_type(code, jnp.uint32)


def nearest_value(x: Any, interpret: Interpret) -> Any:
    """The value of E2M1 that is nearest to a float32, ties to even, with its sign; any where x is NaN.

    Added to 1.5 * 2^22 of the steps of E2M1 about x, a float32 is rounded to whole steps.
    """
    x = jnp.clip(x, -6.0, 6.0)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    power = jnp.maximum(bits & jnp.uint32(0x7F800000), jnp.uint32(0x3F800000))  # of x, 1 at least
    large = lax.bitcast_convert_type(power + jnp.uint32((22 << 23) + (1 << 22)), jnp.float32)
    nearest = lax.bitcast_convert_type((x + large) - large, jnp.uint32)
    return lax.bitcast_convert_type(nearest | bits & jnp.uint32(0x80000000), jnp.float32)


def stochastic_size(x: Any, draw: Draw, interpret: Interpret) -> Any:
    """Code of |x| float32, rounded by a byte, in the third byte of a uint32; NaN gives 0.

    As `nearest_size` counts, but from 128 and a 256th of the byte on, and cut at each sum: to multiples of 2^-16, so
    that whole steps are never lost. What e2m1_stochastic_size rounds is the sum of x and a share of its step, which can
    bring it to a step it does not reach only below 1/2: where a quarter of a unit in the last place is missing.
    """
    if interpret is not None:
        half = jnp.abs(x) * 0.5
        raised = half + jnp.float32(2.0**-27)  # to nearest; cut, it is one less where that went up
        other = raised - half
        excess = (half - (raised - other)) + (2.0**-27 - other) < 0
        first = lax.bitcast_convert_type(lax.bitcast_convert_type(raised, jnp.uint32) - excess, jnp.float32)
        pieces = [jnp.clip(z, 0, 1) for z in (first, half - 1, half - 2)]
        pieces = [jnp.where(jnp.isnan(x), 0, piece) for piece in pieces]
        sums = 128 + ((draw[0] >> jnp.uint32(8 * draw[1])) & jnp.uint32(255)).astype(jnp.float32) / 256
        for steps, piece in zip((4, 2, 1), pieces, strict=True):
            sums = sums + jnp.floor(piece * (steps * 2.0**16)) * 2.0**-16
        return lax.bitcast_convert_type(sums, jnp.uint32)
    sums = lax.bitcast_convert_type(_with_byte(draw, 0x43000000, 1, interpret), jnp.float32)
    for steps, begin in ((4, -(2.0**-27)), (2, 1.0), (1, 2.0)):
        fma = f"abs.f32 z, $1; fma.rz.sat.f32 z, z, 0f3F000000, {_hex(-begin)}; fma.rz.f32 $0, z, {_hex(steps)}, $2;"
        sums = _asm(".reg .f32 z; " + fma, jnp.float32, x, sums)
    return lax.bitcast_convert_type(sums, jnp.uint32)


def stochastic_value(x: Any, draw: Draw, interpret: Interpret) -> Any:
    """The value of E2M1 that `stochastic_size` rounds to, with the sign of x; any where x is NaN or 2^106 and more.

    The sum of |x| and a share of its step is cut to whole steps, of |x| too: one that reaches the next power of two
    stays there.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    power = jnp.maximum(bits & jnp.uint32(0x7F800000), jnp.uint32(0x3F800000))  # of x, 1 at least; twice its step
    share = lax.bitcast_convert_type(power - jnp.uint32(9 << 23), jnp.float32)  # a 256th of the step
    # A byte in the lowest bits of 2^23: a conversion takes the pipe that is the slowest.
    byte = lax.bitcast_convert_type(_with_byte(draw, 0x4B000000, 0, interpret), jnp.float32) - jnp.float32(2.0**23)
    moved = jnp.abs(x) + byte * share
    if interpret is None:
        large = lax.bitcast_convert_type(power + jnp.uint32(22 << 23), jnp.float32)
        cut = _asm("add.rz.f32 $0, $1, $2;", jnp.float32, moved, large) - large
    else:
        step = share * 256
        cut = jnp.floor(moved / step) * step
    size = lax.bitcast_convert_type(jnp.minimum(cut, 6.0), jnp.uint32)
    return lax.bitcast_convert_type(size | bits & jnp.uint32(0x80000000), jnp.float32)


def _with_byte(draw, bits, place, interpret):
    """``bits``, whose byte ``place`` is 0, with that of the draw there."""
    word, byte = draw
    if interpret is not None:
        return ((word >> jnp.uint32(8 * byte)) & jnp.uint32(255)) << jnp.uint32(8 * place) | jnp.uint32(bits)
    chosen = sum((byte if i == place else 4 + i) << 4 * i for i in range(4))
    return _asm(f"prmt.b32 $0, $1, {bits}, {chosen};", jnp.uint32, word)


def bytes_of_four(words: list[Any], byte: int, interpret: Interpret) -> Any:
    """That byte of each of four uint32, the first's lowest."""
    if interpret is not None:
        alone = [(word >> jnp.uint32(8 * byte)) & jnp.uint32(255) for word in words]
        return functools.reduce(lambda high, low: high << jnp.uint32(8) | low, alone[::-1])
    pairs = [_asm(f"prmt.b32 $0, $1, $2, {byte | 4 + byte << 4};", jnp.uint32, *words[i : i + 2]) for i in (0, 2)]
    return _asm(f"prmt.b32 $0, $1, $2, {0x5410};", jnp.uint32, *pairs)


def _hex(x):
    """A float32 as PTX writes constants."""
    return f"0f{int(np.float32(x).view(np.uint32)):08X}"


def _clipped(x, begin, interpret):
    """x - begin within 0 .. 1."""
    if interpret is not None:
        return jnp.clip(x - begin, 0.0, 1.0)
    return _asm(f"add.sat.f32 $0, $1, {_hex(-begin)};", jnp.float32, x)


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
    instruction = "rcp.rn.f32 $0, $1;" if numerator == 1 else f"div.rn.f32 $0, {_hex(numerator)}, $1;"
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
