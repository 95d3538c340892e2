"""Matmuls in a quantised format, and their gradients: exact emulation on any device.

Source: NVIDIA TransformerEngine, common/recipe and pytorch/quantization.py (NVFP4BlockScaling); arXiv 2509.25149.

    product              operands, both in blocks along the axis that is summed over
    y  = x w             x 1x16                             w 16x16
    dx = dy w^T          dy 1x16, stochastic                w as above: the same codes
    dw = x^T dy          RHT(x^T) 1x16 along tokens         RHT(dy^T) 1x16 along tokens, stochastic

RHT is the Hadamard transform of every 16 tokens; it cancels in the product. Operands are code * block scale, which are
exact in bfloat16; the scales of the tensors are applied to the float32 result. On one Hopper GPU kernels make those of
x and dy (pallas_kernels/quantize_operands.py), the two of dy in one pass, and those of w (quantize_tiles.py). On
Blackwell the tensor cores take the codes and block scales themselves (pallas_kernels/nvfp4_matmul.py).

MXFP8 and FP8 round the same operands to nearest: 32 elements of the summed axis share a power of two, or a tensor one
scale.

The routed experts are precision/quantized_experts.py. On a mesh an amax is that of the tensor on all devices.

Random bits are a hash of the seed (of step, microbatch, layer and weight), of which product they are for, and of the
token's place in the global batch, wherever it is computed: a resumed run draws the same.

Shapes: M tokens or rows, K inputs, N outputs, E experts, B blocks of S tokens (16, or 32 for MXFP8).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nemotron_jax.precision.formats import NVFP4, quantize_fp8, quantize_mxfp8, quantize_nvfp4
from nemotron_jax.precision.recipe import MULTIPLES, Precision
from pallas_kernels import floats, nvfp4_matmul, quantize_operands, quantize_tiles
from pallas_kernels.nvfp4 import E2M1_MAX, e2m1_value, hadamard16_of, hadamard_matrix, nvfp4_codes, pack
from pallas_kernels.nvfp4_matmul import implementation as product_by
from pallas_kernels.quantize_expert_operands import expert_maxima
from pallas_kernels.quantize_operands import implementation as operands_by
from pallas_kernels.quantize_tiles import tile_scales
from pallas_kernels.random_bits import DGRAD, WGRAD, random_bytes

OPERANDS = ("x", "w", "dy", "x_tokens", "dy_tokens")  # the last two in blocks along tokens, for the weight's gradient
COUNTS = ("non_zero", "flushed", "saturated", "non_finite")


def new_probe() -> Array:
    """The dummy input of a quantised matmul whose gradient is its statistics: COUNTS of each of OPERANDS.

    Counted before rounding (after the Hadamard transform): elements that are finite and not zero; those of them that
    become zero; those that lie above the largest value of their block, by more than float32 rounds; NaN and infinities.
    Where a kernel makes operands, counting repeats the transform as one product, whose sums may differ in the last
    bit: along tokens the counts may be a few off those of the same operands made by XLA.
    """
    return jnp.zeros((len(OPERANDS), len(COUNTS)), jnp.float32)


class Operand(NamedTuple):
    """``values * scale`` is the quantised tensor; values are exact in the dtype of the GEMM, scale is float32.

    Attributes:
      counts: float32 [len(COUNTS)], for `counted`. It reads arrays that are there anyway, what was quantised and
        values: anything else would have to be written for it whether it runs or not.
      coded: the same tensor with the summed axis last, where the product takes codes.
    """

    values: Array
    scale: Array
    counts: Callable[[], Array]
    coded: NVFP4 | None = None


def counts_of(z: Array, values: Array, scale: Array, limit: Array) -> Array:
    """COUNTS; ``limit``: the largest of the values that each block of z has: of 16 or 32 elements, or all."""
    z = z.astype(jnp.float32)
    limit = jnp.repeat(limit, z.shape[-1] // limit.shape[-1], axis=-1) if limit.ndim else limit
    finite = jnp.isfinite(z)
    non_zero, kept = finite & (z != 0), values != 0
    above = jnp.abs(z) > limit * scale * (1 + 2.0**-20)
    each = (non_zero, non_zero & ~kept, non_zero & kept & above, ~finite)
    return jnp.stack([which.sum(dtype=jnp.float32) for which in each])


@jax.named_scope("statistics")
def counted(operands: list[Operand]) -> Array:
    """[len(operands), len(COUNTS)]."""
    return jnp.stack([each.counts() for each in operands])


def quantized_matmul(x: Array, w: Array, precision: Precision, seed: Array | None, probe: Array | None = None) -> Array:
    """``x [..., k] @ w [k, n] -> [..., n]`` in x's dtype; the gradient of w has w's dtype, that of the probe counts."""
    seed = jnp.uint32(0) if seed is None else seed
    return _matmul(x.reshape(-1, x.shape[-1]), w, seed, probe, precision).reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _matmul(x_MK: Array, w_KN: Array, seed: Array, probe: Array | None, precision: Precision) -> Array:
    return _forward(x_MK, w_KN, precision, None)[0]


def _forward(x_MK: Array, w_KN: Array, precision: Precision, probe: Array | None) -> tuple[Array, Array | None]:
    """The product, and COUNTS of x and w."""
    with jax.named_scope("fprop"):
        x = _together(x_MK, precision, None, rows=True)[0] or quantize_rows(x_MK, precision)
        w = quantize_weight(w_KN, precision, 0)
        counts = None if probe is None else counted([x, w])
    return _product(x, w, (1, 0), precision).astype(x_MK.dtype), counts


def _matmul_fwd(
    x: Array, w: Array, seed: Array, probe: Array | None, precision: Precision
) -> tuple[Array, tuple[Any, ...]]:
    y, counts = _forward(x, w, precision, probe)
    return y, (x, w, seed, counts)


def _matmul_bwd(precision: Precision, saved: tuple[Any, ...], dy_MN: Array) -> tuple[Array, Array, None, Array | None]:
    x_MK, w_KN, seed, counts = saved
    dy, dy_tokens = _together(dy_MN, precision, seed, rows=True, tokens=True)
    _, x_tokens = _together(x_MK, precision, None, tokens=True)
    with jax.named_scope("dgrad"):
        if dy is None:
            bits = bits_of(precision, seed, DGRAD, _places(dy_MN), dy_MN.shape[1])
            dy = quantize_rows(dy_MN, precision, bits)
        w = quantize_weight(w_KN, precision, 1)
    dx = _product(dy, w, (1, 1), precision)
    padding = ((0, -len(x_MK) % block_size(precision)), (0, 0))
    with jax.named_scope("wgrad"):
        x_tokens = x_tokens or quantize_tokens(jnp.pad(x_MK, padding), precision)
        if dy_tokens is None:
            dy_MN = jnp.pad(dy_MN, padding)
            bits = bits_of(precision, seed, WGRAD, _places(dy_MN), dy_MN.shape[1])
            dy_tokens = quantize_tokens(dy_MN, precision, bits)
    dw = _product(x_tokens, dy_tokens, (0, 0), precision)
    d_probe = of_probe(counts, [dy, x_tokens, dy_tokens])
    return dx.astype(x_MK.dtype), dw.astype(w_KN.dtype), None, d_probe


def of_probe(forward: Array | None, backward: list[Operand]) -> Array | None:
    """The gradient of a probe, from COUNTS of the operands that come first; None without a probe."""
    return None if forward is None else jnp.concatenate([forward, counted(backward)])


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _product(a: Operand, b: Operand, axes: tuple[int, int], precision: Precision) -> Array:
    """float32, summed over an axis of the values of each."""
    if a.coded is not None and b.coded is not None:
        return nvfp4_matmul(a.coded, b.coded)
    exact = lax.Precision.HIGHEST if precision.operands == "float32" else lax.Precision.DEFAULT
    contract = (((axes[0],), (axes[1],)), ((), ()))
    product = lax.dot_general(a.values, b.values, contract, precision=exact, preferred_element_type=jnp.float32)
    return product * (a.scale * b.scale)


def nvfp4_scale(amax: Array) -> Array:
    """`nvfp4.global_scale` but for the last place, of which float32 sums have no use: one operation, not a hundred."""
    return amax * jnp.float32(1 / (E2M1_MAX * 448))


def _by_codes(inner: int) -> bool:
    """Whether the product over an axis of this size takes codes."""
    return product_by(inner) != "reference"


def block_size(precision: Precision) -> int:
    return max(16, MULTIPLES[precision.format])


@jax.named_scope("weight")
def quantize_weight(w_KN: Array, precision: Precision, axis: int) -> Operand:
    """Quantised along an axis, 0 or 1; values like w."""
    by_rows = (lambda z: z) if axis == 1 else jnp.transpose
    if precision.format == "nvfp4" and precision.weight_block == "16x16":
        amax = floats.absolute_max(w_KN)
        coded = quantize_nvfp4(by_rows(w_KN), block="16x16", amax=amax) if _by_codes(w_KN.shape[axis]) else None
        return quantize_square(w_KN, amax, precision)._replace(coded=coded)
    made = rounded_rows(by_rows(w_KN), precision)
    values = by_rows(made.values)

    def count() -> Array:
        return counts_of(by_rows(w_KN), by_rows(values), made.scale, made.limit)

    return Operand(values, made.scale, count, made.coded)


def quantize_square(w: Array, amax: Array, precision: Precision) -> Operand:
    """NVFP4 in tiles of 16x16: w [..., M, N] with amax and scale [...]; values like w, the same along either axis."""
    values = quantize_tiles(w, amax, dtype=precision.operands)
    scale = nvfp4_scale(amax)

    def count() -> Array:
        limit = 6 * jnp.repeat(tile_scales(w, amax), 16, axis=-2)
        return counts_of(w, values, scale[..., None, None], limit)

    return Operand(values, scale, count)


def _blocks(
    z: Array, amax: Array, axis: int, bits: Array | None, precision: Precision
) -> tuple[Array, Array, Array, Array]:
    """NVFP4 with blocks of the 16 elements along an axis; ``amax`` float32, to broadcast against z.

    Returns values like z, the largest value of each block, and the codes of values and scales.
    """
    codes, scales = nvfp4_codes(z, amax, axis=axis, bits=bits)
    steps = floats.e4m3_value(scales)
    return (e2m1_value(codes) * steps).astype(precision.operands), 6 * steps, codes, scales


def _together(
    z_MK: Array,
    precision: Precision,
    seed: Array | None,
    *,
    rows: bool = False,
    tokens: bool = False,
) -> tuple[Operand | None, Operand | None]:
    """`quantize_rows` and `quantize_tokens` of one tensor by a kernel that reads it once; None where there is none.

    ``seed``: for stochastic rounding, where the recipe draws.
    """
    by_kernel = precision.format == "nvfp4" and z_MK.dtype == precision.operands
    if not by_kernel or operands_by(z_MK) == "reference":
        return None, None
    count = len(z_MK)
    z_MK = jnp.pad(z_MK, ((0, -count % 16), (0, 0)))  # to whole blocks of tokens, of which zeros change nothing
    with jax.named_scope("quantize"):
        amax_rows = amax_tokens = None
        if tokens:  # one pass over z for both
            maxima = expert_maxima(z_MK, None, hadamard=precision.hadamard)
            amax_rows, amax_tokens = (amax[0] for amax in maxima)
        elif rows:  # which XLA can make with z
            amax_rows = floats.absolute_max(z_MK)
        amax_rows = amax_rows if rows else None
        seed = seed if precision.draws else None
        made = quantize_operands(z_MK, amax_rows, amax_tokens, hadamard=precision.hadamard, seed=seed)

    def operand(rounded: tuple[Array, Array] | None, amax: Array | None, axis: int) -> Operand | None:
        if rounded is None or amax is None:
            return None
        (values, scales), scale = rounded, nvfp4_scale(amax)

        def counts() -> Array:
            z = z_MK.reshape(len(z_MK), -1, 16) if axis == 2 else turned_at_once(z_MK, precision)
            limit = 6 * floats.e4m3_value(jnp.expand_dims(scales, axis))
            return counts_of(z, values.reshape(z.shape), scale, limit)

        return Operand(values[:count] if axis == 2 else values, scale, counts)

    return operand(made[0], amax_rows, 2), operand(made[1], amax_tokens, 1)


def turned(z_MK: Array, precision: Precision) -> Array:
    """[B, S, K]: blocks of tokens, transformed where the recipe says so."""
    z_BSK = z_MK.reshape(-1, block_size(precision), z_MK.shape[1])
    if precision.format == "nvfp4" and precision.hadamard:
        z_BSK = hadamard16_of([z_BSK[:, i] for i in range(z_BSK.shape[1])], axis=1)
    return z_BSK


def turned_at_once(z_MK: Array, precision: Precision) -> Array:
    """`turned` of NVFP4 for statistics: a product with the transform's matrix, a hundredth of the operations.

    Terms are exact and summed in float32, in any order, and tiny results may be zero.
    """
    z_BSK = z_MK.reshape(-1, 16, z_MK.shape[1])
    if not precision.hadamard:
        return z_BSK
    h_SR = jnp.asarray(hadamard_matrix(), z_MK.dtype)
    return jnp.einsum("sr,bsk->brk", h_SR, z_BSK, precision=lax.Precision.HIGHEST)


class Rounded(NamedTuple):
    """Rows of an `Operand`: [M, K] with the largest value of each block, [M, K / 16 or 32] or []."""

    values: Array
    scale: Array
    limit: Array
    coded: NVFP4 | None = None


def quantize_rows(z_MK: Array, precision: Precision, bits: Array | None = None) -> Operand:
    """`rounded_rows` that can be counted."""
    made = rounded_rows(z_MK, precision, bits)
    count = functools.partial(counts_of, z_MK, made.values, made.scale, made.limit)
    return Operand(made.values, made.scale, count, made.coded)


@jax.named_scope("rows")
def rounded_rows(z_MK: Array, precision: Precision, bits: Array | None = None, amax: Array | None = None) -> Rounded:
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
        values, limit, codes, scales = _blocks(z_MK.reshape(blocks), amax[..., None], 2, bits, precision)
        coded = None
        if _by_codes(z_MK.shape[1]):
            coded = NVFP4(pack(codes.reshape(z_MK.shape)), floats.as_e4m3(scales[..., 0]), amax)
        return Rounded(values.reshape(z_MK.shape), nvfp4_scale(amax), limit[..., 0], coded)
    if precision.format == "mxfp8":
        mx = quantize_mxfp8(z_MK)
        limit = 448 * floats.float_of(mx.scales.astype(jnp.uint32) << 23)
        return Rounded(mx.dequantize(dtype), jnp.float32(1), limit)
    if amax is not None and amax.ndim:
        each = jax.vmap(lambda row, amax: quantize_fp8(row, amax=amax[0]))(z_MK, amax)
        values = floats.e4m3_value(floats.e4m3_bits(each.codes)).astype(dtype)
        return Rounded(values, each.scale[:, None], jnp.float32(448))
    one = quantize_fp8(z_MK, amax=amax)
    values = floats.e4m3_value(floats.e4m3_bits(one.codes)).astype(dtype)
    return Rounded(values, one.scale, jnp.float32(448))


@jax.named_scope("tokens")
def quantize_tokens(
    z_MK: Array,
    precision: Precision,
    bits: Array | None = None,
    block_expert: Array | None = None,
    experts: int = 0,
    over: tuple[str, ...] = (),
) -> Operand:
    """Blocks along the first axis, M a multiple of them, transformed first where the recipe says so.

    Args:
      block_expert: int32 [M / S], the expert of each block, for an amax (and scale [E]) of each; None: one tensor.
      over: mesh axes over which devices hold other parts of the experts' tensors.
    """
    size, z_BSK = block_size(precision), turned(z_MK, precision)
    if block_expert is None:
        amax = floats.absolute_max(z_BSK)
        amax_B = amax[None]
    else:
        amax_E = jnp.zeros(experts, jnp.float32)
        amax_E = of_all(amax_E.at[block_expert].max(floats.absolute_max(z_BSK, axis=(1, 2)), mode="drop"), over)
        amax_B = amax_E[jnp.minimum(block_expert, experts - 1)]
    if precision.format == "nvfp4":
        bits = None if bits is None else bits.reshape(z_BSK.shape)
        blocks, limit, codes, scales = _blocks(z_BSK, amax_B[:, None, None], 1, bits, precision)
        values = blocks.reshape(z_MK.shape)

        def count() -> Array:
            z = turned(z_MK, precision)
            return counts_of(z, values.reshape(z.shape), nvfp4_scale(amax_B)[:, None, None], limit)

        if block_expert is not None:
            return Operand(values, nvfp4_scale(amax_E), count)
        coded = None
        if _by_codes(len(z_MK)):
            coded = NVFP4(pack(codes.reshape(z_MK.shape).T), floats.as_e4m3(scales[:, 0].T), amax)
        return Operand(values, nvfp4_scale(amax), count, coded)

    def as_rows(z: Array) -> Array:
        return jnp.swapaxes(z.reshape(z_BSK.shape), 1, 2).reshape(-1, size)

    if block_expert is None:
        made = rounded_rows(as_rows(z_MK), precision)
        scale = made.scale
    else:
        amax = jnp.repeat(amax_B, z_MK.shape[1])[:, None]
        made = rounded_rows(as_rows(z_MK), precision, None, amax)
        scale = scale_of(amax_E, precision)
    values = jnp.swapaxes(made.values.reshape(len(z_BSK), -1, size), 1, 2).reshape(z_MK.shape)
    return Operand(values, scale, lambda: counts_of(as_rows(z_MK), as_rows(values), made.scale, made.limit))


def of_all(amax_E: Array, over: tuple[str, ...]) -> Array:
    """The maxima of the devices along mesh axes."""
    return lax.pmax(amax_E, over) if over else amax_E


def scale_of(amax_E: Array, precision: Precision) -> Array:
    """The global scales that go with some amax."""
    nothing = jnp.zeros((len(amax_E), 32), jnp.float32)
    return jnp.broadcast_to(rounded_rows(nothing, precision, amax=amax_E[:, None]).scale, (len(amax_E), 1))[:, 0]


def _places(z_MK: Array) -> Array:
    """[M]: an array of XLA's, over all devices, holds the tokens in their order."""
    return jnp.arange(len(z_MK), dtype=jnp.uint32)


def bits_of(precision: Precision, seed: Array, product: int, token_M: Array, columns: int) -> Array | None:
    return random_bytes(seed, product, token_M, columns) if precision.draws else None
