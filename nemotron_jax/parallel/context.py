"""Sequences longer than a device: what one part of the time needs of the others. Inside `local.per_device`.

    convolution   the K - 1 inputs before the part, from the device before
    SSD           each part's own final state and decay, gathered; a device combines those before it
    attention     keys and values of all parts, gathered; gathered again in the backward pass, never kept

Documents cross the borders of parts as they cross those of chunks: two tokens are in the same one if no change of id
lies between them.

Shapes: B batch, T time of this part, S time of all parts, H heads, G groups, R heads of a group, P head dim, N state,
C channels, V key/value heads, Z parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from nemotron_jax.parallel.local import index
from nemotron_jax.parallel.mesh import mesh_axes, shards
from pallas_kernels import attention
from pallas_kernels.segments import run_ids


def conv_inputs_before(inputs: Sequence[Array], segment_ids: Array | None, taps: int) -> list[Array]:
    """The ``taps - 1`` inputs before this part; zeros where they are of another document than token 0.

    Args:
      inputs: each [B, T, C] with its own C; they travel as one message.

    Returns:
      of each input [B, K-1, C].

    Raises:
      ValueError: a part is shorter than taps - 1 tokens.
    """
    width = taps - 1
    if inputs[0].shape[1] < width:
        raise ValueError(f"a part of a sequence must hold at least {width} tokens, got {inputs[0].shape[1]}")
    borders = [sum(x_BTC.shape[2] for x_BTC in inputs[: i + 1]) for i in range(len(inputs) - 1)]
    before_BKC = _from_the_part_before(jnp.concatenate([x_BTC[:, -width:] for x_BTC in inputs], axis=-1))
    if segment_ids is not None:
        ids = jnp.concatenate([_from_the_part_before(segment_ids[:, -width:]), segment_ids[:, :1]], axis=1)
        run = run_ids(ids)
        before_BKC = jnp.where((run[:, :-1] == run[:, -1:])[..., None], before_BKC, 0)
    return jnp.split(before_BKC, borders, axis=-1)


def _from_the_part_before(x: Array) -> Array:
    """Zeros on the first device."""
    return lax.ppermute(x, mesh_axes("time"), [(i, i + 1) for i in range(shards("time") - 1)])


def state_before(x_BTHP: Array, dt_BTH: Array, A: Array, B_BTGN: Array, segment_ids: Array | None) -> Array:
    """The SSD state before this part [B, H, P, N] float32, of the document of token 0 (zeros where it begins there).

    One gather of [B, H, P, N] and a few numbers a head from each device, whatever the length. Arguments as of `ssd`.
    """
    run = None if segment_ids is None else run_ids(segment_ids)
    log_decay_BTH = dt_BTH * A
    total_BH = log_decay_BTH.sum(1)
    added_BHPN = _own_state(x_BTHP, dt_BTH, log_decay_BTH, B_BTGN, run)
    added_ZBHPN, total_ZBH = (lax.all_gather(z, mesh_axes("time")) for z in (added_BHPN, total_BH))

    here = index("time")
    earlier_Z = jnp.arange(shards("time")) < here
    reaches_ZB = earlier_Z[:, None]
    if run is not None:
        assert segment_ids is not None
        reaches_ZB = reaches_ZB & _same_document(segment_ids, run, earlier_Z)
    # The decay over the parts between: a sum taken from this part backwards, so that it is exact where it matters.
    passed_ZBH = jnp.where(earlier_Z[:, None, None], total_ZBH, 0)
    between_ZBH = lax.cumsum(passed_ZBH, axis=0, reverse=True) - passed_ZBH
    weight_ZBH = jnp.where(reaches_ZB[..., None], jnp.exp(between_ZBH), 0)
    return (weight_ZBH[..., None, None] * added_ZBHPN).sum(0)


def _own_state(x_BTHP: Array, dt_BTH: Array, log_decay_BTH: Array, B_BTGN: Array, run: Array | None) -> Array:
    """What this part adds to the state: sum_t exp(decay after t) dt_t x_t B_t^T over its last document."""
    batch, time, _, head_dim = x_BTHP.shape
    groups, state_dim = B_BTGN.shape[2:]
    after_BTH = lax.cumsum(log_decay_BTH, axis=1, reverse=True) - log_decay_BTH
    weight_BTH = jnp.exp(after_BTH) * dt_BTH
    if run is not None:
        weight_BTH = jnp.where((run == run[:, -1:])[..., None], weight_BTH, 0)
    weighted_BTGRP = (weight_BTH[..., None] * x_BTHP).astype(x_BTHP.dtype).reshape(batch, time, groups, -1, head_dim)
    precision = lax.Precision.HIGHEST if x_BTHP.dtype == jnp.float32 else lax.Precision.DEFAULT
    added = jnp.einsum(
        "btgrp,btgn->bgrpn", weighted_BTGRP, B_BTGN, precision=precision, preferred_element_type=jnp.float32
    )
    return added.reshape(batch, -1, head_dim, state_dim)


def _same_document(segment_ids: Array, run: Array, earlier_Z: Array) -> Array:
    """[Z, B] whether an earlier part ends in the document in which this one begins."""
    ends = jnp.stack([segment_ids[:, 0], segment_ids[:, -1], run[:, -1]])
    first_ZB, last_ZB, borders_ZB = jnp.moveaxis(lax.all_gather(ends, mesh_axes("time")), 1, 0)
    # A change of id between a part and the next counts as a border of the next.
    borders_ZB = borders_ZB + jnp.append(jnp.zeros_like(first_ZB[:1]), first_ZB[1:] != last_ZB[:-1], axis=0)
    entered_ZB = jnp.cumsum(borders_ZB, axis=0)  # the document in which each part ends, counted over the row
    own = entered_ZB[index("time")] - run[:, -1]
    return (entered_ZB == own) & earlier_Z[:, None]


def attention_over_parts(q_BTHP: Array, k_BTVP: Array, v_BTVP: Array, segment_ids: Array | None) -> Array:
    """Causal attention of this part's queries [B, T, H, P] to the keys and values of all tokens before them.

    The keys of all parts are put in an order in which this part comes last, which is what `attention` takes; those
    that come later in time come first then, and belong to no document.
    """

    def attend(q_BTHP: Array, k_BTVP: Array, v_BTVP: Array) -> Array:
        batch, time = q_BTHP.shape[:2]
        k_BSVP, v_BSVP = (_own_part_last(z) for z in (k_BTVP, v_BTVP))
        part_S = jnp.repeat(jnp.arange(shards("time")), time)
        later_S = _rolled(part_S[None], time) > index("time")
        if segment_ids is None:
            run_BS = jnp.zeros((batch, later_S.shape[1]), jnp.int32)
        else:
            all_ids = lax.all_gather(segment_ids, mesh_axes("time"), axis=1, tiled=True)
            run_BS = _rolled(run_ids(all_ids), time)
        run_BS = jnp.where(later_S, -1, run_BS)
        return attention(q_BTHP, k_BSVP, v_BSVP, segment_ids=run_BS[:, -time:], kv_segment_ids=run_BS)

    return jax.checkpoint(attend)(q_BTHP, k_BTVP, v_BTVP)


def _own_part_last(x_BTVP: Array) -> Array:
    return _rolled(lax.all_gather(x_BTVP, mesh_axes("time"), axis=1, tiled=True), x_BTVP.shape[1])


def _rolled(x_BS: Array, time: int) -> Array:
    return jnp.roll(x_BS, -(index("time") + 1) * time, axis=1)
