"""Multi-token prediction: one module, applied once a depth.

Source: Megatron-LM, core/transformer/multi_token_prediction.py.

    h^0 = hidden states after norm_f
    x   = eh_proj([enorm(embedding of token t+k) | hnorm(h^{k-1})])        embedding first
    h^k = final_layernorm(layers(x))                                       predicts token t+1+k through lm_head

Shapes: B batch, T time, D model width.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from nemotron_jax.config import ModelConfig, MTPConfig
from nemotron_jax.model.context import Context
from nemotron_jax.model.layer import Layer, run_layers
from nemotron_jax.model.linear import Linear, RMSNorm, Scope
from nemotron_jax.model.state import MixerState
from pallas_kernels.segments import run_ids


class MTP(nnx.Module):
    """The stored module. Embedding and head are the model's own."""

    def __init__(self, scope: Scope, config: ModelConfig, mtp: MTPConfig) -> None:
        d = config.hidden_size
        self.enorm = RMSNorm(scope / "enorm", d, config.norm_eps)
        self.hnorm = RMSNorm(scope / "hnorm", d, config.norm_eps)
        self.eh_proj = Linear(scope / "eh_proj", 2 * d, d, ("norm", "embed"), config.init_std)
        self.layers = nnx.List([Layer(scope / "layers" / i, letter, config) for i, letter in enumerate(mtp.pattern)])
        self.final_layernorm = RMSNorm(scope / "final_layernorm", d, config.norm_eps)

    def __call__(
        self,
        embedded_BTD: Array,
        h_BTD: Array,
        ctx: Context,
        states: tuple[MixerState, ...] | None = None,
        *,
        remat: str = "none",
        first_seed: int = 0,
    ) -> tuple[Array, tuple[MixerState, ...] | None, dict[str, Array]]:
        """One depth: embeddings of the tokens k ahead and h^{k-1} -> (h^k, new states, aux)."""
        x_BTD = jnp.concatenate([self.enorm(embedded_BTD), self.hnorm(h_BTD)], axis=-1)
        x_BTD = self.eh_proj(x_BTD, *ctx.for_layer(first_seed).of("eh_proj"))
        x_BTD, states, aux = run_layers(self.layers, x_BTD, ctx, states, remat=remat, first_seed=first_seed)
        return self.final_layernorm(x_BTD), states, {f"mtp/{name}": value for name, value in aux.items()}


def shift_left(values_BT: Array, by: int, segment_ids_BT: Array | None) -> tuple[Array, Array]:
    """values[t + by], zero where that token is past the row or in another document; and where it is inside, [B, T]."""
    time = values_BT.shape[1]
    by = min(by, time)

    def shift(rows_BT: Array, fill: int) -> Array:
        return jnp.pad(rows_BT[:, by:], ((0, 0), (0, by)), constant_values=fill)

    inside = jnp.broadcast_to(jnp.arange(time) < time - by, values_BT.shape)
    if segment_ids_BT is not None:
        run = run_ids(segment_ids_BT)
        inside &= shift(run, -1) == run
    return jnp.where(inside, shift(values_BT, 0), 0), inside
