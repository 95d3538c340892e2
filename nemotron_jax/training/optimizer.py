"""AdamW and its schedule (Nemotron 3 Nano, Super and Ultra reports, section 2.4 each)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from nemotron_jax.run_config import OptimizerConfig

# Weight decay pulls a weight towards zero. That regularises matrices, but for these it pulls towards a value that
# means something else: norm weights towards a dead layer, A_log towards A = -1, dt_bias towards dt = 0.7 (a hundred
# times the initial one), D towards cutting the skip; and biases have too few elements to overfit.
NOT_DECAYED = ("bias", "A_log", "D", "dt_bias")


def decays(path: tuple[Any, ...]) -> bool:
    """Whether weight decay applies to the parameter at a path such as (layers, 0, mixer, norm, weight)."""
    return not any(name in NOT_DECAYED or "norm" in str(name) for name in path)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay. Multiply its updates by minus the learning rate."""

    def mask(params: nnx.State) -> nnx.State:
        flat = [
            (path, jax.tree.map(lambda _, path=path: decays(path), leaf)) for path, leaf in nnx.to_flat_state(params)
        ]
        return nnx.from_flat_state(flat)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask),
    )


def learning_rate(config: OptimizerConfig, steps: int, step: Array) -> Array:
    """Warm-up, stable, decay (WSD) with a minus-sqrt decay that ends with the run.

    lr = peak * (step + 1) / warmup, then peak, and over the last ``decay_steps`` steps
    peak - (peak - min) * sqrt(fraction of the decay that is over); the last step runs at min_lr.
    A run shorter than its warm-up clips it; the decay is counted back from the end and never reaches into the warm-up.
    """
    warmup = min(config.warmup_steps, steps)
    decay = min(config.decay_steps, steps - warmup)
    warm = (step + 1) / max(warmup, 1)
    decayed = jnp.clip((step + 1 - (steps - decay)) / max(decay, 1), 0, 1)
    stable = config.peak_lr - (config.peak_lr - config.min_lr) * jnp.sqrt(decayed)
    return jnp.where(step < warmup, config.peak_lr * warm, stable)
