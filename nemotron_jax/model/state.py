"""Decode state: what each mixer remembers between calls, and how drafted tokens are accepted.

State is threaded through the calls, never mutated. The dtype of a stored state is chosen when it is made
(``init_state(dtype=...)``); arithmetic on it is float32.

A key/value cache forgets drafted tokens by its length alone. A Mamba state cannot be truncated, so a draft call
(``Context.draft``) leaves it untouched and returns the inputs of the drafted tokens beside it; ``select_accepted``
replays the accepted ones. One state plus a window of inputs costs far less than a state for each drafted token
("ReplaySSM", vLLM RFC 47572).

Shapes: B batch, T tokens of a call (of the draft), H heads, G groups, P head dim, N SSM state, S tokens of a page,
K convolution width, W convolution channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.causal_conv1d import final_state


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class MambaWindow:
    """Inputs of drafted tokens: enough to advance a Mamba state by any number of them without the weights.

    Attributes: conv_BTW before the convolution; x_BTHP, B_BTGN after it; dt_BTH and log_decay_BTH = dt * A.
    """

    conv_BTW: Array
    x_BTHP: Array
    B_BTGN: Array
    dt_BTH: Array
    log_decay_BTH: Array


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class MambaState:
    """conv_BKW [B, K-1, W]: the last inputs of the convolution. ssm_BHPN: the recurrent state."""

    conv_BKW: Array
    ssm_BHPN: Array
    window: MambaWindow | None = None


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class KVCache:
    """Pages of keys and values [pages, S, kv heads, head dim]; contiguous when each row has one page."""

    k: Array
    v: Array


MixerState = MambaState | KVCache | None


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class DecodeState:
    """State of the whole model: lengths [rows] int32 tokens each row holds, and one entry a layer."""

    lengths: Array
    layers: tuple[MixerState, ...]


def take_rows(state: MambaState, slots: Array | None) -> MambaState:
    """The rows of a state that serve this batch."""
    return state if slots is None else jax.tree.map(lambda leaf: leaf[slots], state)


def put_rows(state: MambaState, slots: Array | None, new: MambaState) -> MambaState:
    """A state with the rows of this batch replaced, in the dtypes that it was made with."""
    new = replace(
        new, conv_BKW=new.conv_BKW.astype(state.conv_BKW.dtype), ssm_BHPN=new.ssm_BHPN.astype(state.ssm_BHPN.dtype)
    )
    if slots is None:
        return new
    return jax.tree.map(lambda old, rows: old.at[slots].set(rows), state, new)


def write_kv(
    cache: KVCache, k_BTHD: Array, v_BTHD: Array, lengths: Array, page_table: Array | None, real: Array | None
) -> KVCache:
    """Writes the keys and values of new tokens at positions lengths[b] onwards.

    Args:
      cache: pages [pages, S, kv heads, head dim].
      k_BTHD, v_BTHD: of the new tokens.
      lengths: [B] int32.
      page_table: [B, n] int32, or None where row b owns page b.
      real: [B, T] bool, False on padding (nothing is written), or None.
    """
    batch, time = k_BTHD.shape[:2]
    page_size = cache.k.shape[1]
    table = jnp.arange(batch)[:, None] if page_table is None else page_table
    position = lengths[:, None] + jnp.arange(time)[None]
    number = position // page_size
    page = jnp.take_along_axis(table, jnp.minimum(number, table.shape[1] - 1), axis=1)
    written = number < table.shape[1] if real is None else real & (number < table.shape[1])
    page = jnp.where(written, page, cache.k.shape[0])  # out of range: dropped
    offset = position % page_size

    def write(pages: Array, new: Array) -> Array:
        return pages.at[page, offset].set(new.astype(pages.dtype), mode="drop")

    return KVCache(write(cache.k, k_BTHD), write(cache.v, v_BTHD))


def select_accepted(state: DecodeState, accepted: Array) -> DecodeState:
    """The state after the first ``accepted`` tokens of the last draft call, as if no more had been drafted.

    Args:
      state: returned by a call with ``Context.draft``.
      accepted: [rows] int32 in [0, T].
    """
    layers = tuple(
        _advance_mamba(layer, accepted) if isinstance(layer, MambaState) else layer for layer in state.layers
    )
    return DecodeState(state.lengths + accepted, layers)


def _advance_mamba(state: MambaState, accepted: Array) -> MambaState:
    window = state.window
    if window is None:
        raise ValueError("select_accepted: the state holds no drafted tokens; make the call with Context(draft=True).")
    taken = (jnp.arange(window.dt_BTH.shape[1])[None] < accepted[:, None])[..., None]
    log_decay_BTH = jnp.where(taken, window.log_decay_BTH, 0)
    dt_BTH = jnp.where(taken, window.dt_BTH, 0)
    passed_BTH = jnp.cumsum(log_decay_BTH, axis=1)
    total_BH = passed_BTH[:, -1]
    weight_BTH = jnp.exp(total_BH[:, None] - passed_BTH) * dt_BTH
    B_BTHN = jnp.repeat(window.B_BTGN, dt_BTH.shape[2] // window.B_BTGN.shape[2], axis=2)
    added_BHPN = jnp.einsum(
        "bth,bthp,bthn->bhpn",
        weight_BTH,
        window.x_BTHP.astype(jnp.float32),
        B_BTHN.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    ssm_BHPN = jnp.exp(total_BH)[..., None, None] * state.ssm_BHPN.astype(jnp.float32) + added_BHPN
    conv_BKW = final_state(window.conv_BTW, state.conv_BKW, accepted, state.conv_BKW.shape[1] + 1)
    return MambaState(conv_BKW, ssm_BHPN.astype(state.ssm_BHPN.dtype))


def require_no_draft(layers: Sequence[MixerState]) -> None:
    """Raises ValueError when drafted tokens wait for ``select_accepted``."""
    if any(isinstance(layer, MambaState) and layer.window is not None for layer in layers):
        raise ValueError("the decode state holds drafted tokens: call select_accepted before going on.")
