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
from nemotron_jax.parallel.local import after, together
from nemotron_jax.parallel.mesh import constrain
from nemotron_jax.parallel.stack import Stack, as_stored, one_layer, scan_layers

BLOCKS: dict[str, Any] = {"M": Mamba2, "*": Attention, "E": MoE, "-": MLP}


class Layer(nnx.Module):
    """``h + mixer(norm(h))`` in the dtype of the residual stream (transformers, modeling_nemotron_h.py)."""

    def __init__(self, scope: Scope, letter: str, config: ModelConfig) -> None:
        self.norm = RMSNorm(scope / "norm", config.hidden_size, config.norm_eps)
        self.mixer = BLOCKS[letter](scope / "mixer", config)

    def __call__(self, h_BTD: Array, ctx: Context, state: MixerState) -> tuple[Array, MixerState, dict[str, Array]]:
        y_BTD, state, aux = self.mixer(self.norm(h_BTD), ctx, state)
        return constrain(h_BTD + y_BTD), state, aux


@functools.partial(jax.jit, static_argnames=("graphdef", "remat", "scanned"))
def _run_layer(
    graphdef: nnx.GraphDef,
    leaves: Any,
    h_BTD: Array,
    ctx: Context,
    state: MixerState,
    *,
    remat: str,
    scanned: bool = False,
) -> tuple[Array, MixerState, dict[str, Array]]:
    def apply(leaves: Any, h_BTD: Array, ctx: Context, state: MixerState) -> Any:
        if scanned and remat != "none":  # outside of a checkpoint, a copy of all layers' leaves would be kept
            leaves = as_stored(leaves)
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
    stack: Stack | None = None,
) -> tuple[Array, tuple[MixerState, ...] | None, dict[str, Array]]:
    """Runs layers in order. One jitted function serves all of them, so each kind of layer is traced once.

    Args:
      stack: ``layers`` are the places of this stack; only without states, which have one shape a layer.

    Returns the hidden states, the new states (None without states), and aux with keys ``layers/<i>/<name>``.
    """
    if stack is not None:
        assert states is None
        return _run_stack(layers, h_BTD, ctx, remat=remat, first_seed=first_seed, stack=stack)
    new_states: list[MixerState] = []
    aux: dict[str, Array] = {}
    split = [nnx.split(layer) for layer in layers]
    for index, (graphdef, leaves) in enumerate(split):
        for place, experts in ((index + 1, True), (index + 2, False)):
            if place < len(split):
                split[place] = (split[place][0], _gathered_after(h_BTD, split[place][1], experts))
        if index + 1 < len(split):  # while this layer goes backward, the gradients of the next one travel
            h_BTD, following = together(h_BTD, split[index + 1][1])
            split[index + 1] = (split[index + 1][0], following)
        state = None if states is None else states[index]
        h_BTD, state, layer_aux = _run_layer(
            graphdef, leaves, h_BTD, ctx.for_layer(first_seed + index), state, remat=remat
        )
        new_states.append(state)
        aux.update({f"layers/{index}/{name}": value for name, value in layer_aux.items()})
    return h_BTD, None if states is None else tuple(new_states), aux


def _gathered_after(h_BTD: Array, leaves: nnx.State, experts: bool) -> nnx.State:
    """The leaves, those of experts or the others of which no device gathers anything before ``h_BTD`` is there.

    XLA is told to start what it gathers early (parallel/xla.py): experts while the layer before them runs, the others,
    which are small, a layer earlier, so that they need not wait for those.
    """
    flat = list(nnx.to_flat_state(leaves))
    chosen = [("experts" in path) == experts for path, _ in flat]
    tied = iter(after(h_BTD, [leaf for (_, leaf), mine in zip(flat, chosen, strict=True) if mine]))
    return nnx.from_flat_state(
        [(path, next(tied) if mine else leaf) for (path, leaf), mine in zip(flat, chosen, strict=True)]
    )


def _run_stack(
    layers: nnx.List, h_BTD: Array, ctx: Context, *, remat: str, first_seed: int, stack: Stack
) -> tuple[Array, None, dict[str, Array]]:
    places = [nnx.split(layer) for layer in layers]

    def run(place: int, leaves: Any, number: Array, h_BTD: Array) -> tuple[Array, dict[str, Array]]:
        h_BTD, _, aux = _run_layer(
            places[place][0],
            one_layer(leaves),
            h_BTD,
            ctx.for_layer(first_seed + number),
            None,
            remat=remat,
            scanned=True,
        )
        return h_BTD, aux

    h_BTD, by_layer = scan_layers(stack, [leaves for _, leaves in places], h_BTD, run)
    aux = {f"layers/{index}/{name}": value for index, of_layer in by_layer.items() for name, value in of_layer.items()}
    return h_BTD, None, aux
