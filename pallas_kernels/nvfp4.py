"""NVFP4: 4-bit floats with a scale for every 16 and one for the tensor, bit for bit as Transformer Engine rounds.

Source: NVIDIA TransformerEngine >= 2.14, pytorch/custom_recipes/reference_nvfp4.py and common/util/ptx.cuh; the recipe
is described in arXiv 2509.25149. All in float32, b the limit of block scales (448):

    amax    = max |x|                                       of the tensor, or of each row
    encode  = 6 b / amax, at most FLT_MAX; 1 when amax is 0 or infinite            decode = 1 / encode
    scale   = e4m3(min(amax_block * (encode * (1/6)), 448))                        a block: 1 x 16 or 16 x 16 elements
    code    = e2m1(clip(x * min(1 / (scale * decode), FLT_MAX), -6, 6))            nearest, ties to even; or stochastic
    x'      = code * scale * (amax / (6 b))

E2M1 has the values 0 0.5 1 1.5 2 3 4 6 and their negatives. A block of zeros has scale 0. So has a block whose scale
underflows: it decodes to zero, whatever its codes. NaN anywhere makes amax NaN, hence every scale NaN; infinities give
encode = 1 and saturate.

*Four over six* (arXiv 2512.02010) also tries a scale 1.5 times as large, which maps the block's largest value to 4
instead of 6, and keeps the one with the smaller error (ties: 6). Its scale is e4m3((amax_block / 6) * encode).

*Hadamard*: x H on every 16 elements, H = diag(SIGNS) Sylvester16 / 4, rounded to x's dtype before anything else.

Shapes: M rows, N columns (the contraction axis, last), blocks of 16 of them.
"""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels import floats

BLOCK = 16
E2M1_MAX = 6.0
BLOCKS = ("1x16", "16x16")
ROUNDINGS = ("nearest", "stochastic")
ERRORS = ("mae", "mse")
# The fixed "random" signs of Transformer Engine's wgrad transform.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales", "amax"], meta_fields=["bound"])
@dataclass(frozen=True)
class NVFP4:
    """A quantised tensor [..., n].

    Attributes:
      codes: uint8 [..., n / 2], the even element in the low nibble.
      scales: float8_e4m3fn [..., n / 16]; for 16x16 blocks repeated over their 16 rows.
      amax: float32, [] or one for each row: [...] or [..., 1].
      bound: 448, or 256 for four over six: the block scale that amax maps to.
    """

    codes: Array
    scales: Array
    amax: Array
    bound: int = field(default=448, metadata={"static": True})

    def operand(self, dtype: DTypeLike = jnp.bfloat16) -> Array:
        """code * scale [..., n]: exact in bfloat16 and float16, so a GEMM of operands is one of NVFP4 tensors."""
        values = e2m1_value(unpack(self.codes))
        blocks = values.reshape(*self.scales.shape, BLOCK) * floats.e4m3_value(floats.e4m3_bits(self.scales))[..., None]
        return blocks.reshape(values.shape).astype(dtype)

    def global_scale(self) -> Array:
        """amax / (6 bound), which `operand` leaves out: float32 like amax."""
        return global_scale(self.amax, self.bound)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """[..., n]; rounded once, to float32, before the cast."""
        scale, tiny = _lifted_global_scale(self.amax, self.bound)
        if scale.ndim == self.codes.ndim - 1 and scale.ndim:
            scale, tiny = scale[..., None], tiny[..., None]
        values = self.operand(jnp.float32) * scale
        return jnp.where(tiny, floats.lowered(values), values).astype(dtype)


def global_scale(amax: Array, bound: int = 448) -> Array:
    """amax / (6 bound), float32 like amax."""
    scale, tiny = _lifted_global_scale(amax, bound)
    return jnp.where(tiny, floats.lowered(scale), scale)


def _lifted_global_scale(amax: Array, bound: int) -> tuple[Array, Array]:
    """The global scale, 2^96 times as large where amax is tiny and products with it might be subnormal."""
    amax, tiny = _lifted_if_tiny(amax)
    return floats.divide_by(amax, E2M1_MAX * bound), tiny


def _lifted_if_tiny(amax: Array) -> tuple[Array, Array]:
    tiny = amax < 2.0**-36  # lifted, its square is still finite
    return jnp.where(tiny, floats.lifted(jnp.where(tiny, amax, 0)), amax), tiny


def quantize_nvfp4(
    x: Array,
    *,
    block: str = "1x16",
    rounding: str = "nearest",
    bits: Array | None = None,
    hadamard: bool = False,
    four_over_six: str | tuple[str, int] | None = None,
    amax: Array | None = None,
) -> NVFP4:
    """Quantise along the last axis.

    Args:
      x: [..., n] float32, bfloat16 or float16; n a multiple of 16, for 16x16 blocks the axis before it too.
      block: "1x16", or "16x16" (weights: x and its transpose quantise alike).
      rounding: "nearest" (ties to even), or "stochastic" with given random bits.
      bits: uint8 like x, uniform; for stochastic rounding alone.
      hadamard: transform every 16 elements first.
      four_over_six: "mae" or "mse", the error that chooses between the two scales of a block, with the bound 256; or
        (error, bound) with bound 256 or 448. Not with Hadamard or stochastic rounding.
      amax: float32 [] of the tensor, or [...] or [..., 1] of its rows; None: max |x| (after the transform).

    Returns:
      NVFP4: codes uint8 [..., n / 2], scales float8_e4m3fn [..., n / 16], amax float32.

    Raises:
      ValueError: unknown option, sizes that are not multiples of 16, a combination that makes no sense.
    """
    error, bound = _four_over_six(four_over_six)
    _check(x, block, rounding, bits, hadamard, error)
    x = hadamard16(x) if hadamard else x
    x = x.astype(jnp.float32)
    amax = floats.absolute_max(x) if amax is None else jnp.asarray(amax, jnp.float32)
    rows = _rows(amax, x.shape)
    x_blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    amax_blocks = _block_amax(x_blocks, block)
    encode = _encode_scale(rows, E2M1_MAX * bound)
    if error is None:
        scales = _block_scales(amax_blocks, encode)
        scaled = floats.product(x_blocks, _block_encode(scales, encode)[..., None])
    else:
        scales, scaled = _choose_scales(x_blocks, amax_blocks, rows, encode, error, bound, block)
    if rounding == "nearest":
        codes = e2m1_nearest_code(scaled)
    else:
        assert bits is not None
        codes = _stochastic_code(scaled, bits.reshape(scaled.shape))
    return NVFP4(pack(codes.reshape(x.shape)), floats.as_e4m3(scales), amax, bound)


def nvfp4_codes(
    x: Array, amax: Array, *, axis: int, bits: Array | None = None, largest: Array | None = None
) -> tuple[Array, Array]:
    """What `quantize_nvfp4` rounds to, not packed and with blocks along any axis.

    Packed codes would be written and read again where code * scale is wanted, and blocks that do not lie along the
    last axis transposed twice.

    Args:
      x: a block is the elements along ``axis``, which has 16.
      amax: float32, to broadcast against x with that axis of size 1.
      bits: uint8 like x, for stochastic rounding; None: to nearest.
      largest: float32, to broadcast likewise: max |x| of each block, where that is known, or where blocks have more
        axes; the scales are then of its shape.

    Returns:
      codes 0..15, uint8 like x; and the e4m3 codes of the blocks' scales, uint8, with that axis of size 1.
    """
    x = x.astype(jnp.float32)
    encode = _encode_scale(amax, E2M1_MAX * 448)
    if largest is None:
        largest = floats.absolute_max(x, axis=axis, keepdims=True)
    scales = _block_scales(largest, encode)
    scaled = floats.product(x, _block_encode(scales, encode))
    return e2m1_nearest_code(scaled) if bits is None else _stochastic_code(scaled, bits), scales


def block_scales(largest: Array, amax: Array) -> Array:
    """The e4m3 codes of the scales, uint8, of blocks with max |x| ``largest`` in a tensor with ``amax``; float32."""
    return _block_scales(largest, _encode_scale(amax, E2M1_MAX * 448))


def _block_scales(largest: Array, encode: Array) -> Array:
    return floats.e4m3_code(jnp.minimum(floats.product(largest, encode * jnp.float32(1 / 6)), 448.0))


def _rows(amax: Array, shape: tuple[int, ...]) -> Array:
    """amax as [] or [..., 1], ready for the blocks of each row."""
    if amax.size == 1:
        return amax.reshape(())
    if amax.shape == shape[:-1]:
        return amax[..., None]
    if amax.shape != (*shape[:-1], 1):
        raise ValueError(
            f"quantize_nvfp4: amax must be one number or one for each row, {list(shape[:-1])}, got {list(amax.shape)}"
        )
    return amax


def _four_over_six(option: str | tuple[str, int] | None) -> tuple[str | None, int]:
    if option is None:
        return None, 448
    error, bound = (option, 256) if isinstance(option, str) else option
    if error not in ERRORS or bound not in (256, 448):
        raise ValueError(
            f"quantize_nvfp4: four_over_six must be 'mae', 'mse' or (one of them, 256 or 448), got {option!r}"
        )
    return error, bound


def _check(x: Array, block: str, rounding: str, bits: Array | None, hadamard: bool, error: str | None) -> None:
    if block not in BLOCKS:
        raise ValueError(f"quantize_nvfp4: block must be one of {', '.join(BLOCKS)}, got {block!r}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"quantize_nvfp4: rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"quantize_nvfp4: x must be float32, bfloat16 or float16, got {x.dtype}")
    axes = x.shape[-2:] if block == "16x16" else x.shape[-1:]
    if len(axes) < (2 if block == "16x16" else 1) or any(size % BLOCK for size in axes):
        raise ValueError(f"quantize_nvfp4: {block} blocks need axes that are multiples of 16, got x {list(x.shape)}")
    if (bits is not None) != (rounding == "stochastic"):
        raise ValueError("quantize_nvfp4: stochastic rounding needs bits, and nothing else takes them")
    if bits is not None and (bits.shape != x.shape or bits.dtype != jnp.uint8):
        raise ValueError(f"quantize_nvfp4: bits must be uint8 {list(x.shape)}, got {bits.dtype} {list(bits.shape)}")
    if error is not None and (hadamard or rounding == "stochastic"):
        raise ValueError("quantize_nvfp4: four_over_six goes with nearest rounding and without Hadamard alone")


def hadamard16(x: Array) -> Array:
    """x [..., n] -> x H on every 16 of the last axis, summed in float32 and rounded to x's dtype.

    The terms are exact and added in order, so that every backend gives the same bits.
    """
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    return hadamard16_of([blocks[..., i] for i in range(BLOCK)], axis=-1).reshape(x.shape)


def hadamard16_of(parts: list[Array], axis: int) -> Array:
    """The transform of 16 arrays, element by element; the results are stacked along a new axis.

    Arrays that are rows of memory, not columns, make this one pass over it.
    """
    dtype = parts[0].dtype
    wide = [part.astype(jnp.float32) for part in parts]
    largest = functools.reduce(jnp.maximum, [floats.bits_of(part) & jnp.uint32(0x7FFFFFFF) for part in wide])
    small = floats.float_of(largest) < 2.0**20
    # The quarters are taken inside: XLA would turn a/4 + b/4 into (a + b)/4, which overflows before it does.
    quarters = [jnp.where(small, floats.lifted(jnp.where(small, part, 0)) * 0.25, part * 0.25) for part in wide]
    results = [jnp.where(small, floats.lowered(out), out) for out in signed_sums(quarters)]
    return jnp.stack([floats.to_bfloat16(z) if dtype == jnp.bfloat16 else z.astype(dtype) for z in results], axis)


def hadamard_matrix() -> np.ndarray:
    """H [16, 16], float64, exact in bfloat16: element i of a block goes with H[i, j] into element j."""
    signs = np.array([1.0])
    for _ in range(4):
        signs = np.block([[signs, signs], [signs, -signs]])
    return np.array(SIGNS)[:, None] * signs / 4


def signed_sums(parts: list[Array]) -> list[Array]:
    """The sums of 16 arrays with the signs of the columns of diag(SIGNS) Sylvester16, each added in order."""
    positive = hadamard_matrix() > 0
    sums: dict[tuple[bool, ...], Array] = {}  # of the first parts with these signs: columns begin alike
    for column in positive.T:
        for i in range(BLOCK):
            if (key := tuple(column[: i + 1].tolist())) not in sums:
                part = parts[i] if column[i] else -parts[i]
                sums[key] = sums[key[:-1]] + part if i else part
    return [sums[tuple(column.tolist())] for column in positive.T]


def _block_amax(x_blocks: Array, block: str) -> Array:
    """[..., m, n / 16, 16] -> [..., m, n / 16]."""
    amax = floats.absolute_max(x_blocks, axis=-1)
    if block == "1x16":
        return amax
    tiles = amax.reshape(*amax.shape[:-2], -1, BLOCK, amax.shape[-1])
    return jnp.broadcast_to(floats.absolute_max(tiles, axis=-2, keepdims=True), tiles.shape).reshape(amax.shape)


def _encode_scale(amax: Array, numerator: float) -> Array:
    """min(numerator / amax, FLT_MAX); 1 when amax is zero or infinite."""
    tiny = amax < 2.0**-100
    quotient = floats.divide_into(numerator, jnp.where(tiny, floats.lifted(jnp.where(tiny, amax, 0)), amax))
    encode = jnp.minimum(jnp.where(tiny, quotient * 2.0**floats.LIFT, quotient), floats.FLOAT32_MAX)
    zero = floats.bits_of(amax) == 0
    return jnp.where(zero | jnp.isinf(amax), 1.0, jnp.where(jnp.isnan(amax), jnp.nan, encode))


def _decode_parts(encode: Array) -> tuple[Array, Array]:
    """1 / encode rounded to float32 with gradual underflow: (integer below 2^24, exponent) of integer * 2^exponent."""
    quotient = floats.divide_into(256.0, encode)  # 2^8 times as large: normal for every encode
    bits = floats.bits_of(quotient)
    q = (bits & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
    exponent = (bits >> 23).astype(jnp.int32) - 150 - 8
    drop = jnp.clip(-149 - exponent, 0, 2).astype(jnp.uint32)  # bits below float32's smallest unit
    kept, rest, half = q >> drop, q & ((jnp.uint32(1) << drop) - 1), (jnp.uint32(1) << drop) >> 1
    # q itself was rounded. Where it looks like a tie, the low 32 bits of m * q - 2^n say on which side 1 / encode is.
    m = (floats.bits_of(encode) & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
    above = lax.bitcast_convert_type(m * q, jnp.int32) < 0
    up = (drop > 0) & ((rest > half) | ((rest == half) & above))
    return jnp.where(up, kept + 1, kept), jnp.maximum(exponent, -149)


def _block_encode(scales: Array, encode: Array) -> Array:
    """min(1 / (scale * decode), FLT_MAX) for e4m3 codes [..., n / 16]; encode [] or [..., 1]."""
    value = floats.e4m3_value(scales)
    integer, exponent = _decode_parts(encode)
    # A decode scale near underflow is moved up by 2^64 ...
    low = exponent < -24 - 60
    decode = integer.astype(jnp.float32) * 2.0**-24 * _exp2(jnp.where(low, exponent + 64, exponent) + 24)
    inverse = floats.divide_into(1.0, value * decode)
    inverse = jnp.where(low, inverse * 2.0**64, inverse)
    # ... which is right as long as scale * decode is a normal number. Where it is not, it is a multiple of 2^-149.
    subnormal = low & (value * decode < 2.0 ** (64 - 126))
    units = _units(scales, integer, exponent)
    inverse = jnp.where(subnormal, _times_2_to_149(floats.divide_into(1.0, units.astype(jnp.float32))), inverse)
    inverse = jnp.where((value == 0) | (subnormal & (units == 0)), floats.FLOAT32_MAX, inverse)
    return jnp.where(jnp.isnan(value) | jnp.isnan(encode), jnp.nan, jnp.minimum(inverse, floats.FLOAT32_MAX))


def _times_2_to_149(x: Array) -> Array:
    """x in [2^-23, 1] times 2^149, or FLT_MAX. (Two constant factors would be folded into an infinite one.)"""
    field = (floats.bits_of(x) >> 23) + 149
    return jnp.where(field > 254, floats.FLOAT32_MAX, floats.float_of(floats.bits_of(x) + jnp.uint32(149 << 23)))


def _exp2(exponent: Array) -> Array:
    return floats.float_of((exponent + 127).astype(jnp.uint32) << 23)


def _units(scales: Array, integer: Array, exponent: Array) -> Array:
    """scale * (integer * 2^exponent) in units of 2^-149, rounded to nearest even; uint32."""
    field, mantissa = (scales.astype(jnp.uint32) >> 3) & jnp.uint32(15), scales.astype(jnp.uint32) & jnp.uint32(7)
    significand = jnp.where(field == 0, mantissa, mantissa + 8)
    exact = significand * integer  # below 2^28
    drop = -149 - exponent - (jnp.maximum(field, 1).astype(jnp.int32) - 10)
    left = jnp.clip(-drop, 0, 31).astype(jnp.uint32)
    right = jnp.clip(drop, 0, 30).astype(jnp.uint32)
    kept, rest, half = exact >> right, exact & ((jnp.uint32(1) << right) - 1), (jnp.uint32(1) << right) >> 1
    up = (rest > half) | ((rest == half) & (half > 0) & (kept % 2 == 1))
    return jnp.where(up, kept + 1, kept) << left


def _choose_scales(
    x_blocks: Array, amax_blocks: Array, amax: Array, encode: Array, error: str, bound: int, block: str
) -> tuple[Array, Array]:
    """Four over six: (e4m3 codes of the better scales, x scaled by them)."""
    base = _sixth_times(amax_blocks, encode)
    amax, tiny = _lifted_if_tiny(amax)  # errors are compared, so they may be measured 2^96 times as large
    amax, tiny = amax[..., None], tiny[..., None]
    measured = jnp.where(tiny, floats.lifted(jnp.where(tiny, x_blocks, 0)), x_blocks)

    def round_(lifted_or_not: Array) -> Array:
        return jnp.where(tiny, floats.as_if_lowered(lifted_or_not), lifted_or_not)

    candidates = []
    for factor in (1.0, 1.5):
        scales = floats.e4m3_code(jnp.minimum(base * factor, 448.0))
        scaled = floats.product(x_blocks, _block_encode(scales, encode)[..., None])
        restored = round_(e2m1_value(e2m1_nearest_code(scaled)) * floats.e4m3_value(scales)[..., None] * amax)
        off = round_(floats.divide_by(restored, E2M1_MAX * bound)) - measured
        errors = jnp.abs(off) if error == "mae" else _squares(off, tiny)
        candidates.append((_sum_in_order(errors, block), scales, scaled))
    (error_6, scales_6, scaled_6), (error_4, scales_4, scaled_4) = candidates
    four = error_4 < error_6
    return jnp.where(four, scales_4, scales_6), jnp.where(four[..., None], scaled_4, scaled_6)


def _squares(off: Array, tiny: Array) -> Array:
    """off^2; of lifted values in units of 2^-149, rounded as the squares of the values themselves underflow."""
    # (The maximum does nothing but keep the product out of a fused multiply-add with the sum.)
    squares = jnp.maximum(off * off, 0.0)
    return jnp.where(tiny, jnp.round(squares * 2.0 ** (149 - 2 * floats.LIFT)), squares)


def _sixth_times(amax_blocks: Array, encode: Array) -> Array:
    """(amax / 6) * encode, the quotient rounded to float32 with gradual underflow; what underflows itself is zero."""
    small = amax_blocks < 2.0**-60
    up = floats.lifted(jnp.where(small, amax_blocks, 0))
    units = (jnp.minimum(up, 6 * 2.0**-30) * 2.0 ** (149 - floats.LIFT)).astype(jnp.uint32)
    sixth, rest = units // 6, units % 6
    sixth += ((rest > 3) | ((rest == 3) & (sixth % 2 == 1))).astype(jnp.uint32)
    subnormal = sixth.astype(jnp.float32) * 2.0 ** (floats.LIFT - 149)
    up = jnp.where(up < 6 * 2.0**-30, subnormal, floats.divide_by(up, E2M1_MAX))
    return jnp.where(small, up * encode * 2.0**-floats.LIFT, floats.divide_by(amax_blocks, E2M1_MAX) * encode)


def _sum_in_order(errors: Array, block: str) -> Array:
    """[..., m, n / 16, 16] -> [..., m, n / 16], in the order of Transformer Engine's sums."""
    total = errors[..., 0]
    for i in range(1, BLOCK):
        total = total + errors[..., i]
    if block == "1x16":
        return total
    rows = total.reshape(*total.shape[:-2], -1, BLOCK, total.shape[-1])
    for half in (8, 4, 2, 1):
        rows = rows[..., :half, :] + rows[..., half:, :]
    return jnp.broadcast_to(rows, (*rows.shape[:-2], BLOCK, rows.shape[-1])).reshape(total.shape)


def e2m1_nearest_code(x: Array) -> Array:
    """uint8 codes 0..15 (bit 3: negative) of float32 values: nearest, ties to even, saturating; NaN and -0 give 0."""
    code = e2m1_nearest_size(jnp.where(jnp.isnan(x), 0, jnp.abs(x)))
    return (code | jnp.where(x < 0, jnp.uint32(8), jnp.uint32(0))).astype(jnp.uint8)


@jax.named_scope("nearest_e2m1")
def e2m1_nearest_size(size: Array) -> Array:
    """uint32 codes 0..7 of float32 values >= 0: nearest, ties to even, saturating."""
    # A sum near 1.5 * 2^23 steps is rounded to whole steps, and its lowest bits count them. E2M1 has steps of 1/2, from
    # 2 on of 1 (2 is code 4) and from 4 on of 2 (4 is code 6); what is missing to the code is even, as ties want it.
    size = jnp.minimum(size, E2M1_MAX)
    half, one, two = 1.5 * 2.0**22, 1.5 * 2.0**23 + 2, 1.5 * 2.0**24 + 8
    sums = size + jnp.where(size >= 4, two, jnp.where(size >= 2, one, half)).astype(jnp.float32)
    return floats.bits_of(sums) & jnp.uint32(7)


def e2m1_value(codes: Array) -> Array:
    """float32 values of uint8 codes 0..15; code 8 is -0."""
    wide = codes.astype(jnp.uint32)
    size = wide & jnp.uint32(7)
    bits = jnp.where(size == 0, jnp.uint32(0), jnp.uint32(0x3F000000) + (size << 22))
    bits = jnp.where(size == 1, jnp.uint32(0x3F000000), bits)
    return floats.float_of(bits | ((wide & jnp.uint32(8)) << 28))


def round_e2m1_stochastic(x: Array, bits: Array) -> Array:
    """x rounded up in size with probability floor(256 f) / 256, f the position between its two E2M1 neighbours.

    Args:
      x: any shape, any float dtype.
      bits: integers like x, of which 8 bits count.

    Returns:
      float32 on the E2M1 grid, saturated to +-6 and with x's sign (-0 included); NaN gives 6 with its sign. Values on
      the grid stay, whatever the bits.
    """
    return e2m1_value(_stochastic_code(x.astype(jnp.float32), bits))


@jax.named_scope("stochastic_e2m1")
def e2m1_stochastic_size(size: Array, byte: Array) -> Array:
    """uint32 codes 0..7 of float32 values >= 0, rounded by a byte (uint32): `round_e2m1_stochastic`; NaN gives 7."""
    step = jnp.where(size >= 4, 2.0, jnp.where(size >= 2, 1.0, 0.5)).astype(jnp.float32)
    moved = size + byte.astype(jnp.float32) * (1 / 256) * step  # exact up to the one rounding of the sum
    normal = jnp.minimum((floats.bits_of(moved) >> 22) - jnp.uint32(252), jnp.uint32(7))  # cut after one bit
    return jnp.where(moved < 1, jnp.where(moved < 0.5, jnp.uint32(0), jnp.uint32(1)), normal)


def _stochastic_code(x: Array, bits: Array) -> Array:
    size = e2m1_stochastic_size(jnp.abs(x), bits.astype(jnp.uint32) & jnp.uint32(255))
    return (size | (floats.bits_of(x) >> 28) & jnp.uint32(8)).astype(jnp.uint8)


def pack(codes: Array) -> Array:
    """[..., n] codes 0..15 -> uint8 [..., n / 2], the even element in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Array) -> Array:
    """uint8 [..., n / 2] -> codes 0..15 [..., n]."""
    return jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
