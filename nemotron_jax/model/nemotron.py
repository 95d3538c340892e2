"""The whole model: embeddings -> layers by pattern letter -> norm_f -> lm_head, and the MTP module.

``hidden`` returns hidden states; ``logits``, ``token_logprobs`` and ``weighted_nll`` are functions of them and the only
path from hidden states to probabilities. Attributes are named as in the Hugging Face checkpoint.

Shapes: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from nemotron_jax.config import ModelConfig
from nemotron_jax.model import logprobs
from nemotron_jax.model.attention import Attention
from nemotron_jax.model.context import Context
from nemotron_jax.model.layer import Layer, run_layers
from nemotron_jax.model.linear import Buffer, Embedding, RMSNorm, Scope, normal
from nemotron_jax.model.mamba2 import Mamba2
from nemotron_jax.model.mtp import MTP, shift_left
from nemotron_jax.model.state import DecodeState, MixerState, require_no_draft
from nemotron_jax.parallel.local import together
from nemotron_jax.parallel.stack import Stack, find_stack
from nemotron_jax.precision.recipe import RECIPES, Recipe


class Head(nnx.Module):
    """lm_head: weight [D, V], applied through logprobs.py so that its gradient is always summed in float32."""

    def __init__(self, scope: Scope, config: ModelConfig) -> None:
        self.weight = scope.param(
            "weight", (config.hidden_size, config.vocab_size), ("embed", "vocab"), normal(config.init_std)
        )


@dataclass(frozen=True)
class Output:
    """Result of calling the model: hidden states [B, T, D] after norm_f, the aux channel, logits on demand."""

    model: Nemotron
    hidden: Array
    aux: dict[str, Array]

    @property
    def logits(self) -> Array:
        """[B, T, V] float32."""
        return self.model.logits(self.hidden)


class Nemotron(nnx.Module):
    """A Nemotron 3 model. Weights are float32; the recipe says in what precision they are used."""

    def __init__(self, config: ModelConfig, recipe: Recipe, key: Array) -> None:
        """Initialised as Megatron-LM does (mamba_mixer.py); values depend on the key and on each path alone."""
        scope = Scope(key, recipe)
        self.config = config
        self.embeddings = Embedding(scope / "embeddings", config.vocab_size, config.hidden_size, config.init_std)
        self.layers = nnx.List(
            [Layer(scope / "layers" / index, letter, config) for index, letter in enumerate(config.pattern)]
        )
        self.stack: Stack | None = None  # see `stacked_graphdef`
        self.norm_f = RMSNorm(scope / "norm_f", config.hidden_size, config.norm_eps)
        self.lm_head = Head(scope / "lm_head", config)
        self.mtp = None if config.mtp is None else MTP(scope / "mtp", config, config.mtp)

    def __call__(self, tokens: Array, segment_ids: Array | None = None) -> Output:
        """tokens [B, T] int32; segment_ids [B, T] isolate packed documents from each other."""
        hidden_BTD, _, aux = self.hidden(tokens, Context(segment_ids=segment_ids))
        return Output(self, hidden_BTD, aux)

    def hidden(
        self, tokens: Array, ctx: Context, state: DecodeState | None = None, *, remat: str = "none"
    ) -> tuple[Array, DecodeState | None, dict[str, Array]]:
        """Hidden states after norm_f.

        Args:
          tokens: [B, T] int32.
          ctx: see Context; with a state, ``ctx.lengths`` is filled in from it.
          state: decode state; the tokens continue the rows that it holds.
          remat: "none" or "full" (nemotron_jax.model.layer.REMAT).

        Returns:
          hidden [B, T, D], the new state (None without one; a draft call leaves its lengths alone), and aux:
          ``layers/<i>/<name>`` of each block that reports something.
        """
        layer_states = None
        rows = slice(None) if ctx.slots is None else ctx.slots
        if state is not None:
            require_no_draft(state.layers)
            ctx = replace(ctx, lengths=state.lengths[rows])
            layer_states = state.layers
        h_BTD = self.embeddings(tokens)
        h_BTD, layer_states, aux = run_layers(self.layers, h_BTD, ctx, layer_states, remat=remat, stack=self.stack)
        if state is not None and layer_states is not None:
            new = 0 if ctx.draft else tokens.shape[1] if ctx.new_tokens is None else ctx.new_tokens
            state = DecodeState(state.lengths.at[rows].add(new), layer_states)
        return self.norm_f(h_BTD), state, aux

    def mtp_hidden(
        self, hidden_BTD: Array, tokens: Array, ctx: Context, *, remat: str = "none"
    ) -> tuple[list[Array], dict[str, Array]]:
        """Hidden states of each MTP depth k = 1..K for training: position t of depth k predicts token t + 1 + k.

        Inputs never cross a document: where token t + k is another document's (or past the row) the embedding is
        zero, and the position must carry no loss.

        Returns:
          K arrays [B, T, D], and aux ``mtp/layers/<i>/<name>`` summed over the depths.
        """
        if self.mtp is None or self.config.mtp is None:
            return [], {}
        depths: list[Array] = []
        total: dict[str, Array] = {}
        for depth in range(1, self.config.mtp.depth + 1):
            ahead_BT, inside_BT = shift_left(tokens, depth, ctx.segment_ids)
            embedded_BTD = jnp.where(inside_BT[..., None], self.embeddings(ahead_BT), 0)
            first_seed = len(self.config.pattern) + (depth - 1) * len(self.config.mtp.pattern)
            hidden_BTD, _, aux = self.mtp(embedded_BTD, hidden_BTD, ctx, remat=remat, first_seed=first_seed)
            depths.append(hidden_BTD)
            total = aux if not total else {name: total[name] + value for name, value in aux.items()}
        return depths, total

    def logits(self, hidden: Array) -> Array:
        """hidden [..., D] -> float32 logits [..., V]."""
        return logprobs.head_logits(hidden, self.lm_head.weight[...])

    def token_logprobs(self, hidden_BTD: Array, targets_BT: Array) -> Array:
        """log p(targets) [B, T] float32, never holding [B, T, V] (see logprobs.py)."""
        return logprobs.token_logprobs(hidden_BTD, self.lm_head.weight[...], targets_BT)

    def weighted_nll(self, hidden_BTD: Array, targets_BT: Array, weights_BT: Array) -> Array:
        """-sum of weights * token_logprobs, a scalar with a cheaper gradient (see logprobs.py)."""
        weight = self.lm_head.weight[...]
        if self.mtp is not None:
            # Each use makes a float32 gradient of the whole weight: it is cut before the layers below go backward.
            hidden_BTD, weight = together(hidden_BTD, weight)
        return logprobs.weighted_nll(hidden_BTD, weight, targets_BT, weights_BT)

    def init_state(
        self,
        rows: int,
        max_length: int,
        *,
        pages: int | None = None,
        page_size: int | None = None,
        mamba_dtype: str = "float32",
        kv_dtype: str | None = None,
    ) -> DecodeState:
        """An empty decode state for ``rows`` sequences of at most ``max_length`` tokens.

        Args:
          pages, page_size: of the key/value cache when Context.page_table will be used; None: one page of
            max_length tokens a row.
          mamba_dtype: of the stored Mamba states (the released models use float32).
          kv_dtype: of keys and values; None: that of the residual stream.
        """
        kv = jnp.dtype(kv_dtype or self.embeddings.dtype)

        def of(letter: str) -> MixerState:
            if letter == "M":
                return Mamba2.init_state(self.config, rows, jnp.dtype(mamba_dtype))
            if letter == "*":
                return Attention.init_state(self.config, pages or rows, page_size or max_length, kv)
            return None

        return DecodeState(jnp.zeros(rows, jnp.int32), tuple(of(letter) for letter in self.config.pattern))


def split_model(model: Nemotron) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph definition, parameters, buffers)."""
    graphdef, params, buffers = nnx.split(model, nnx.Param, Buffer)  # type: ignore[misc]
    return graphdef, params, buffers


def abstract(config: ModelConfig, recipe: Recipe) -> Nemotron:
    """The model with shapes in place of arrays: nothing is allocated, whatever the size."""
    return nnx.eval_shape(functools.partial(Nemotron, config, recipe, jax.random.key(0)))


def find_layer_stack(models: Sequence[Nemotron], same: Callable[[tuple[Any, ...]], Hashable]) -> Stack:
    """The stack of a model's layers.

    Args:
      models: the model in each of the recipes that a run takes it through.
      same: of the path of a parameter; layers in which it differs do not share a place.
    """
    kinds = []
    for number, layers in enumerate(zip(*(model.layers for model in models), strict=True)):
        graphdefs, states = zip(*map(nnx.split, layers), strict=True)
        paths = [("layers", number, *path) for path, _ in nnx.to_flat_state(states[0])]
        kinds.append((graphdefs, tuple(map(same, paths))))
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return find_stack([numbers[kind] for kind in kinds])


def stacked_graphdef(model: Nemotron, stack: Stack) -> nnx.GraphDef:
    """The graph definition of the model whose parameters and buffers are in the stacked view; ``model`` is used up."""
    model.layers = nnx.List([model.layers[int(numbers.flat[0])] for numbers in stack.members])
    model.stack = stack
    return split_model(model)[0]


def matmul_paths(config: ModelConfig) -> list[str]:
    """Paths of everything that a precision recipe has a say in: ``layers/0/mixer/in_proj``."""
    model = abstract(config, RECIPES["float32"])
    return ["/".join(map(str, path)) for path, module in nnx.iter_modules(model) if hasattr(module, "precision")]
