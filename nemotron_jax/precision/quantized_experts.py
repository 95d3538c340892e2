"""The matmuls of the routed experts in a quantised format, and their gradients: precision/quantized.py for groups.

Each expert is a tensor of its own: it has its amax, and blocks of tokens do not cross from one to the next, since
groups are filled up to whole blocks for the weight's gradient. On a mesh an amax is that of the tensor on all devices,
and blocks of tokens hold those of one device; rows that arrive in a further round (parallel/experts.py) are a tensor
of their own. Random bits depend on a row's token and slot in the global batch.

On a Hopper GPU kernels make the NVFP4 operands of x and dy (pallas_kernels/quantize_expert_operands.py) and of the
weights (quantize_tiles.py), whatever the mesh, since experts are computed device by device. Everywhere else, and in
the other formats, XLA does. The scales of the tensors multiply the float32 sums, before an activation and the one
rounding of the result.

Shapes: M rows sorted by expert, K inputs, N outputs, E experts.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from nemotron_jax.precision.quantized import (
    Operand,
    bits_of,
    block_size,
    counted,
    counts_of,
    nvfp4_scale,
    of_all,
    of_probe,
    quantize_square,
    quantize_tokens,
    rounded_rows,
    scale_of,
    turned_at_once,
)
from nemotron_jax.precision.recipe import Precision
from pallas_kernels import floats, quantize_expert_operands
from pallas_kernels.grouped_products import multiply_groups, sum_groups
from pallas_kernels.nvfp4 import block_scales
from pallas_kernels.quantize_expert_operands import expert_maxima
from pallas_kernels.quantize_expert_operands import implementation as operands_by
from pallas_kernels.random_bits import DGRAD, WGRAD
from pallas_kernels.whole_blocks import whole_blocks


def quantized_expert_matmul(
    x_MK: Array,
    w_EKN: Array,
    group_sizes: Array,
    precision: Precision,
    seed: Array | None,
    entry_M: Array | None = None,
    probe: Array | None = None,
    *,
    activation: str | None = None,
) -> Array:
    """Each group of rows times its expert's weight -> [M, N] in x's dtype; gradients in the dtypes of x and w.

    ``entry_M``: uint32 [M], which (token, slot) of the batch each row is; None: its place.
    ``activation``: None or "relu2".
    """
    seed = jnp.uint32(0) if seed is None else seed
    entry_M = jnp.arange(len(x_MK), dtype=jnp.uint32) if entry_M is None else entry_M
    return _experts(x_MK, w_EKN, group_sizes, seed, entry_M, probe, precision, activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _experts(
    x_MK: Array,
    w_EKN: Array,
    group_sizes: Array,
    seed: Array,
    entry_M: Array,
    probe: Array | None,
    precision: Precision,
    activation: str | None,
) -> Array:
    return _experts_fwd(x_MK, w_EKN, group_sizes, seed, entry_M, None, precision, activation)[0]


def _experts_fwd(
    x_MK: Array,
    w_EKN: Array,
    group_sizes: Array,
    seed: Array,
    entry_M: Array,
    probe: Array | None,
    precision: Precision,
    activation: str | None,
) -> tuple[Array, tuple[Any, ...]]:
    rows = _Rows(group_sizes, precision, precision.cut.rows + precision.cut.inputs, None)
    with jax.named_scope("fprop"):
        maxima = _maxima(x_MK, rows)
        x = _by_rows(x_MK, rows, maxima)
        amax_E = weight_maxima(w_EKN, precision)
        w = expert_weights(w_EKN, amax_E, precision, 0)
        scale = x.scale * w.scale
        y = multiply_groups(x.values, w.values, group_sizes, scale, activation=activation, dtype=x_MK.dtype)
        counts = None if probe is None else counted([x, w])
    kept = y if activation else None
    return y, (x_MK, w_EKN, group_sizes, seed, entry_M, kept, maxima and maxima.tokens, amax_E, counts)


def _experts_bwd(
    precision: Precision, activation: str | None, saved: tuple[Any, ...], dy_MN: Array
) -> tuple[Array | None, ...]:
    x_MK, w_EKN, group_sizes, seed, entry_M, y_MN, x_maxima, amax_E, counts = saved
    if activation:  # relu2, whose derivative 2 max(z, 0) is 2 sqrt(y)
        dy_MN = (dy_MN.astype(jnp.float32) * 2 * jnp.sqrt(y_MN.astype(jnp.float32))).astype(dy_MN.dtype)
    over_x, over_dy = (precision.cut.rows + axes for axes in (precision.cut.inputs, precision.cut.outputs))
    rows_x = _Rows(group_sizes, precision, over_x, None)
    rows_dy = _Rows(group_sizes, precision, over_dy, (seed, entry_M) if precision.draws else None)
    with jax.named_scope("quantize"):
        dy_maxima = _maxima(dy_MN, rows_dy)
        both = _by_kernel(dy_MN, rows_dy, dy_maxima, rows=True, tokens=True)
        x_tokens = None if x_maxima is None else _by_kernel(x_MK, rows_x, _Maxima(x_maxima, x_maxima), tokens=True)[1]
    with jax.named_scope("dgrad"):
        dy = both[0] or _by_rows(dy_MN, rows_dy, None)
        w = expert_weights(w_EKN, amax_E, precision, 1)
        scale = dy.scale * w.scale
        dx = multiply_groups(dy.values, w.values, group_sizes, scale, transposed=True, dtype=x_MK.dtype)
    with jax.named_scope("wgrad"):
        x = x_tokens or _by_tokens(x_MK, rows_x)
        dy_tokens = both[1] or _by_tokens(dy_MN, rows_dy)
        size = block_size(precision)
        filled = -(-group_sizes // size) * size
        dw = sum_groups(x.values, dy_tokens.values, filled, x.scale * dy_tokens.scale, dtype=w_EKN.dtype)
    return dx, dw, None, None, None, of_probe(counts, [dy, x, dy_tokens])


_experts.defvjp(_experts_fwd, _experts_bwd)


class _Rows(NamedTuple):
    """What goes for all rows of an operand.

    Attributes:
      over: mesh axes over which devices hold other parts of it.
      draw: seed and entry_M, for stochastic rounding.
    """

    group_sizes: Array
    precision: Precision
    over: tuple[str, ...]
    draw: tuple[Array, Array] | None

    def bits(self, product: int, columns: int) -> Array | None:
        if self.draw is None:
            return None
        seed, entry_M = self.draw
        return bits_of(self.precision, seed, product, entry_M, columns)


class _Maxima(NamedTuple):
    """float32 [E]: the amax of rows as they are, and of blocks of tokens after the transform."""

    rows: Array
    tokens: Array


def _maxima(z_MK: Array, rows: _Rows) -> _Maxima | None:
    """By the kernel, in one pass; None where operands are made without."""
    by_kernel = rows.precision.format == "nvfp4" and z_MK.dtype == rows.precision.operands
    if not by_kernel or operands_by(z_MK) == "reference":
        return None
    found = expert_maxima(z_MK, rows.group_sizes, hadamard=rows.precision.hadamard)
    return _Maxima(*(of_all(amax_E, rows.over) for amax_E in found))


def _by_kernel(
    z_MK: Array, of: _Rows, maxima: _Maxima | None, *, rows: bool = False, tokens: bool = False
) -> tuple[Operand | None, Operand | None]:
    """Both operands of z, which is read once, as far as wanted; none where there is no kernel."""
    if maxima is None:
        return None, None
    seed, entry_M = of.draw or (None, None)
    made = quantize_expert_operands(
        z_MK,
        of.group_sizes,
        maxima.rows if rows else None,
        maxima.tokens if tokens else None,
        hadamard=of.precision.hadamard,
        seed=seed,
        entries=entry_M,
    )

    def operand(values: Array | None, amax_E: Array, axis: int) -> Operand | None:
        if values is None:
            return None
        return Operand(values, nvfp4_scale(amax_E), lambda: _counts(z_MK, values, amax_E, of, axis))

    return operand(made[0], maxima.rows, 2), operand(made[1], maxima.tokens, 1)


def _counts(z_MK: Array, values: Array, amax_E: Array, of: _Rows, axis: int) -> Array:
    """COUNTS of an operand of the kernel, which does not return the scales; blocks along axis 2, or 1 (tokens)."""
    last = len(of.group_sizes) - 1
    if axis == 2:
        expert = _expert_of_row(z_MK, of)
        z = _within_groups(z_MK, expert, of).reshape(len(z_MK), -1, 16)
    else:
        whole = whole_blocks(of.group_sizes, len(z_MK), 16)
        expert = whole.expert_of_block
        z = turned_at_once(whole.filled(z_MK), of.precision)
    amax = amax_E[jnp.minimum(expert, last)][:, None, None]
    scales = block_scales(floats.absolute_max(z, axis=axis, keepdims=True), amax)
    return counts_of(z, values.reshape(z.shape), nvfp4_scale(amax), 6 * floats.e4m3_value(scales))


def _by_rows(z_MK: Array, of: _Rows, maxima: _Maxima | None) -> Operand:
    """Quantised along K with an amax of each expert: values [M, K], scale [E]."""
    return _by_kernel(z_MK, of, maxima, rows=True)[0] or _rows_by_xla(z_MK, of)


def _rows_by_xla(z_MK: Array, of: _Rows) -> Operand:
    expert_M, experts = _expert_of_row(z_MK, of), len(of.group_sizes)
    largest_M = floats.absolute_max(z_MK, axis=1)
    amax_E = jnp.zeros(experts, jnp.float32).at[expert_M].max(largest_M, mode="drop")
    amax_E = of_all(amax_E, of.over)
    amax_M = amax_E[jnp.minimum(expert_M, experts - 1)]
    drawn = of.bits(DGRAD, z_MK.shape[1])
    made = rounded_rows(_within_groups(z_MK, expert_M, of), of.precision, drawn, amax_M[:, None])

    def count() -> Array:
        return counts_of(_within_groups(z_MK, expert_M, of), made.values, made.scale, made.limit)

    return Operand(made.values, scale_of(amax_E, of.precision), count)


def _expert_of_row(z_MK: Array, of: _Rows) -> Array:
    """[M]; E past the last group."""
    return jnp.searchsorted(jnp.cumsum(of.group_sizes), jnp.arange(len(z_MK)), side="right")


def _within_groups(z_MK: Array, expert_M: Array, of: _Rows) -> Array:
    """Zeros past the last group, which nobody reads and so nobody should count."""
    return jnp.where((expert_M < len(of.group_sizes))[:, None], z_MK, 0)


def _by_tokens(z_MK: Array, of: _Rows) -> Operand:
    """Quantised along tokens: values of groups filled up to whole blocks, scale [E]."""
    whole = whole_blocks(of.group_sizes, len(z_MK), block_size(of.precision))
    bits = of.bits(WGRAD, z_MK.shape[1])
    bits = None if bits is None else whole.filled(bits)
    experts = len(of.group_sizes)
    return quantize_tokens(whole.filled(z_MK), of.precision, bits, whole.expert_of_block, experts, of.over)


@jax.named_scope("weight")
def weight_maxima(w_EKN: Array, precision: Precision) -> Array:
    """The amax of each expert, float32 [E]."""
    return of_all(floats.absolute_max(w_EKN, axis=(1, 2)), precision.cut.inputs + precision.cut.outputs)


@jax.named_scope("weight")
def expert_weights(w_EKN: Array, amax_E: Array, precision: Precision, axis: int) -> Operand:
    """Each expert quantised along an axis of its matrix, 0 or 1: values like w, scale [E]."""
    if precision.format == "nvfp4" and precision.weight_block == "16x16":
        return quantize_square(w_EKN, amax_E, precision)
    by_rows = (lambda z: z) if axis == 1 else functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    made = jax.vmap(lambda w, amax: rounded_rows(w, precision, amax=amax)[:3])(by_rows(w_EKN), amax_E)
    values, scale, limit = by_rows(made[0]), *made[1:]

    def count() -> Array:
        return jax.vmap(counts_of)(by_rows(w_EKN), by_rows(values), scale, limit).sum(0)

    return Operand(values, scale, count)
