"""One layer: a norm, a mixer, the residual; and the registry of mixers by pattern letter.

A block gives its constructor ``(scope, config)``, ``__call__(h, ctx, state) -> (y, state, aux)`` and
``flops_per_token``; blocks that remember something between calls give ``init_state``. Contract tests run over BLOCKS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array

from nemotron_jax.config import ModelConfig
from nemotron_jax.model.attention import Attention
from nemotron_jax.model.context import Context
from nemotron_jax.model.linear import RMSNorm, Scope
from nemotron_jax.model.mamba2 import Mamba2
from nemotron_jax.model.mlp import MLP
from nemotron_jax.model.moe import MoE
from nemotron_jax.model.state import MixerState
from nemotron_jax.parallel.experts import KEPT
from nemotron_jax.parallel.mesh import constrain

BLOCKS: dict[str, Any] = {"M": Mamba2, "*": Attention, "E": MoE, "-": MLP}


class Layer(nnx.Module):
    """``h + mixer(norm(h))`` in the dtype of the residual stream (transformers, modeling_nemotron_h.py)."""

    def __init__(self, scope: Scope, letter: str, config: ModelConfig) -> None:
        self.norm = RMSNorm(scope / "norm", config.hidden_size, config.norm_eps)
        self.mixer = BLOCKS[letter](scope / "mixer", config)

    def __call__(self, h_BTD: Array, ctx: Context, state: MixerState) -> tuple[Array, MixerState, dict[str, Array]]:
        y_BTD, state, aux = self.mixer(self.norm(h_BTD), ctx, state)
        return constrain(h_BTD + y_BTD), state, aux


@functools.partial(jax.jit, static_argnames=("graphdef", "remat"))
def _run_layer(
    graphdef: nnx.GraphDef, leaves: Any, h_BTD: Array, ctx: Context, state: MixerState, *, remat: str
) -> tuple[Array, MixerState, dict[str, Array]]:
    def apply(leaves: Any, h_BTD: Array, ctx: Context, state: MixerState) -> Any:
        return nnx.merge(graphdef, leaves)(h_BTD, ctx, state)

    return REMAT[remat](apply)(leaves, h_BTD, ctx, state)


# What the backward pass finds of a layer's forward pass: everything, or the layer's input alone (and what experts on
# other devices sent back).
REMAT: dict[str, Callable[..., Any]] = {
    "none": lambda apply: apply,
    "full": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(KEPT)),
}


def run_layers(
    layers: nnx.List,
    h_BTD: Array,
    ctx: Context,
    states: tuple[MixerState, ...] | None,
    *,
    remat: str,
    first_seed: int = 0,
) -> tuple[Array, tuple[MixerState, ...] | None, dict[str, Array]]:
    """Runs layers in order. One jitted function serves all of them, so each kind of layer is traced once.

    Returns the hidden states, the new states (None without states), and aux with keys ``layers/<i>/<name>``.
    """
    new_states: list[MixerState] = []
    aux: dict[str, Array] = {}
    for index, layer in enumerate(layers):
        graphdef, leaves = nnx.split(layer)
        state = None if states is None else states[index]
        h_BTD, state, layer_aux = _run_layer(
            graphdef, leaves, h_BTD, ctx.for_layer(first_seed + index), state, remat=remat
        )
        new_states.append(state)
        aux.update({f"layers/{index}/{name}": value for name, value in layer_aux.items()})
    return h_BTD, None if states is None else tuple(new_states), aux
