"""The training loss: next token, multi-token prediction, load balance.

    loss = sum w nll / sum w  +  factor/K sum_k (sum w_k nll_k / sum w_k)  +  coefficient sum_layers load_balance

Weights are those of the batch; w_k of depth k are the weights k tokens ahead, zero across a document border. Sums run
over the whole global batch, so a microbatch is given its denominators.

Shapes: B batch, T time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from nemotron_jax.config import ModelConfig
from nemotron_jax.data.batch import Batch
from nemotron_jax.model.context import Context
from nemotron_jax.model.mtp import shift_left
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.run_config import TrainConfig


def depth_weights(batch: Batch, depths: int) -> list[Array]:
    """Loss weights [B, T] of the main head (depth 0) and of each MTP depth."""
    weights = [batch.loss_weights]
    for depth in range(1, depths + 1):
        weights.append(shift_left(batch.loss_weights, depth, batch.segment_ids)[0])
    return weights


def totals(batch: Batch, config: ModelConfig) -> Array:
    """[1 + K] float32: the sum of loss weights of each depth over a whole batch, at least 1e-9."""
    depths = config.mtp.depth if config.mtp else 0
    return jnp.maximum(jnp.stack([weights.sum() for weights in depth_weights(batch, depths)]), 1e-9)


def loss_fn(
    model: Nemotron,
    batch: Batch,
    seed: Array,
    total_weights: Array,
    share: float,
    train: TrainConfig,
    probes: dict[str, Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Loss of one microbatch as its part of the global batch's loss.

    Args:
      batch: the microbatch.
      seed: uint32 of this (step, microbatch).
      total_weights: ``totals`` of the global batch.
      share: the microbatch's part of the sequences of the global batch.
      probes: of Context.

    Returns:
      the loss (a scalar that sums over the microbatches to the loss), and metrics that sum in the same way:
      loss, mtp_loss_<k>, load_balance_loss (mean over the main layers) and <layer>/expert_counts.
    """
    config = model.config
    ctx = Context(segment_ids=batch.segment_ids, positions=batch.positions, seed=seed, probes=probes)
    hidden_BTD, _, aux = model.hidden(batch.tokens, ctx, remat=train.remat)
    depths, mtp_aux = model.mtp_hidden(hidden_BTD, batch.tokens, ctx, remat=train.remat)
    weights = depth_weights(batch, len(depths))

    nll = model.weighted_nll(hidden_BTD, batch.targets, weights[0] / total_weights[0])
    metrics = {"loss": nll}
    loss = nll
    for k, hidden_k_BTD in enumerate(depths, start=1):
        targets_BT, _ = shift_left(batch.targets, k, batch.segment_ids)
        nll = model.weighted_nll(hidden_k_BTD, targets_BT, weights[k] / total_weights[k])
        metrics[f"mtp_loss_{k}"] = nll
        assert config.mtp is not None
        loss += config.mtp.loss_factor / len(depths) * nll

    balance = [value for name, value in aux.items() if name.endswith("load_balance_loss")]
    if balance:
        metrics["load_balance_loss"] = share * sum(balance, start=jnp.float32(0)) / len(balance)
    aux |= mtp_aux
    balance = [value for name, value in aux.items() if name.endswith("load_balance_loss")]
    loss += train.load_balance_coefficient * share * sum(balance, start=jnp.float32(0))
    metrics.update({name: value for name, value in aux.items() if name.endswith("expert_counts")})
    return loss, metrics


def microbatches(batch: Batch, count: int) -> Batch:
    """[B, T] -> [count, B / count, T]: microbatch i takes every count-th row, so that sharded rows stay in place."""

    def split(rows: Array) -> Array:
        return jnp.moveaxis(rows.reshape(rows.shape[0] // count, count, *rows.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)
