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
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nemotron_jax.parallel.local import index
from nemotron_jax.parallel.mesh import mesh_axes, shards
from pallas_kernels import attention, attention_cudnn, attention_cudnn_parts
from pallas_kernels.dispatch import choose
from pallas_kernels.segments import run_ids


def in_parts(time: int) -> bool:
    """Whether rows of ``time`` tokens are cut: each part then needs something of the others.

    Raises:
      ValueError: they should be, but cannot be cut into equal parts.
    """
    if time % shards("time"):
        raise ValueError(f"{time} tokens of a row do not divide over {shards('time')} devices")
    return shards("time") > 1


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

    The gathered keys and values are not kept for the backward pass, which gathers them again and sums their gradients
    over the parts, each device keeping its own.
    """
    unfit = attention_cudnn.unfit(
        q_BTHP, k_BTVP, v_BTVP, causal=True, packed=segment_ids is not None, own_key_segments=False
    )
    if choose("attention", unfit={"cudnn": unfit}) == "cudnn":
        return _attention_by_cudnn(q_BTHP, k_BTVP, v_BTVP, segment_ids)
    return jax.checkpoint(_attention_to_all_keys)(q_BTHP, k_BTVP, v_BTVP, segment_ids)


def _all_parts(x_BT: Array) -> Array:
    return lax.all_gather(x_BT, mesh_axes("time"), axis=1, tiled=True)


def _attention_to_all_keys(q_BTHP: Array, k_BTVP: Array, v_BTVP: Array, segment_ids: Array | None) -> Array:
    """The keys of all parts in an order in which this part comes last, which is what `attention` takes.

    Those that come later in time come first then, and belong to no document.
    """
    batch, time = q_BTHP.shape[:2]

    def own_last(x_BS: Array) -> Array:
        return jnp.roll(x_BS, -(index("time") + 1) * time, axis=1)

    k_BSVP, v_BSVP = (own_last(_all_parts(z)) for z in (k_BTVP, v_BTVP))
    later_S = own_last(jnp.repeat(jnp.arange(shards("time")), time)[None]) > index("time")
    if segment_ids is None:
        run_BS = jnp.zeros((batch, later_S.shape[1]), jnp.int32)
    else:
        run_BS = own_last(run_ids(_all_parts(segment_ids)))
    run_BS = jnp.where(later_S, -1, run_BS)
    return attention(q_BTHP, k_BSVP, v_BSVP, segment_ids=run_BS[:, -time:], kv_segment_ids=run_BS)


@jax.custom_vjp
def _attention_by_cudnn(q_BTHP: Array, k_BTVP: Array, v_BTVP: Array, segment_ids: Array | None) -> Array:
    return _cudnn_fwd(q_BTHP, k_BTVP, v_BTVP, segment_ids)[0]


_Pair = tuple[Array, Array]


def _cudnn_operands(
    q_BTHP: Array, k_BTVP: Array, v_BTVP: Array, segment_ids: Array | None
) -> tuple[float, Array, _Pair, _Pair, Array | None, attention_cudnn_parts.Reach]:
    """Of attention_cudnn_parts: scale, queries, own and all keys and values, documents, earlier keys that are seen."""
    batch, time, _, head_dim = q_BTHP.shape
    before = jnp.full(batch, index("time") * time, jnp.int32)
    if segment_ids is None:
        run, reach = None, attention_cudnn_parts.Reach(jnp.full_like(before, time), jnp.zeros_like(before), before)
    else:
        run, run_BS = run_ids(segment_ids), run_ids(_all_parts(segment_ids))
        first_run = jnp.take_along_axis(run_BS, before[:, None], axis=1)
        start = (run_BS < first_run).sum(1, dtype=jnp.int32)
        queries = (run == 0).sum(1, dtype=jnp.int32)
        reach = attention_cudnn_parts.Reach(queries, start, before - start)
    earlier = (_all_parts(k_BTVP), _all_parts(v_BTVP))
    return head_dim**-0.5, q_BTHP, (k_BTVP, v_BTVP), earlier, run, reach


def _cudnn_fwd(q_BTHP: Array, k_BTVP: Array, v_BTVP: Array, segment_ids: Array | None) -> tuple[Array, tuple[Any, ...]]:
    operands = q_BTHP, k_BTVP, v_BTVP, segment_ids
    results = attention_cudnn_parts.forward(*_cudnn_operands(*operands))
    return results[0], (operands, results)


def _cudnn_bwd(saved: tuple[Any, ...], dout_BTHP: Array) -> tuple[Array, Array, Array, None]:
    operands, results = saved
    dq_BTHP, d_own, d_all = attention_cudnn_parts.backward(*_cudnn_operands(*operands), results, dout_BTHP)

    def finished(own_BTVP: Array, all_BSVP: Array) -> Array:
        others = all_BSVP.astype(jnp.float32)
        summed = lax.psum_scatter(others, mesh_axes("time"), scatter_dimension=1, tiled=True)
        return (own_BTVP.astype(jnp.float32) + summed).astype(own_BTVP.dtype)

    return dq_BTHP, finished(d_own[0], d_all[0]), finished(d_own[1], d_all[1]), None


_attention_by_cudnn.defvjp(_cudnn_fwd, _cudnn_bwd)
