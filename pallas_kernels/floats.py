"""Float32 arithmetic and rounding that give IEEE's bits on every backend, for the number formats.

Three things stand in the way of bit-exact quantisation in plain jnp. XLA:CPU flushes subnormals, XLA:GPU divides with
an error of up to two units in the last place, and XLA:GPU deletes a cast to a small format and back. So tiny values
are scaled by powers of two first, quotients are corrected in integers, and rounding is integer arithmetic.
"""

import jax.numpy as jnp
from jax import Array, lax

FLOAT32_MAX = 3.4028234663852886e38
E4M3_MAX = 448.0
LIFT = 96  # tiny values are moved up by 2^96


def bits_of(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def float_of(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def absolute_max(x: Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
    """max |x| in float32, also of subnormals; NaN if there is one."""
    sizes = bits_of(x.astype(jnp.float32)) & jnp.uint32(0x7FFFFFFF)  # ordered as the floats are, NaN above all
    return float_of(jnp.max(sizes, axis=axis, keepdims=keepdims))


def lifted(x: Array) -> Array:
    """x * 2^96, exactly; |x| < 2^30, subnormals included."""
    bits = bits_of(x)
    subnormal = (bits & jnp.uint32(0x7F800000)) == 0
    units = (bits & jnp.uint32(0x7FFFFF)).astype(jnp.float32) * 2.0 ** (LIFT - 149)
    units = float_of(bits_of(units) | (bits & jnp.uint32(0x80000000)))
    return jnp.where(subnormal, units, x * 2.0**LIFT)


def lowered(x: Array) -> Array:
    """x * 2^-96 with gradual underflow."""
    bits = bits_of(x)
    size = jnp.abs(x)
    units = jnp.round(jnp.minimum(size, 2.0**-30) * 2.0 ** (149 - LIFT)).astype(jnp.uint32)
    subnormal = float_of(units | (bits & jnp.uint32(0x80000000)))
    return jnp.where(size < 2.0 ** (LIFT - 126), subnormal, x * 2.0**-LIFT)


def as_if_lowered(x: Array) -> Array:
    """A lifted value rounded as its original is by gradual underflow: to multiples of 2^-149 below 2^-126."""
    grid = jnp.round(x * 2.0 ** (149 - LIFT)) * 2.0 ** (LIFT - 149)
    return jnp.where(jnp.abs(x) < 2.0 ** (LIFT - 126), grid, x)


def product(x: Array, scale: Array) -> Array:
    """x * scale for scale > 0, for rounding to a small format: a result below 2^-126 comes out as +-2^-126.

    Any x, subnormal ones included. A result that IEEE rounds to zero is zero, with x's sign.
    """
    small = jnp.abs(x) < 2.0**30
    up = lifted(jnp.where(small, x, 0)) * scale
    # Of the lifted results, those above 2^-54 are those that float32 does not round to zero: |x * scale| > 2^-150.
    down = jnp.where(jnp.abs(up) < 2.0 ** (LIFT - 126), jnp.sign(up) * 2.0**-126, up * 2.0**-LIFT)
    down = jnp.where(jnp.abs(up) > 2.0 ** (LIFT - 150), down, float_of(bits_of(up) & jnp.uint32(0x80000000)))
    return jnp.where(small, jnp.where(jnp.isnan(up), up, down), x * scale)


def divide_into(numerator: float, x: Array) -> Array:
    """numerator / x, correctly rounded.

    numerator = (odd number below 32) * 2^k; x and the result are normal numbers (others come out as the backend
    divides them).
    """
    guess = numerator / x
    m = (bits_of(x) & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
    q = (bits_of(guess) & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
    # m * q is near numerator * 2^n with n >= 32, which is 0 modulo 2^32: the low 32 bits are the error of q, times m.
    error = lax.bitcast_convert_type(m * q, jnp.int32)
    return _corrected(guess, q, error, m.astype(jnp.int32))


def divide_by(x: Array, divisor: float) -> Array:
    """x / divisor, correctly rounded, under the same conditions."""
    odd = int(divisor)
    while odd % 2 == 0:
        odd //= 2
    assert divisor == int(divisor) and odd < 32
    guess = x * jnp.float32(1 / divisor)
    m = ((bits_of(x) & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)).astype(jnp.int32)
    q = (bits_of(guess) & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
    found = odd * q.astype(jnp.int32)
    shift = odd.bit_length() - 1
    low, high = found - (m << shift), found - (m << (shift + 1))
    error = jnp.where(jnp.abs(low) < jnp.abs(high), low, high)
    return _corrected(guess, q, error, jnp.full_like(m, odd))


def _corrected(guess: Array, q: Array, error: Array, step: Array) -> Array:
    """The guess moved by the whole steps in its error, |error| < 2.5 steps."""
    # Below a power of two the steps are half as long.
    error = jnp.where((q == jnp.uint32(0x800000)) & (error > 0), 2 * error, error)
    twice = 2 * error
    steps = (twice > step).astype(jnp.int32) + (twice > 3 * step).astype(jnp.int32)
    steps -= (twice < -step).astype(jnp.int32) + (twice < -3 * step).astype(jnp.int32)
    bits = lax.bitcast_convert_type(guess, jnp.int32)
    size = jnp.abs(guess)
    regular = (size >= 2.0**-126) & (size <= FLOAT32_MAX)
    return jnp.where(regular, lax.bitcast_convert_type(bits - steps, jnp.float32), guess)


def to_bfloat16(x: Array) -> Array:
    """float32 -> bfloat16, nearest even, subnormals kept; survives where two casts would be deleted."""
    bits = bits_of(x)
    rounded = (bits + jnp.uint32(0x7FFF) + ((bits >> 16) & jnp.uint32(1))) >> 16
    rounded = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC0), rounded)
    return lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16)


def e4m3_code(x: Array) -> Array:
    """The nearest e4m3 code uint8, ties to even, saturating at +-448; NaN gives 0x7F."""
    bits = bits_of(x)
    size = jnp.minimum(float_of(bits & jnp.uint32(0x7FFFFFFF)), E4M3_MAX)
    size_bits = bits_of(size)
    # 3 of 23 mantissa bits stay; the carry of the rounding runs into the exponent, whose bias goes from 127 to 7.
    normal = ((size_bits + jnp.uint32(0x7FFFF) + ((size_bits >> 20) & jnp.uint32(1))) >> 20) - jnp.uint32(120 << 3)
    small = jnp.round(size * 2.0**9).astype(jnp.uint32)  # below 2^-6 the step is 2^-9
    code = jnp.where(size < 2.0**-6, small, normal)
    code = jnp.where(jnp.isnan(x), jnp.uint32(0x7F), code | (bits >> 24) & jnp.uint32(0x80))
    return code.astype(jnp.uint8)


def e4m3_value(code: Array) -> Array:
    """e4m3 codes uint8 -> float32."""
    wide = code.astype(jnp.uint32)
    size = wide & jnp.uint32(0x7F)
    normal = float_of((size + jnp.uint32(120 << 3)) << 20)
    value = jnp.where(size < 8, size.astype(jnp.float32) * 2.0**-9, normal)
    value = jnp.where(size == 0x7F, jnp.float32(jnp.nan), value)
    return float_of(bits_of(value) | (wide & jnp.uint32(0x80)) << 24)


def as_e4m3(code: Array) -> Array:
    return lax.bitcast_convert_type(code, jnp.float8_e4m3fn)


def e4m3_bits(scales: Array) -> Array:
    return lax.bitcast_convert_type(scales, jnp.uint8)
