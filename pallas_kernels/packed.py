"""Weights that stay in the format they were stored in: FP8 or NVFP4 codes with the scales of the checkpoint.

    w[k, n] = code[n, k] * block scale[n, k / 16] * scale        (FP8: without the block scales)

code * block scale is exact in bfloat16, so a product multiplies by those and applies the scale to its float32 result.
Nothing is ever quantised again: scale and block scales are those that the file had.

Shapes: E experts, K inputs (the contraction axis), N outputs, blocks of 16 inputs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import floats
from pallas_kernels.nvfp4 import BLOCK, e2m1_value, unpack


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "block_scales", "scale"], meta_fields=[])
@dataclass(frozen=True)
class Packed:
    """A weight [K, N], or one for each expert [E, K, N]; contraction last, as on disk.

    Attributes:
      codes: NVFP4: uint8 [..., N, K / 2], the even input in the low nibble; FP8: float8_e4m3fn [..., N, K].
      block_scales: float8_e4m3fn [..., N, K / 16]; None for FP8.
      scale: float32 [] or [E].
    """

    codes: Array
    block_scales: Array | None
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: [..., K, N]."""
        *experts, outputs, stored = self.codes.shape
        return (*experts, stored if self.block_scales is None else 2 * stored, outputs)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    def __getitem__(self, index: Any) -> "Packed":
        """Of some experts; ``[...]`` is the weight itself, as with arrays."""
        return self if index is Ellipsis else jax.tree.map(lambda leaf: leaf[index], self)

    def operand(self, dtype: DTypeLike) -> Array:
        """[..., N, K] without the scale; exact in bfloat16 and wider."""
        if self.block_scales is None:
            return floats.e4m3_value(floats.e4m3_bits(self.codes)).astype(dtype)
        values = e2m1_value(unpack(self.codes))
        blocks = values.reshape(*self.block_scales.shape, BLOCK)
        blocks = blocks * floats.e4m3_value(floats.e4m3_bits(self.block_scales))[..., None]
        return blocks.reshape(values.shape).astype(dtype)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """[..., K, N]."""
        scaled = self.operand(jnp.float32) * self.scale[..., None, None]
        return jnp.swapaxes(scaled, -1, -2).astype(dtype)


def side_by_side(weights: Sequence[Array | Packed]) -> Array | Packed:
    """[K, N1], [K, N2], ... -> [K, N1 + N2 + ...].

    Packed ones are parts of one tensor on disk: they share its scale.
    """
    packed = [weight for weight in weights if isinstance(weight, Packed)]
    if not packed:
        return jnp.concatenate([weight for weight in weights if not isinstance(weight, Packed)], axis=1)
    blocks = [weight.block_scales for weight in packed if weight.block_scales is not None]
    codes = jnp.concatenate([weight.codes for weight in packed], axis=-2)
    return Packed(codes, jnp.concatenate(blocks, axis=-2) if blocks else None, packed[0].scale)
