"""Block "E": sigmoid-routed experts with a shared expert, optionally in a latent space.

Sources: transformers, modeling_nemotron_h.py; Megatron-LM, core/transformer/moe/; Nemotron 3 Super report, 2.1.1.

    s = sigmoid(gate(h)) in float32;  chosen = top-k of s + correction bias;  w = s[chosen] / (sum + 1e-20) * factor
    u = fc1_latent_proj(h);  y = sum_k w_k down_k(relu(up_k(u))^2);  out = fc2_latent_proj(y) + shared_experts(h)

Router and shared expert see the full width; without latent projections u = h and out = y + shared.

Shapes: B batch, T time, D model width, L latent (or model) width, F expert width, E experts, K top-k.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from nemotron_jax.config import ModelConfig, MoEConfig
from nemotron_jax.model.context import Context, mix_seed
from nemotron_jax.model.linear import Buffer, Linear, Scope, normal
from nemotron_jax.model.mlp import FeedForward
from nemotron_jax.parallel.experts import Draw, others_with_rows, routed
from nemotron_jax.parallel.local import per_device
from nemotron_jax.parallel.mesh import mesh_axes
from nemotron_jax.precision.float32 import float32_matmul
from nemotron_jax.precision.matmul import expert_matmul
from nemotron_jax.precision.recipe import Cut, Precision
from pallas_kernels import grouped_mlp
from pallas_kernels.packed import Packed


class Router(nnx.Module):
    """Float32 throughout. The correction bias takes part in the choice of experts, never in their weights."""

    def __init__(self, scope: Scope, config: ModelConfig) -> None:
        moe = config.moe
        self.config = moe
        self.weight = scope.param(
            "weight", (config.hidden_size, moe.num_experts), ("embed", "norm"), normal(config.init_std)
        )
        self.e_score_correction_bias = Buffer(jnp.zeros(moe.num_experts, jnp.float32), axes=("norm",))

    def __call__(self, h_BTD: Array) -> tuple[Array, Array, Array]:
        """h -> (scores [B, T, E] float32, chosen experts [B, T, K] int32, their weights [B, T, K] float32)."""
        scores_BTE = jax.nn.sigmoid(float32_matmul(h_BTD, self.weight[...]))
        run = per_device(functools.partial(_choose, self.config), (_TOKENS, (None,)), (_TOKENS, _TOKENS))
        return scores_BTE, *run(scores_BTE, self.e_score_correction_bias[...])


_TOKENS = ("batch", "time", None)


def _choose(moe: MoEConfig, scores_BTE: Array, bias: Array) -> tuple[Array, Array]:
    """Chosen experts and their weights."""
    choice_BTE = lax.stop_gradient(scores_BTE) + bias
    if moe.num_groups > 1:
        choice_BTE = _only_best_groups(choice_BTE, moe)
    experts_BTK = lax.top_k(choice_BTE, moe.top_k)[1]
    # The experts of a token differ, so the gradient needs no atomics; they have to be told.
    batch, time, _ = jnp.ogrid[tuple(map(slice, experts_BTK.shape))]
    weights_BTK = scores_BTE.at[batch, time, experts_BTK].get(unique_indices=True, mode="promise_in_bounds")
    if moe.normalize_weights:
        weights_BTK = weights_BTK / (weights_BTK.sum(-1, keepdims=True) + 1e-20)
    return experts_BTK, weights_BTK * moe.scaling_factor


def _only_best_groups(choice_BTE: Array, moe: MoEConfig) -> Array:
    """Minus infinity outside of the groups whose two best experts score highest."""
    grouped = choice_BTE.reshape(*choice_BTE.shape[:-1], moe.num_groups, -1)
    score = lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
    best = lax.top_k(score, moe.top_k_groups)[1]
    allowed = (best[..., None] == jnp.arange(moe.num_groups)).any(-2)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice_BTE.shape)


class Experts(nnx.Module):
    """All routed experts, stacked: up_proj [E, L, F], down_proj [E, F, L]."""

    def __init__(self, scope: Scope, config: ModelConfig) -> None:
        moe = config.moe
        width = moe.latent_size or config.hidden_size
        axis = "latent" if moe.latent_size else "embed"
        self.up_proj = scope.param(
            "up_proj",
            (moe.num_experts, width, moe.intermediate_size),
            ("expert_weights", axis, "expert_mlp"),
            normal(config.init_std),
        )
        self.down_proj = scope.param(
            "down_proj",
            (moe.num_experts, moe.intermediate_size, width),
            ("expert_weights", "expert_mlp", axis),
            normal(config.output_init_std),
        )
        self.precision = scope.precision(width, moe.intermediate_size)
        self.num_experts = moe.num_experts
        self.width = moe.intermediate_size

    def __call__(self, u_BTL: Array, experts_BTK: Array, weights_BTK: Array, ctx: Context) -> Array:
        """sum_k weights[k] down(relu(up(u))^2) of the chosen experts: [B, T, L], [B, T, K] twice -> [B, T, L]."""
        params = (self.up_proj, self.down_proj)
        weights: tuple[Array | Packed, ...] = tuple(w[...] for w in params)
        axes = tuple(w.axes for w in params)
        up_probe, down_probe = (ctx.of(f"experts/{name}")[1] for name in ("up_proj", "down_proj"))
        if up_probe is not None and down_probe is not None:  # their gradients are summed as those of weights are
            weights, axes = (*weights, up_probe, down_probe), (*axes, (None, None), (None, None))
        dtype = jnp.dtype(self.precision.operands)
        if self.precision.format:  # masters are rounded once; packed weights have no dtype and are not cast
            dtype = getattr(weights[0], "dtype", dtype)
        return routed(
            functools.partial(_apply, self.precision, self.num_experts, self.width),
            u_BTL,
            experts_BTK,
            weights_BTK,
            weights,
            axes,
            self.num_experts,
            dtype,
            # Experts that draw no random bits need not know which token a row is.
            ctx.of("experts")[0] if self.precision.draws else None,
        )


def _apply(
    precision: Precision,
    num_experts: int,
    width: int,
    params: Any,
    rows: Array,
    group_sizes: Array,
    draw: Draw | None,
) -> Array:
    """Rows [M, L] sorted by expert, group_sizes [E] -> [M, L] in the dtype of the rows.

    ``num_experts`` and ``width`` are those of all devices, which may have parts of both.
    """
    up_ELF, down_EFL, *probes = params
    if not precision.format and not any(isinstance(w, Packed) for w in params):
        dtype = jnp.dtype(precision.operands)
        mlp = grouped_mlp(rows.astype(dtype), up_ELF.astype(dtype), down_EFL.astype(dtype), group_sizes)
        return mlp.astype(rows.dtype)
    up_probe, down_probe = probes or (None, None)
    seeds: tuple[Array | None, ...] = (None, None)
    entry_M = None
    if draw is not None:
        seeds, entry_M = (draw.seed, mix_seed(draw.seed, 1)), draw.entry_M
    here, _, part = up_ELF.shape
    others, cut = others_with_rows(here, num_experts), mesh_axes("expert_mlp") if part < width else ()
    of_up, of_down = (replace(precision, cut=to) for to in (Cut(others, outputs=cut), Cut(others, inputs=cut)))
    hidden = expert_matmul(rows, up_ELF, group_sizes, of_up, seeds[0], entry_M, up_probe, activation="relu2")
    return expert_matmul(hidden, down_EFL, group_sizes, of_down, seeds[1], entry_M, down_probe).astype(rows.dtype)


class MoE(nnx.Module):
    """See the top of the file."""

    def __init__(self, scope: Scope, config: ModelConfig) -> None:
        moe = config.moe
        self.config = moe
        self.gate = Router(scope / "gate", config)
        self.experts = Experts(scope / "experts", config)
        self.shared_experts = FeedForward(scope / "shared_experts", config, moe.shared_intermediate_size)
        if moe.latent_size:
            self.fc1_latent_proj = Linear(
                scope / "fc1_latent_proj", config.hidden_size, moe.latent_size, ("embed", "norm"), config.init_std
            )
            self.fc2_latent_proj = Linear(
                scope / "fc2_latent_proj",
                moe.latent_size,
                config.hidden_size,
                ("norm", "embed"),
                config.output_init_std,
            )

    def __call__(self, h_BTD: Array, ctx: Context, state: None) -> tuple[Array, None, dict[str, Array]]:
        """h [B, T, D] -> (y [B, T, D], None, aux).

        aux: expert_counts [E] float32, the tokens that chose each expert; load_balance_loss, a scalar near 1 when
        balanced (Megatron-LM's seq_aux_loss, moe_utils.py). Padding counts in neither.
        """
        batch, time = h_BTD.shape[:2]
        scores_BTE, experts_BTK, weights_BTK = self.gate(h_BTD)
        u_BTL = self.fc1_latent_proj(h_BTD, *ctx.of("fc1_latent_proj")) if self.config.latent_size else h_BTD
        y_BTL = self.experts(u_BTL, experts_BTK, weights_BTK, ctx)
        y_BTD = self.fc2_latent_proj(y_BTL, *ctx.of("fc2_latent_proj")) if self.config.latent_size else y_BTL
        y_BTD = y_BTD + self.shared_experts(h_BTD, ctx, "shared_experts/")

        statistics = per_device(
            functools.partial(_statistics, self.config),
            (_TOKENS, _TOKENS, ("batch", "time")),
            (("time", "batch", None), ("time", "batch", None)),
        )
        counted_BT = ctx.counted_tokens(batch, time)
        counts_BE, unbiased_BE = (z.sum(0) for z in statistics(scores_BTE, experts_BTK, counted_BT))
        aux = {
            "expert_counts": counts_BE.sum(0),
            "load_balance_loss": _load_balance_loss(scores_BTE, unbiased_BE, counted_BT, self.config),
        }
        return y_BTD, None, aux

    @staticmethod
    def flops_per_token(config: ModelConfig, seq_len: int) -> float:
        """Nothing beside the matmuls of the active parameters."""
        return 0.0


def _counts(experts_BTK: Array, counted_BT: Array, num_experts: int) -> Array:
    """[B, E] float32: how many counted tokens of each row chose each expert."""
    rows = jnp.arange(experts_BTK.shape[0])[:, None, None]
    ones = jnp.broadcast_to(counted_BT[..., None], experts_BTK.shape).astype(jnp.int32)
    counts = jnp.zeros((experts_BTK.shape[0], num_experts), jnp.int32).at[rows, experts_BTK].add(ones)
    return counts.astype(jnp.float32)


def _statistics(moe: MoEConfig, scores_BTE: Array, experts_BTK: Array, counted_BT: Array) -> tuple[Array, Array]:
    """[1, B, E] counts of the chosen experts, and of the top-k of the scores without the correction bias."""
    unbiased_BTK = lax.top_k(lax.stop_gradient(scores_BTE), moe.top_k)[1]
    counts_BE, unbiased_BE = (_counts(chosen, counted_BT, moe.num_experts) for chosen in (experts_BTK, unbiased_BTK))
    return counts_BE[None], unbiased_BE[None]


def _load_balance_loss(scores_BTE: Array, counts_BE: Array, counted_BT: Array, moe: MoEConfig) -> Array:
    """mean over sequences of E / (k T^2) sum_i (sum_t p_ti) count_i.

    p: scores normalised over the experts; counts: of the top-k of the scores without the correction bias; T: the
    tokens of the sequence that are not padding.
    """
    p_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)
    p_BE = jnp.where(counted_BT[..., None], p_BTE, 0).sum(1)
    tokens_B = jnp.maximum(counted_BT.sum(1), 1).astype(jnp.float32)
    per_sequence = moe.num_experts / moe.top_k * (p_BE * counts_BE).sum(-1) / tokens_B**2
    return per_sequence.mean()
