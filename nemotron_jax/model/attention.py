"""Block "*": causal grouped-query attention without positions, biases or norms (transformers, modeling_nemotron_h.py).

Shapes: B batch, T time, D model width, H query or key/value heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from nemotron_jax.config import ModelConfig
from nemotron_jax.model.context import Context
from nemotron_jax.model.linear import Linear, Scope
from nemotron_jax.model.state import KVCache, write_kv
from nemotron_jax.parallel.context import attention_over_parts, in_parts
from nemotron_jax.parallel.local import index, per_device
from nemotron_jax.parallel.mesh import shards
from pallas_kernels import attention, decode_attention


class Attention(nnx.Module):
    """Scale head_dim^-0.5; several query heads share one key/value head."""

    def __init__(self, scope: Scope, config: ModelConfig) -> None:
        a = config.attention
        d, std = config.hidden_size, config.init_std
        self.head_dim = a.head_dim
        self.q_proj = Linear(scope / "q_proj", d, a.num_heads * a.head_dim, ("embed", "heads"), std)
        self.k_proj = Linear(scope / "k_proj", d, a.num_kv_heads * a.head_dim, ("embed", "kv_heads"), std)
        self.v_proj = Linear(scope / "v_proj", d, a.num_kv_heads * a.head_dim, ("embed", "kv_heads"), std)
        self.o_proj = Linear(scope / "o_proj", a.num_heads * a.head_dim, d, ("heads", "embed"), config.output_init_std)

    def __call__(
        self, h_BTD: Array, ctx: Context, state: KVCache | None
    ) -> tuple[Array, KVCache | None, dict[str, Array]]:
        """h [B, T, D] -> (y [B, T, D], new cache, {}). With a cache, ctx.lengths says how much of it is filled."""
        batch, time = h_BTD.shape[:2]

        def heads(name: str) -> Array:
            return getattr(self, name)(h_BTD, *ctx.of(name)).reshape(batch, time, -1, self.head_dim)

        q_BTHP, k_BTHP, v_BTHP = heads("q_proj"), heads("k_proj"), heads("v_proj")
        if state is None:
            y_BTHP = _attend(q_BTHP, k_BTHP, v_BTHP, ctx.segment_ids)
        else:
            if ctx.lengths is None:
                raise ValueError("attention with a cache needs Context.lengths: the tokens that the cache holds.")
            table = ctx.page_table
            if table is None and ctx.slots is not None:
                table = ctx.slots[:, None]
            state = write_kv(state, k_BTHP, v_BTHP, ctx.lengths, table, ctx.real_tokens(time))
            y_BTHP = _attend_to_cache(q_BTHP, state, ctx.lengths, table)
        return self.o_proj(y_BTHP.reshape(batch, time, -1), *ctx.of("o_proj")), state, {}

    @staticmethod
    def init_state(config: ModelConfig, pages: int, page_size: int, dtype: jnp.dtype) -> KVCache:
        """An empty cache of ``pages`` pages of ``page_size`` tokens (contiguous: one page a row)."""
        shape = (pages, page_size, config.attention.num_kv_heads, config.attention.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @staticmethod
    def flops_per_token(config: ModelConfig, seq_len: int) -> float:
        """Forward FLOPs a token, projections excluded: q.k and p.v over half the sequence (causal)."""
        return 2 * 2 * (seq_len / 2) * config.attention.num_heads * config.attention.head_dim


def _attend(q_BTHP: Array, k_BTHP: Array, v_BTHP: Array, segment_ids: Array | None) -> Array:
    """Causal attention, each device with its rows, query heads and queries."""
    own_heads, whole = _heads_of_a_device(q_BTHP.shape[2], k_BTHP.shape[2])
    cut = in_parts(q_BTHP.shape[1])

    def attend(q_BTHP: Array, k_BTHP: Array, v_BTHP: Array, segment_ids: Array | None) -> Array:
        k_BTHP, v_BTHP = own_heads(k_BTHP), own_heads(v_BTHP)
        if cut:
            return attention_over_parts(q_BTHP, k_BTHP, v_BTHP, segment_ids)
        return attention(q_BTHP, k_BTHP, v_BTHP, segment_ids=segment_ids)

    q_axes, kv_axes = ("batch", "time", "heads", None), ("batch", "time", "kv_heads", None)
    run = per_device(attend, (q_axes, kv_axes, kv_axes, ("batch", "time")), q_axes, whole=whole)
    return run(q_BTHP, k_BTHP, v_BTHP, segment_ids)


def _attend_to_cache(q_BTHP: Array, cache: KVCache, lengths: Array, page_table: Array | None) -> Array:
    """The same over a cache, whose pages are cut by rows where each row has one page."""
    own_heads, whole = _heads_of_a_device(q_BTHP.shape[2], cache.k.shape[2])

    def attend(q_BTHP: Array, k: Array, v: Array, lengths: Array, page_table: Array | None) -> Array:
        return decode_attention(q_BTHP, own_heads(k), own_heads(v), lengths, page_table=page_table)

    q_axes = ("batch", None, "heads", None)
    cache_axes = ("batch" if page_table is None else None, None, "kv_heads", None)
    run = per_device(attend, (q_axes, cache_axes, cache_axes, ("batch",), ("batch", None)), q_axes, whole=whole)
    return run(q_BTHP, cache.k, cache.v, lengths, page_table)


def _heads_of_a_device(heads: int, kv_heads: int) -> tuple[Callable[[Array], Array], tuple[str, ...]]:
    """How a device takes its key/value heads from the part that it is given, and which logical axes stay whole.

    Where key/value heads are fewer than the devices of their axis, each device picks the one that its queries read.
    """
    parts = shards("heads")
    if heads % parts or (kv_heads % parts and parts % kv_heads):
        return lambda z: z, ("heads", "kv_heads")
    if kv_heads % parts == 0:
        return lambda z: z, ()
    return lambda z: lax.dynamic_slice_in_dim(z, index("heads") * kv_heads // parts, 1, axis=2), ()
