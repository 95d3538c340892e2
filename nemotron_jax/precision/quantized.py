"""Matmuls in a quantised format, and their gradients: exact emulation on any device.

Source: NVIDIA TransformerEngine, common/recipe and pytorch/quantization.py (NVFP4BlockScaling); arXiv 2509.25149.

    product              operands, both in blocks along the axis that is summed over
    y  = x w             x 1x16                             w 16x16
    dx = dy w^T          dy 1x16, stochastic                w as above: the same codes
    dw = x^T dy          RHT(x^T) 1x16 along tokens         RHT(dy^T) 1x16 along tokens, stochastic

RHT is the Hadamard transform of every 16 tokens; it cancels in the product. Operands are code * block scale, which are
exact in bfloat16; the scales of the tensors are applied to the float32 result. MXFP8 and FP8 round the same operands
to nearest: 32 elements of the summed axis share a power of two, or a tensor one scale.

The routed experts are tensors of their own: each has its amax, and blocks of tokens do not cross from one to the
next, since groups are padded to whole blocks.

Random bits are a hash of the seed (of step, microbatch and layer), of which product they are for, and of the token's
place in the global batch: a resumed run draws the same.

Shapes: M tokens or rows, K inputs, N outputs, E experts, S tokens of a block (16, or 32 for MXFP8).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nemotron_jax.precision.formats import quantize_fp8, quantize_mxfp8, quantize_nvfp4
from nemotron_jax.precision.recipe import MULTIPLES, Precision
from pallas_kernels import floats, grouped_matmul
from pallas_kernels.nvfp4 import global_scale, hadamard16_of, nvfp4_operand

DGRAD, WGRAD = 1, 2  # which product random bits are for


class Operand(NamedTuple):
    """``values * scale`` is the quantised tensor; values are exact in the dtype of the GEMM, scale is float32."""

    values: Array
    scale: Array


def quantized_matmul(x: Array, w: Array, precision: Precision, seed: Array | None) -> Array:
    """``x [..., k] @ w [k, n] -> [..., n]`` in x's dtype; the gradient of w has w's dtype."""
    seed = jnp.uint32(0) if seed is None else seed
    return _matmul(x.reshape(-1, x.shape[-1]), w, seed, precision).reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x_MK: Array, w_KN: Array, seed: Array, precision: Precision) -> Array:
    x, w = quantize_rows(x_MK, precision), _weight(w_KN.T, precision)
    return _product(x, w, ((1,), (1,)), precision).astype(x_MK.dtype)


def _matmul_fwd(x: Array, w: Array, seed: Array, precision: Precision) -> tuple[Array, tuple[Array, Array, Array]]:
    return _matmul(x, w, seed, precision), (x, w, seed)


def _matmul_bwd(precision: Precision, saved: tuple[Array, Array, Array], dy_MN: Array) -> tuple[Array, Array, None]:
    x_MK, w_KN, seed = saved
    dy = quantize_rows(dy_MN, precision, _bits(precision, seed, DGRAD, dy_MN.shape))
    dx = _product(dy, _weight(w_KN, precision), ((1,), (1,)), precision)
    padding = ((0, -len(x_MK) % _block(precision)), (0, 0))
    x_MK, dy_MN = jnp.pad(x_MK, padding), jnp.pad(dy_MN, padding)
    x = quantize_tokens(x_MK, precision)
    dy = quantize_tokens(dy_MN, precision, _bits(precision, seed, WGRAD, dy_MN.shape))
    dw = _product(x, dy, ((0,), (0,)), precision)
    return dx.astype(x_MK.dtype), dw.astype(w_KN.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _product(a: Operand, b: Operand, contract: tuple[tuple[int, ...], tuple[int, ...]], precision: Precision) -> Array:
    exact = lax.Precision.HIGHEST if precision.operands == "float32" else lax.Precision.DEFAULT
    product = lax.dot_general(
        a.values, b.values, (contract, ((), ())), precision=exact, preferred_element_type=jnp.float32
    )
    return product * (a.scale * b.scale)


def _block(precision: Precision) -> int:
    return max(16, MULTIPLES[precision.format])


def _weight(w_NK: Array, precision: Precision) -> Operand:
    """Quantised along its last axis."""
    if precision.format == "nvfp4":
        quantized = quantize_nvfp4(w_NK, block=precision.weight_block)
        return Operand(quantized.operand(precision.operands), quantized.global_scale())
    return quantize_rows(w_NK, precision)


def quantize_rows(z_MK: Array, precision: Precision, bits: Array | None = None, amax: Array | None = None) -> Operand:
    """Blocks along the last axis.

    Args:
      bits: for stochastic rounding; None: to nearest.
      amax: float32 [] or [M, 1]; None: of the tensor.
    """
    dtype = precision.operands
    if precision.format == "nvfp4":
        amax = floats.absolute_max(z_MK) if amax is None else amax
        blocks = (len(z_MK), -1, 16)
        bits = None if bits is None else bits.reshape(blocks)
        values = nvfp4_operand(z_MK.reshape(blocks), amax[..., None], axis=2, bits=bits, dtype=dtype)
        return Operand(values.reshape(z_MK.shape), global_scale(amax))
    if precision.format == "mxfp8":
        return Operand(quantize_mxfp8(z_MK).dequantize(dtype), jnp.float32(1))
    if amax is not None and amax.ndim:
        codes = jax.vmap(lambda row, amax: quantize_fp8(row, amax=amax[0]))(z_MK, amax)
        return Operand(floats.e4m3_value(floats.e4m3_bits(codes.codes)).astype(dtype), codes.scale[:, None])
    one = quantize_fp8(z_MK, amax=amax)
    return Operand(floats.e4m3_value(floats.e4m3_bits(one.codes)).astype(dtype), one.scale)


def quantize_tokens(
    z_MK: Array, precision: Precision, bits: Array | None = None, block_expert: Array | None = None, experts: int = 0
) -> Operand:
    """Blocks along the first axis, M a multiple of them, transformed first where the recipe says so.

    Args:
      block_expert: int32 [M / S], the expert of each block, for an amax (and scale [E]) of each; None: one tensor.
    """
    size = _block(precision)
    z_BSK = z_MK.reshape(-1, size, z_MK.shape[1])
    if precision.format == "nvfp4" and precision.hadamard:
        z_BSK = hadamard16_of([z_BSK[:, i] for i in range(size)], axis=1)
    if block_expert is None:
        amax = floats.absolute_max(z_BSK)
        amax_B = amax[None]
    else:
        amax_E = jnp.zeros(experts, jnp.float32)
        amax_E = amax_E.at[block_expert].max(floats.absolute_max(z_BSK, axis=(1, 2)), mode="drop")
        amax_B = amax_E[jnp.minimum(block_expert, experts - 1)]
    if precision.format == "nvfp4":
        bits = None if bits is None else bits.reshape(z_BSK.shape)
        dtype = precision.operands
        values = nvfp4_operand(z_BSK, amax_B[:, None, None], axis=1, bits=bits, dtype=dtype).reshape(z_MK.shape)
        return Operand(values, global_scale(amax) if block_expert is None else global_scale(amax_E))
    z_BKS = jnp.swapaxes(z_BSK, 1, 2)
    rows = z_BKS.reshape(-1, size)
    if block_expert is None:
        operand = quantize_rows(rows, precision)
        scale = operand.scale
    else:
        amax = jnp.broadcast_to(amax_B[:, None], z_BKS.shape[:2]).reshape(-1, 1)
        operand = quantize_rows(rows, precision, None, amax)
        scale = _scale_of(amax_E, precision)
    values = jnp.swapaxes(operand.values.reshape(z_BKS.shape), 1, 2).reshape(z_MK.shape)
    return Operand(values, scale)


def _scale_of(amax_E: Array, precision: Precision) -> Array:
    """The global scales that go with some amax."""
    nothing = jnp.zeros((len(amax_E), 32), jnp.float32)
    return jnp.broadcast_to(quantize_rows(nothing, precision, amax=amax_E[:, None]).scale, (len(amax_E), 1))[:, 0]


def quantized_expert_matmul(
    x_MK: Array, w_EKN: Array, group_sizes: Array, precision: Precision, seed: Array | None
) -> Array:
    """Each group of rows times its expert's weight -> float32 [M, N]; gradients in the dtypes of x and w."""
    seed = jnp.uint32(0) if seed is None else seed
    return _experts(x_MK, w_EKN, group_sizes, seed, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _experts(x_MK: Array, w_EKN: Array, group_sizes: Array, seed: Array, precision: Precision) -> Array:
    w = _expert_weights(jnp.swapaxes(w_EKN, 1, 2), precision)
    return _grouped(x_MK, w, group_sizes, precision)


def _experts_fwd(
    x: Array, w: Array, group_sizes: Array, seed: Array, precision: Precision
) -> tuple[Array, tuple[Array, ...]]:
    return _experts(x, w, group_sizes, seed, precision), (x, w, group_sizes, seed)


def _experts_bwd(precision: Precision, saved: tuple[Array, ...], dy_MN: Array) -> tuple[Array, Array, None, None]:
    x_MK, w_EKN, group_sizes, seed = saved
    experts = len(w_EKN)
    bits = _bits(precision, seed, DGRAD, dy_MN.shape)
    dx = _grouped(dy_MN, _expert_weights(w_EKN, precision), group_sizes, precision, bits)
    place_M, sizes, block_expert, rows = _whole_blocks(group_sizes, len(x_MK), _block(precision))

    def padded(z: Array) -> Array:
        return jnp.zeros((rows, z.shape[1]), z.dtype).at[place_M].set(z, mode="drop")

    bits = _bits(precision, seed, WGRAD, dy_MN.shape)
    bits = None if bits is None else padded(bits)
    x = quantize_tokens(padded(x_MK), precision, None, block_expert, experts)
    dy = quantize_tokens(padded(dy_MN), precision, bits, block_expert, experts)
    zeros = jnp.zeros(w_EKN.shape, precision.operands)
    _, pull = jax.vjp(lambda w: grouped_matmul(x.values, w, sizes), zeros)
    dw = pull(dy.values)[0].astype(jnp.float32) * (x.scale * dy.scale)[:, None, None]
    return dx.astype(x_MK.dtype), dw.astype(w_EKN.dtype), None, None


_experts.defvjp(_experts_fwd, _experts_bwd)


def _expert_weights(w_ENK: Array, precision: Precision) -> Operand:
    """Each expert quantised along its last axis: values [E, N, K], scale [E]."""
    values, scale = jax.vmap(lambda w: _weight(w, precision))(w_ENK)
    return Operand(values, scale)


def _grouped(z_MK: Array, w: Operand, group_sizes: Array, precision: Precision, bits: Array | None = None) -> Array:
    """Rows z, quantised along K with an amax of each expert, times w [E, N, K] -> float32 [M, N]."""
    ends = jnp.cumsum(group_sizes)
    expert_M = jnp.searchsorted(ends, jnp.arange(len(z_MK)), side="right")  # E past the last group
    largest_M = floats.absolute_max(z_MK, axis=1)
    amax_E = jnp.zeros(len(group_sizes), jnp.float32).at[expert_M].max(largest_M, mode="drop")
    last = len(group_sizes) - 1
    z = quantize_rows(z_MK, precision, bits, amax_E[jnp.minimum(expert_M, last)][:, None])
    product = grouped_matmul(z.values, jnp.swapaxes(w.values, 1, 2), group_sizes).astype(jnp.float32)
    return product * (z.scale * w.scale[jnp.minimum(expert_M, last)][:, None])


def _whole_blocks(group_sizes: Array, rows: int, size: int) -> tuple[Array, Array, Array, int]:
    """Groups padded to multiples of ``size``.

    Returns:
      where each row goes, int32 [M] (past the end for rows of no group); the padded sizes [E]; the expert of each
      block, E where there is none; the number of rows of the padded array, which has room for any group sizes.
    """
    experts = len(group_sizes)
    total = -(-(rows + experts * (size - 1)) // size) * size
    sizes = -(-group_sizes // size) * size
    ends, padded_ends = jnp.cumsum(group_sizes), jnp.cumsum(sizes)
    row = jnp.arange(rows)
    expert = jnp.searchsorted(ends, row, side="right")
    shift = jnp.append(padded_ends - sizes - (ends - group_sizes), total)
    blocks = jnp.searchsorted(padded_ends, jnp.arange(0, total, size), side="right")
    return row + shift[expert], sizes, blocks, total


def _bits(precision: Precision, seed: Array, product: int, shape: tuple[int, ...]) -> Array | None:
    if precision.format != "nvfp4" or not precision.stochastic:
        return None
    return random_bytes(seed, product, shape)


def random_bytes(seed: Array, stream: int, shape: tuple[int, ...]) -> Array:
    """uint8 [M, N] that depend on the seed, the stream and the place alone; four of them from one hash."""
    rows, columns = shape
    quarter = -(-columns // 4)
    row = lax.broadcasted_iota(jnp.uint32, (rows, 1), 0)
    column = lax.broadcasted_iota(jnp.uint32, (1, quarter), 1)
    word = _mix(_mix(_mix(seed.astype(jnp.uint32) + jnp.uint32(stream * 0x9E3779B9 % 2**32)) + row) ^ column)
    parts = [(word >> shift).astype(jnp.uint8) for shift in (0, 8, 16, 24)]
    return jnp.stack(parts, axis=-1).reshape(rows, 4 * quarter)[:, :columns]


def _mix(x: Array) -> Array:
    """The finaliser of MurmurHash3: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
