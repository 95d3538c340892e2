"""Block "*": causal grouped-query attention without positions, biases or norms (transformers, modeling_nemotron_h.py).

Shapes: B batch, T time, D model width, H query or key/value heads, P head dim.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from nemotron_jax.config import ModelConfig
from nemotron_jax.model.context import Context
from nemotron_jax.model.linear import Linear, Scope
from nemotron_jax.model.state import KVCache, write_kv
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

        def heads(projection: Linear) -> Array:
            return projection(h_BTD, ctx.seed).reshape(batch, time, -1, self.head_dim)

        q_BTHP, k_BTHP, v_BTHP = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        if state is None:
            y_BTHP = attention(q_BTHP, k_BTHP, v_BTHP, segment_ids=ctx.segment_ids)
        else:
            if ctx.lengths is None:
                raise ValueError("attention with a cache needs Context.lengths: the tokens that the cache holds.")
            table = ctx.page_table
            if table is None and ctx.slots is not None:
                table = ctx.slots[:, None]
            state = write_kv(state, k_BTHP, v_BTHP, ctx.lengths, table, ctx.real_tokens(time))
            y_BTHP = decode_attention(q_BTHP, state.k, state.v, ctx.lengths, page_table=table)
        return self.o_proj(y_BTHP.reshape(batch, time, -1), ctx.seed), state, {}

    @staticmethod
    def init_state(config: ModelConfig, pages: int, page_size: int, dtype: jnp.dtype) -> KVCache:
        """An empty cache of ``pages`` pages of ``page_size`` tokens (contiguous: one page a row)."""
        shape = (pages, page_size, config.attention.num_kv_heads, config.attention.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @staticmethod
    def flops_per_token(config: ModelConfig, seq_len: int) -> float:
        """Forward FLOPs a token, projections excluded: q.k and p.v over half the sequence (causal)."""
        return 2 * 2 * (seq_len / 2) * config.attention.num_heads * config.attention.head_dim
