"""Block "-": a dense MLP with squared ReLU, without gate or bias (transformers, modeling_nemotron_h.py).

Shapes: B batch, T time, D model width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from nemotron_jax.config import ModelConfig
from nemotron_jax.model.context import Context
from nemotron_jax.model.linear import Linear, Scope


def relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


class FeedForward(nnx.Module):
    """down(relu(up(x))^2): the "-" block and the shared expert."""

    def __init__(self, scope: Scope, config: ModelConfig, size: int) -> None:
        d = config.hidden_size
        self.up_proj = Linear(scope / "up_proj", d, size, ("embed", "mlp"), config.init_std)
        self.down_proj = Linear(scope / "down_proj", size, d, ("mlp", "embed"), config.output_init_std)

    def __call__(self, x: Array, ctx: Context, prefix: str = "") -> Array:
        """``prefix``: of this module's path in its mixer."""
        hidden = relu2(self.up_proj(x, *ctx.of(f"{prefix}up_proj")))
        return self.down_proj(hidden, *ctx.of(f"{prefix}down_proj"))


class MLP(FeedForward):
    """FeedForward with the signature of a mixer."""

    def __init__(self, scope: Scope, config: ModelConfig) -> None:
        super().__init__(scope, config, config.intermediate_size)

    def __call__(self, h_BTD: Array, ctx: Context, state: None) -> tuple[Array, None, dict[str, Array]]:  # type: ignore[override]
        return super().__call__(h_BTD, ctx), None, {}

    @staticmethod
    def flops_per_token(config: ModelConfig, seq_len: int) -> float:
        """Nothing beside the projections."""
        return 0.0
