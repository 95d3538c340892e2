"""Experts on few devices of an axis: tokens go to all of them, and what their experts said is summed on the way back.

Where a token has at least as many experts as the axis has devices, it is wanted nearly everywhere. Then its vector
travels once to each other device (an all-gather), not once for each of its experts, and the devices' sums come back
added up (a reduce-scatter): Z - 1 vectors a token each way in place of K (Z - 1) / Z. Nobody waits for the number of
rows to be known, and an expert sees its tokens in the order of one device, blocks of 16 of NVFP4 included.

A device sorts the entries (token, slot) of its own experts to the front and computes them in rounds of `ROOM` times
the mean, so that there is no need of room for all of them; the first round is kept for the backward pass like any
other layer, rows beyond it (a rarely loaded device of many) are computed once more.

Shapes: N tokens of all devices of the axis, K experts of a token, L width, E experts of this device, Q rows of a round,
Z devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nemotron_jax.parallel.mesh import mesh_axes, shards
from pallas_kernels.permute import inverse, sorted_by_expert, sum_over_slots

# Rows of a round over the mean. A device's load is the sum over its experts: with the loads of
# pallas_kernels.grouped_matmul.random_loads, the largest of 64 devices with 8 experts each is 1.35 times the mean.
ROOM = 1.5

# (weights, rows [M, L] sorted by expert, rows of each expert, experts.Draw or None) -> [M, L]
Apply = Callable[[Any, Array, Array, Any], Array]


def everywhere(
    apply: Apply, num_experts: int, x: Array, experts: Array, weights: Array, params: Any, draw: Any
) -> Array:
    """Inside `per_device`: sum_k weights[i, k] expert_k(x[i]), tokens and experts cut over the axis of experts.

    Args:
      apply: as in experts.routed: (params, rows, rows of each expert, draw) -> rows.
      x: [N / Z, L]; experts, weights: [N / Z, K], int of all experts and float32.
      draw: experts.Draw with the entries of these tokens, or None.

    Returns:
      [N / Z, L] in x's dtype, in which the devices' sums are added.
    """
    axes, devices = mesh_axes("experts"), shards("experts")
    x_NL, experts_NK, weights_NK = (lax.all_gather(z, axes, tiled=True) for z in (x, experts, weights))
    if draw is not None:
        draw = draw._replace(entry_M=lax.all_gather(draw.entry_M, axes, tiled=True))
    of_device = num_experts // devices
    local_NK = experts_NK - lax.axis_index(axes) * of_device
    local_NK = jnp.where((local_NK >= 0) & (local_NK < of_device), local_NK, of_device)  # elsewhere: behind all others
    y_NL = _summed(apply, of_device, x_NL, weights_NK, params, local_NK, draw)
    return lax.psum_scatter(y_NL, axes, scatter_dimension=0, tiled=True)


def rows_of_a_round(tokens: int, slots: int, experts: int, devices: int) -> tuple[int, int]:
    """(Q, the most rounds that a routing can need) for N tokens; two devices get by with one."""
    mean, most = tokens * slots // devices, tokens * min(slots, experts)
    quota = most if most <= 2 * mean else -(-int(ROOM * mean) // 8) * 8
    return quota, -(-most // quota)


class _Rows(NamedTuple):
    """The entries (token, slot), sorted by expert, those of other devices' experts at the end.

    Attributes:
      entry_M: M = N K, and zeros up to the last round's end.
      end_E: the row behind the last of each expert.
      row_NK: the row of each entry; of those that are not here, one behind all rounds.
    """

    entry_M: Array
    end_E: Array
    row_NK: Array


def _summed(
    apply: Apply, experts: int, x_NL: Array, weights_NK: Array, params: Any, local_NK: Array, draw: Any
) -> Array:
    """[N, L]: each token's sum over its experts that are here. Differentiable in x, weights and params."""
    tokens, slots = local_NK.shape
    quota, most_rounds = rows_of_a_round(tokens, slots, experts, shards("experts"))
    expert_M, entry_M = sorted_by_expert(local_NK.reshape(-1), experts + 1)
    end_E = jnp.searchsorted(expert_M, jnp.arange(experts, dtype=jnp.int32), side="right").astype(jnp.int32)
    row_NK = jnp.where(local_NK < experts, inverse(entry_M).reshape(local_NK.shape), quota * most_rounds)
    rows = _Rows(jnp.pad(entry_M, (0, max(0, quota * most_rounds - entry_M.size))), end_E, row_NK)
    if most_rounds == 1:
        return _round(apply, quota, 0, rows, draw, params, x_NL, weights_NK)
    # On all devices, not those of the axis alone: `apply` may send something to any of them (an amax).
    rounds = lax.pmax(-(-end_E[-1] // quota), mesh_axes("batch") + mesh_axes("time"))
    return _in_rounds(apply, quota, rounds, rows, draw, params, x_NL, weights_NK)


def _round(
    apply: Apply, quota: int, i: Array | int, rows: _Rows, draw: Any, params: Any, x_NL: Array, weights_NK: Array
) -> Array:
    """What the rows i Q ... (i + 1) Q - 1 add to each token."""
    first = i * quota
    entry_Q = lax.dynamic_slice(rows.entry_M, (first,), (quota,))
    sizes_E = jnp.diff(jnp.clip(rows.end_E - first, 0, quota), prepend=0)
    place_NK = rows.row_NK - first
    place_NK = jnp.where((place_NK >= 0) & (place_NK < quota), place_NK, quota)  # out of range: read as zero
    here = draw and draw._replace(entry_M=draw.entry_M[entry_Q])
    x_QL = _copied(x_NL, entry_Q // weights_NK.shape[1], place_NK)
    return _weighted_sum(apply(params, x_QL, sizes_E, here), weights_NK, entry_Q, place_NK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_rounds(
    apply: Apply, quota: int, rounds: Array, rows: _Rows, draw: Any, params: Any, x_NL: Array, weights_NK: Array
) -> Array:
    """The sum of all rounds."""
    operands = rows, draw, params, x_NL, weights_NK
    return _further(apply, quota, rounds, _round(apply, quota, 0, *operands), *operands)


def _further(apply: Apply, quota: int, rounds: Array, first: Array, *operands: Any) -> Array:
    return lax.fori_loop(1, rounds, lambda i, total: total + _round(apply, quota, i, *operands), first)


def _in_rounds_fwd(
    apply: Apply, quota: int, rounds: Array, rows: _Rows, draw: Any, *operands: Any
) -> tuple[Array, tuple[Any, ...]]:
    first, pull = jax.vjp(functools.partial(_round, apply, quota, 0, rows, draw), *operands)
    return _further(apply, quota, rounds, first, rows, draw, *operands), (rounds, rows, draw, operands, pull)


def _in_rounds_bwd(apply: Apply, quota: int, saved: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    rounds, rows, draw, operands, pull = saved

    def further(i: Array, sums: Any) -> Any:
        _, pull = jax.vjp(functools.partial(_round, apply, quota, i, rows, draw), *operands)
        return jax.tree.map(jnp.add, sums, pull(dy))

    return None, None, None, *lax.fori_loop(1, rounds, further, pull(dy))


_in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)


@jax.custom_vjp
def _copied(x_NL: Array, token_Q: Array, place_NK: Array) -> Array:
    """[Q, L]: the token of each row."""
    return x_NL.at[token_Q].get(mode="promise_in_bounds")


def _copied_fwd(x_NL: Array, token_Q: Array, place_NK: Array) -> tuple[Array, Array]:
    return _copied(x_NL, token_Q, place_NK), place_NK


def _copied_bwd(place_NK: Array, d_QL: Array) -> tuple[Array, None, None]:
    return sum_over_slots(d_QL, place_NK, absent=True), None, None


_copied.defvjp(_copied_fwd, _copied_bwd)


@jax.custom_vjp
def _weighted_sum(y_QL: Array, weights_NK: Array, entry_Q: Array, place_NK: Array) -> Array:
    """[N, L] in y's dtype, summed in float32 (float64 for float64 inputs) in the order of the slots."""
    return sum_over_slots(y_QL, place_NK, weights_NK, absent=True)


def _weighted_sum_fwd(
    y_QL: Array, weights_NK: Array, entry_Q: Array, place_NK: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _weighted_sum(y_QL, weights_NK, entry_Q, place_NK), (y_QL, weights_NK, entry_Q, place_NK)


def _weighted_sum_bwd(saved: tuple[Array, ...], d_NL: Array) -> tuple[Array, Array, None, None]:
    y_QL, weights_NK, entry_Q, place_NK = saved
    dtype = jnp.promote_types(y_QL.dtype, jnp.float32)
    d_QL = d_NL.at[entry_Q // weights_NK.shape[1]].get(mode="promise_in_bounds").astype(dtype)
    weight_Q1 = weights_NK.reshape(-1, 1)[entry_Q].astype(dtype)
    d_weight_Q = (d_QL * y_QL.astype(dtype)).sum(1)
    d_weights = d_weight_Q.at[place_NK].get(mode="fill", fill_value=0)
    return (weight_Q1 * d_QL).astype(y_QL.dtype), d_weights.astype(weights_NK.dtype), None, None


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)
