"""Experts on the devices of an axis: rows travel to them and back. Exact: no token is dropped.

A device sorts its (token, slot) entries by expert, so that what goes to each device is one run of rows. Nobody knows
at compile time how long the runs are, and room for the worst case (all tokens choose one device) would be as many
times too large as there are devices. So rows travel in rounds of at most `ROOM` times the mean from each device to
each other one, as many rounds as the longest run needs: nearly always one.

Nothing of a round is kept for the backward pass, since the number of rounds is not known: rows and gradients travel
together, the experts compute once more, and the gradients travel back.

Where a token has as many experts as there are devices, or more, tokens go to all of them instead: experts_gathered.py.

The blocks of a round are padded to Q rows and travel by an all-to-all. XLA's ragged all-to-all would send the rows
alone, but its own kernel took 129 ms for 0.5 GB between two H100s, and through NCCL it did not end (BENCHMARKS.md);
XLA:CPU has none.

Shapes: B batch, T time, L width, K experts of a token, E experts; M = B T K rows of a device, Q rows of a round from
one device to another, Z devices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from nemotron_jax.parallel.experts_gathered import ROOM, Apply, everywhere
from nemotron_jax.parallel.local import Axes, after, gathered, per_device, together
from nemotron_jax.parallel.mesh import mesh_axes, shards
from pallas_kernels import permute, unpermute
from pallas_kernels.packed import Packed
from pallas_kernels.zeros import zeros_after

# What a layer that is computed again keeps all the same (jax.checkpoint): the rows would travel a third time for it.
KEPT = "routed"


class Draw(NamedTuple):
    """What random bits of a row depend on: a seed, uint32 scalar, and which (token, slot) of the global batch it is.

    Not on where the row is computed: entry_M, uint32 [M], travels with the rows.
    """

    seed: Array
    entry_M: Array


def routed(
    apply: Apply,
    u_BTL: Array,
    experts_BTK: Array,
    weights_BTK: Array,
    params: Sequence[Array | Packed],
    axes: Sequence[Axes],
    num_experts: int,
    dtype: DTypeLike,
    seed: Array | None = None,
) -> Array:
    """sum_k weights[b, t, k] expert_k(u[b, t]), each device with its tokens and its experts.

    Args:
      apply: the experts; linear in the parts of "expert_mlp", whose results are summed here.
      u_BTL: [B, T, L].
      experts_BTK, weights_BTK: [B, T, K] int and float32, the chosen experts and what they weigh.
      params: weights of the experts, each [E, ...].
      axes: their logical axes, "expert_weights" first.
      seed: uint32 scalar, handed to `apply` with each row's (token, slot); None: it draws nothing.
      dtype: in which `apply` uses them, and in which parts of them travel to make them whole.

    Returns:
      [B, T, L] in u's dtype.
    """
    # Packed weights, which are never trained, are whole on each device.
    packed = any(isinstance(w, Packed) for w in params)
    travels = not packed and shards("experts") > 1 and num_experts % shards("experts") == 0
    shapes = [w.shape for w in params]
    batch, time, slots = experts_BTK.shape
    far = everywhere if shards("experts") <= slots else _far
    route = functools.partial(far if travels else _near, apply, num_experts)

    entry_BTK = None
    if seed is not None:
        entry_BTK = jnp.arange(batch * time * slots, dtype=jnp.uint32).reshape(batch, time, slots)

    def of_device(
        seed: Array | None,
        entry_BTK: Array | None,
        u_BTL: Array,
        experts_BTK: Array,
        weights_BTK: Array,
        *params: Any,
    ) -> Array:
        if not packed:
            # The weight that is used first travels first (model/layer.py); the other while its rows are sorted.
            params = (params[0], *after(u_BTL, params[1:]))
            params = tuple(gathered(w, of, shape, dtype) for w, of, shape in zip(params, axes, shapes, strict=True))
            u_BTL, params = together(u_BTL, params)
        x, experts, weights = (z.reshape(-1, z.shape[-1]) for z in (u_BTL, experts_BTK, weights_BTK))
        draw = None if seed is None or entry_BTK is None else Draw(seed, entry_BTK.reshape(-1))
        return route(x, experts, weights, params, draw).reshape(1, *u_BTL.shape)

    tokens = ("batch", "time", None)
    cut = (None,) * len(params) if packed else axes
    run = per_device(
        of_device, ((), tokens, tokens, tokens, tokens, *cut), ("expert_mlp", *tokens), whole=("expert_mlp",) * packed
    )
    y_BTL = run(seed, entry_BTK, u_BTL, experts_BTK, weights_BTK, *params).sum(0, dtype=u_BTL.dtype)
    return checkpoint_name(y_BTL, KEPT) if travels else y_BTL


def others_with_rows(experts_here: int, num_experts: int) -> tuple[str, ...]:
    """Inside of `apply`: the mesh axes whose devices have other rows of the same experts; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return ()
    travelled = mesh_axes("experts") if experts_here < num_experts else ()
    return tuple(axis for axis in mesh_axes("batch") + mesh_axes("time") if axis not in travelled)


def _near(apply: Apply, num_experts: int, x: Array, experts: Array, weights: Array, params: Any, draw: Any) -> Array:
    """Every expert is here: x [M / K, L], experts and weights [M / K, K] -> [M / K, L]."""
    rows, group_sizes, row_map = permute(x, experts, num_experts)
    draw = draw and draw._replace(entry_M=_of_rows(draw.entry_M, row_map))
    return unpermute(apply(params, rows, group_sizes, draw), row_map, weights)


def _of_rows(of_entry: Array, row_map: Array) -> Array:
    """What belongs to each (token, slot) [M, ...], in the order of the rows."""
    return jnp.zeros_like(of_entry).at[row_map.reshape(-1)].set(of_entry, unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _far(apply: Apply, num_experts: int, x: Array, experts: Array, weights: Array, params: Any, draw: Any) -> Array:
    """The same where each device has a part of the experts. Random bits are for gradients alone: none are drawn."""
    rows, counts, row_map = permute(x, experts, num_experts)
    trip = _plan(counts, rows.shape[0])

    def one_round(i: Array, out: Array) -> Array:
        arrived = _there(trip, i, rows)
        sorted_rows, group_sizes, place = _by_expert(trip, i, arrived)
        return _back(trip, i, apply(params, sorted_rows, group_sizes, None)[place], out)

    out = lax.fori_loop(0, trip.rounds, one_round, jnp.zeros_like(rows))
    return unpermute(out, row_map, weights)


def _far_fwd(
    apply: Apply, num_experts: int, x: Array, experts: Array, weights: Array, params: Any, draw: Any
) -> tuple[Array, tuple[Any, ...]]:
    return _far(apply, num_experts, x, experts, weights, params, draw), (x, experts, weights, params, draw)


def _far_bwd(apply: Apply, num_experts: int, saved: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    x, experts, weights, params, draw = saved
    both = jnp.concatenate([x, dy.astype(x.dtype)], axis=1)
    rows, counts, row_map = permute(both, experts, num_experts)
    trip = _plan(counts, rows.shape[0])
    weight_of_row = _of_rows(weights.reshape(-1, 1), row_map)
    entry_of_row = draw and _of_rows(draw.entry_M[:, None], row_map)

    def one_round(i: Array, sums: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        dx_of_row, dw_of_row, d_params = sums
        sorted_rows, group_sizes, place = _by_expert(trip, i, _there(trip, i, rows))
        w = _sorted_like(place, _there(trip, i, weight_of_row))
        sorted_x, sorted_dy = jnp.split(sorted_rows, 2, axis=1)
        here = draw and draw._replace(entry_M=_sorted_like(place, _there(trip, i, entry_of_row))[:, 0])
        y, pull = jax.vjp(lambda params, x: apply(params, x, group_sizes, here), params, sorted_x)
        dw = (sorted_dy.astype(w.dtype) * y.astype(w.dtype)).sum(1, keepdims=True)
        more, dx = pull((w * sorted_dy).astype(y.dtype))
        d_params = jax.tree.map(lambda total, d: total + d.astype(total.dtype), d_params, more)
        return _back(trip, i, dx[place], dx_of_row), _back(trip, i, dw[place], dw_of_row), d_params

    after_dy = functools.partial(zeros_after, dy)
    d_params = jax.tree.map(lambda w: after_dy(w.shape, jnp.promote_types(w.dtype, jnp.float32)), params)
    dx_of_row, dw_of_row = (after_dy((rows.shape[0], like.shape[1]), like.dtype) for like in (x, weight_of_row))
    zeros = dx_of_row, dw_of_row, d_params
    dx_of_row, dw_of_row, d_params = lax.fori_loop(0, trip.rounds, one_round, zeros)
    dx = unpermute(dx_of_row, row_map, jnp.ones_like(weights))
    d_params = jax.tree.map(lambda d, w: d.astype(w.dtype), d_params, params)
    return dx, None, dw_of_row[row_map, 0], d_params, None


_far.defvjp(_far_fwd, _far_bwd)


class _Trip(NamedTuple):
    """How the rows of this device, sorted by expert, travel.

    Attributes:
      run_Z, start_Z: rows for each device, and the first of them here.
      coming_ZE: rows from each device for each expert of this one.
      quota: Q.
      rounds: the same number on all devices.
    """

    run_Z: Array
    start_Z: Array
    coming_ZE: Array
    quota: int
    rounds: Array


def _plan(counts: Array, rows: int) -> _Trip:
    """From the rows of each of all experts on this device: one small all-to-all."""
    devices, axes = shards("experts"), mesh_axes("experts")
    going_ZE = counts.reshape(devices, -1)
    run_Z = going_ZE.sum(1)
    start_Z = jnp.cumsum(run_Z) - run_Z
    coming_ZE = lax.all_to_all(going_ZE, axes, 0, 0, tiled=True)
    quota = min(rows, -(-int(ROOM * rows) // (devices * 8)) * 8)
    # On all devices, not those of the axis alone: `apply` may send something to any of them (an amax).
    rounds = lax.pmax(-(-run_Z.max() // quota), mesh_axes("batch") + mesh_axes("time"))
    return _Trip(run_Z, start_Z, coming_ZE, quota, rounds)


def _going(trip: _Trip, i: Array) -> Array:
    """[Z] rows that leave for each device in round i."""
    return jnp.clip(trip.run_Z - i * trip.quota, 0, trip.quota)


def _coming(trip: _Trip, i: Array) -> Array:
    """[Z, E] rows that come from each device for each expert in round i: what its window has of each."""
    end_ZE = jnp.cumsum(trip.coming_ZE, axis=1)
    first, last = i * trip.quota, (i + 1) * trip.quota
    return jnp.maximum(jnp.minimum(end_ZE, last) - jnp.maximum(end_ZE - trip.coming_ZE, first), 0)


def _there(trip: _Trip, i: Array, rows: Array) -> Array:
    """Rows [M, L] -> what arrives in round i [Z Q, L]: from each device Q rows, zeros behind those that came."""
    axes, quota = mesh_axes("experts"), trip.quota
    going_Z, first_Z = _going(trip, i), trip.start_Z + i * quota

    place = jnp.arange(quota)
    blocks_ZQL = rows.at[first_Z[:, None] + place].get(mode="clip")
    blocks_ZQL = jnp.where((place < going_Z[:, None])[..., None], blocks_ZQL, 0)
    return lax.all_to_all(blocks_ZQL.reshape(-1, rows.shape[1]), axes, 0, 0, tiled=True)


def _back(trip: _Trip, i: Array, results: Array, out: Array) -> Array:
    """The way back of `_there`: out [M, L] with the rows of round i replaced."""
    quota = trip.quota
    returned = lax.all_to_all(results, mesh_axes("experts"), 0, 0, tiled=True)
    row = jnp.arange(out.shape[0])
    device = (row[:, None] >= jnp.cumsum(trip.run_Z)).sum(1)
    place = row - trip.start_Z[device] - i * quota
    here = (place >= 0) & (place < quota)
    return jnp.where(here[:, None], returned.at[device * quota + place].get(mode="clip"), out)


def _by_expert(trip: _Trip, i: Array, arrived: Array) -> tuple[Array, Array, Array]:
    """What arrived, sorted by expert: rows, the rows of each expert, and the row of each arrival."""
    coming_ZE = _coming(trip, i)
    place = jnp.arange(trip.quota)
    expert_ZQ = (place[None, :, None] >= jnp.cumsum(coming_ZE, axis=1)[:, None, :]).sum(2)  # E: nothing came
    experts = coming_ZE.shape[1]
    rows, sizes, row_map = permute(arrived, expert_ZQ.reshape(-1, 1), experts + 1)
    return rows, sizes[:experts], row_map[:, 0]


def _sorted_like(place: Array, arrived: Array) -> Array:
    return jnp.zeros_like(arrived).at[place].set(arrived, unique_indices=True)
