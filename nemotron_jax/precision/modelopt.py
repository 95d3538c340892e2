"""The arithmetic of NVIDIA ModelOpt's checkpoints, in numpy: what lies on disk, bit for bit.

Source: NVIDIA Model-Optimizer, torch/quantization/qtensor/nvfp4_tensor.py and torch/export/quant_utils.py.

    NVFP4   weight_scale_2 = amax / (6 * 448)        weight_scale = e4m3(amax_block / (6 * weight_scale_2))
            code = e2m1(w / (weight_scale * weight_scale_2))          w ~ code * weight_scale * weight_scale_2
    FP8     weight_scale = amax / 448                code = e4m3(w / weight_scale)         w ~ code * weight_scale

It differs from the training quantiser (pallas_kernels/nvfp4.py) where it may not change: a block of zeros has scale 1,
block scales never fall below 2^-9 (no underflow to zero), and codes come from a division, not from a product with a
reciprocal. numpy, because converting a checkpoint should neither compile a program for each shape nor flush
subnormals.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = 16  # elements of the contraction axis that share a scale
E2M1_MAX, E4M3_MAX = 6.0, 448.0
E4M3_MAX_FOUR_OVER_SIX = 256.0  # leaves room for scales 1.5 times as large
E4M3_TINY = 2.0**-9  # the smallest positive value
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def quantize_nvfp4(weight: ArrayLike, *, four_over_six: bool = False) -> tuple[NDArray, NDArray, NDArray]:
    """A weight in ModelOpt's NVFP4.

    Args:
      weight: [..., k], finite, any float dtype; k, the contraction axis, is a multiple of 16.
      four_over_six: choose for each block between the scales that map its largest value to 6 and to 4, by the
        squared error (ties: 6), normalised by 256 instead of 448.

    Returns:
      packed codes uint8 [..., k / 2], the even element in the low nibble; block scales e4m3 [..., k / 16];
      weight_scale_2, a float32 scalar (1 for a weight of zeros).
    """
    values = np.asarray(weight).astype(np.float32)
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
    amax_blocks = np.abs(blocks).max(-1)
    amax = amax_blocks.max(initial=0)
    limit = E4M3_MAX_FOUR_OVER_SIX if four_over_six else E4M3_MAX
    scale_2 = np.float32(amax) / np.float32(E2M1_MAX * limit) if amax > 0 else np.float32(1)
    # In this order: a block of zeros must not divide by the scale of a tensor so small that 6 * scale_2 underflows.
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.nan_to_num(amax_blocks / (np.float32(E2M1_MAX) * scale_2), nan=0.0, posinf=E4M3_MAX)
    scales = _block_scales(wanted)
    codes = _codes(blocks, scales, scale_2)
    if four_over_six:
        scales_4 = _block_scales(wanted * np.float32(1.5))
        codes_4 = _codes(blocks, scales_4, scale_2)
        better = _squared_error(blocks, codes_4, scales_4, scale_2) < _squared_error(blocks, codes, scales, scale_2)
        scales, codes = np.where(better, scales_4, scales), np.where(better[..., None], codes_4, codes)
    codes = codes.reshape(values.shape)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales, np.asarray(scale_2)


def _block_scales(wanted: NDArray) -> NDArray:
    return np.clip(np.where(wanted == 0, 1, wanted), E4M3_TINY, E4M3_MAX).astype(E4M3)


def _codes(blocks: NDArray, scales: NDArray, scale_2: np.float32) -> NDArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return e2m1_codes(blocks / (scales.astype(np.float32) * scale_2)[..., None])


def _squared_error(blocks: NDArray, codes: NDArray, scales: NDArray, scale_2: np.float32) -> NDArray:
    error = E2M1_VALUES[codes] * (scales.astype(np.float32) * scale_2)[..., None] - blocks
    return (error * error).sum(-1)


def e2m1_codes(values: NDArray) -> NDArray:
    """The nearest E2M1 code (bit 3: the sign) of each value, ties to the even code, saturating at 6; NaN gives 0."""
    size = np.abs(values)
    codes = (values < 0).astype(np.uint8) << 3
    for border, tie_goes_up in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        codes += size >= border if tie_goes_up else size > border
    return codes


def dequantize_nvfp4(packed: ArrayLike, scales: ArrayLike, scale_2: ArrayLike) -> NDArray:
    """Packed codes [..., k / 2], e4m3 scales [..., k / 16] and a global scale -> float32 [..., k]."""
    packed = np.asarray(packed)
    values = np.stack([E2M1_VALUES[packed & 15], E2M1_VALUES[packed >> 4]], axis=-1)
    blocks = values.reshape(*packed.shape[:-1], -1, BLOCK)
    # code * scale is exact, so the result is rounded once.
    blocks = blocks * np.asarray(scales).astype(np.float32)[..., None] * np.float32(np.asarray(scale_2).reshape(()))
    return blocks.reshape(*packed.shape[:-1], -1)


def quantize_fp8(weight: ArrayLike) -> tuple[NDArray, NDArray]:
    """A weight [...] as e4m3 [...] and one float32 scale, amax / 448 (1 for a weight of zeros).

    The division is float32 whatever the dtype of the weight. (torch divides a bfloat16 weight in bfloat16, so codes
    that ModelOpt made of one may be a step away from the nearest.)
    """
    values = np.asarray(weight).astype(np.float32)
    amax = np.abs(values).max(initial=0)
    scale = np.float32(amax) / np.float32(E4M3_MAX) if amax > 0 else np.float32(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # amax / 448 of a subnormal amax may be zero
        codes = np.nan_to_num(np.clip(values / scale, -E4M3_MAX, E4M3_MAX), nan=0.0)
    return codes.astype(E4M3), np.asarray(scale)


def dequantize_fp8(codes: ArrayLike, scale: ArrayLike) -> NDArray:
    """e4m3 [...] and one scale -> float32 [...]."""
    return np.asarray(codes).astype(np.float32) * np.float32(np.asarray(scale).reshape(()))


def activation_scale(amax: float, algo: str) -> NDArray:
    """input_scale, a float32 scalar, of activations whose largest absolute value is ``amax`` > 0."""
    limit = E4M3_MAX if algo == "FP8" else E2M1_MAX * E4M3_MAX
    return np.asarray(np.float32(amax) / np.float32(limit))


def kv_scale(amax: float) -> NDArray:
    """k_scale or v_scale float32 [1] of an FP8 cache, which stores k / scale; at least 1, as ModelOpt exports it.

    (FP8 has exponents enough for small values; a scale below 1 would only risk saturation on unseen text.)
    """
    return np.maximum(np.float32(amax) / np.float32(E4M3_MAX), np.float32(1)).reshape(1)
