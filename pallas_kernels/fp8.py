"""FP8 (e4m3) with one scale for the tensor, and MXFP8 with a power of two for every 32 elements.

Sources: NVIDIA TransformerEngine, current scaling and common/cast/mxfp8; OCP Microscaling specification 1.0.

    FP8     encode = 448 / amax, at most FLT_MAX, 1 when amax is 0 or infinite      code = e4m3(clip(x * encode))
            x' = code * (1 / encode)
    MXFP8   scale = 2^ceil(log2(amax_block / 448)), from 2^-127 to 2^127            code = e4m3(clip(x / scale))
            x' = code * scale

Rounded to nearest, ties to even. NaN anywhere poisons its scale: the tensor, or the block of 32.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels import floats

MX_BLOCK = 32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=[])
@dataclass(frozen=True)
class FP8:
    """codes: float8_e4m3fn [..., n]; scale: float32 [], what a code of 1 stands for."""

    codes: Array
    scale: Array

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """[..., n]."""
        return (floats.e4m3_value(floats.e4m3_bits(self.codes)) * self.scale).astype(dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=[])
@dataclass(frozen=True)
class MXFP8:
    """codes: float8_e4m3fn [..., n]; scales: uint8 [..., n / 32], biased exponents (e8m0: 127 is 1, 255 is NaN)."""

    codes: Array
    scales: Array

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """[..., n]; below 2^-126 the values of float32 are flushed."""
        blocks = floats.e4m3_value(floats.e4m3_bits(self.codes)).reshape(*self.scales.shape, MX_BLOCK)
        # In two steps: 2^127 is the largest factor and 2^-127 no normal number.
        exponent = self.scales.astype(jnp.int32) - 127
        half = exponent // 2
        factor = jnp.where(self.scales == 255, jnp.nan, _exp2(half))
        blocks = blocks * factor[..., None] * _exp2(exponent - half)[..., None]
        return blocks.reshape(self.codes.shape).astype(dtype)


def quantize_fp8(x: Array, *, amax: Array | None = None) -> FP8:
    """x [..., n] of any float dtype with one scale; ``amax``: float32 [], None: max |x|.

    The scale of a tensor whose amax is below 2^-110 stays as if it were that: float32 has no larger encode.
    """
    x = x.astype(jnp.float32)
    amax = floats.absolute_max(x) if amax is None else jnp.asarray(amax, jnp.float32)
    safe = jnp.where((amax > 0) & ~jnp.isinf(amax), jnp.maximum(amax, 2.0**-110), 448.0)
    encode = jnp.where(jnp.isnan(amax), jnp.nan, floats.divide_into(448.0, safe))
    codes = floats.e4m3_code(floats.product(x, encode))
    return FP8(floats.as_e4m3(codes), jnp.where(jnp.isnan(amax), jnp.nan, floats.divide_into(1.0, encode)))


def quantize_mxfp8(x: Array) -> MXFP8:
    """x [..., n] of any float dtype, n a multiple of 32, with a power of two for every 32 of the last axis.

    Raises:
      ValueError: n is not a multiple of 32.
    """
    if x.ndim == 0 or x.shape[-1] % MX_BLOCK:
        raise ValueError(f"quantize_mxfp8: the last axis must be a multiple of {MX_BLOCK}, got x {list(x.shape)}")
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, MX_BLOCK)
    amax = floats.absolute_max(blocks, axis=-1)
    # amax / 448 as Transformer Engine computes it: times the float32 next to 1/448. Its exponent is rounded up.
    tiny = amax < 2.0**-90
    share = jnp.where(tiny, floats.lifted(jnp.where(tiny, amax, 0)), amax) * jnp.float32(1 / 448)
    bits = floats.bits_of(share)
    exponent = (bits >> 23).astype(jnp.int32) + ((bits & jnp.uint32(0x7FFFFF)) != 0) - jnp.where(tiny, floats.LIFT, 0)
    exponent = jnp.where(jnp.isinf(amax), 254, jnp.clip(exponent, 0, 254))
    scales = jnp.where(jnp.isnan(amax), 255, exponent).astype(jnp.uint8)
    # 1 / scale = 2^(127 - e). Only beside an infinity is e above 247 and this no normal number: 254 takes two steps.
    inverse = jnp.where(jnp.isnan(amax), jnp.nan, _exp2(127 - exponent))
    blocks = jnp.where((exponent == 254)[..., None], blocks * 0.5, blocks)
    codes = floats.e4m3_code(floats.product(blocks, inverse[..., None]))
    return MXFP8(floats.as_e4m3(codes.reshape(x.shape)), scales)


def _exp2(exponent: Array) -> Array:
    """2^exponent for -126 <= exponent <= 127, from bits."""
    return lax.bitcast_convert_type(jnp.clip(exponent + 127, 1, 254).astype(jnp.uint32) << 23, jnp.float32)
