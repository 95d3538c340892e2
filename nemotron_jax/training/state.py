"""TrainState: everything of a run that lives on the devices, as a pure pytree.

Nothing mutates: a step takes a state and returns the next one. The static side (graph definition, configs, which
parameters are trained) is in TrainSetup, closed over by the jitted functions.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from nemotron_jax.errors import ConfigError
from nemotron_jax.model.nemotron import (
    Nemotron,
    abstract,
    find_layer_stack,
    matmul_paths,
    split_model,
    stacked_graphdef,
)
from nemotron_jax.parallel import mesh as meshes
from nemotron_jax.parallel.stack import Stack, stack_arrays, stacked, unstack_to_host, unstacked
from nemotron_jax.precision.recipe import Recipe, recipe
from nemotron_jax.run_config import RunConfig
from nemotron_jax.training.optimizer import adamw


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class TrainState:
    """One point of a run.

    Attributes:
      step: int32, updates asked for so far (skipped ones included): the number of the next batch.
      params: nnx.State of nnx.Param leaves, float32; in the view of TrainSetup.stack.
      buffers: {"model": nnx.State of Buffer leaves (router correction biases), "seed": uint32}; likewise.
      opt_state: of the trained parameters only.
      skipped: int32 [2], steps skipped for a non-finite gradient: in all, and in a row up to now.
    """

    step: Array
    params: nnx.State
    buffers: dict[str, Any]
    opt_state: optax.OptState
    skipped: Array


@dataclass(frozen=True)
class TrainSetup:
    """The static side of a run: config, mesh, recipe, and what follows from them.

    ``before``: the setup of the run's part before this one, which has the same states.
    """

    config: RunConfig
    mesh: Mesh
    before: TrainSetup | None = None

    @cached_property
    def recipe(self) -> Recipe:
        precision = self.config.precision
        return recipe(precision.recipe, self.config.model, precision.exclude)

    @cached_property
    def phases(self) -> tuple[tuple[int, TrainSetup], ...]:
        """(first step, setup) of each part of the run: two where ``precision.switch_at`` asks for another recipe.

        They differ in their matmuls alone: a state of one is a state of the other.

        Raises:
          ConfigError: an unknown recipe, one that does not suit the model, a rule that matches nothing.
        """
        precision = self.config.precision
        phases: tuple[tuple[int, TrainSetup], ...] = ((1, self),)
        if precision.switch_at:
            _ = recipe(precision.switch_to, self.config.model, key="precision.switch_to")
            after = replace(precision, recipe=precision.switch_to, switch_at=0)
            then = replace(self, config=replace(self.config, precision=after), before=self)
            phases += ((precision.switch_at + 1, then),)
        for _, setup in phases:
            setup.recipe.table(matmul_paths(self.config.model))
            _ = setup._abstract
        return phases

    @cached_property
    def _abstract(self) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        return split_model(abstract(self.config.model, self.recipe))

    @cached_property
    def stack(self) -> Stack | None:
        """The view of the layers in which a TrainState is kept; None: the canonical list."""
        if self.before is not None or not self.config.parallel.stack_layers:
            return self.before.stack if self.before else None
        models = [abstract(self.config.model, setup.recipe) for _, setup in self.phases]
        return find_layer_stack(models, lambda path: self.trained(path, None))

    @cached_property
    def graphdef(self) -> nnx.GraphDef:
        """Of the model with the parameters and buffers of a TrainState."""
        if self.stack is None:
            return self._abstract[0]
        return stacked_graphdef(abstract(self.config.model, self.recipe), self.stack)

    def canonical_model(self, state: TrainState) -> Nemotron:
        """The model of a state with its layers as a list."""
        variables = state.params, state.buffers["model"]
        if self.stack is not None:
            canonical = jax.eval_shape(self._init_canonical)
            shardings = meshes.shardings((canonical.params, canonical.buffers["model"]), self.mesh)
            variables = jax.jit(partial(unstacked, self.stack), out_shardings=shardings)(variables)
        return nnx.merge(self._abstract[0], *variables)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return adamw(self.config.optimizer)

    @cached_property
    def trained(self) -> Callable[[tuple[Any, ...], Any], bool]:
        """nnx filter over canonical paths: does this parameter get a gradient and optimizer state?"""
        return trainable_filter(self.config.train.trainable, *self._abstract[1:])

    def split_params(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """(trained, frozen) of a TrainState's parameters."""

        def trained(path: tuple[Any, ...], leaf: Any) -> bool:
            return self.trained(path if self.stack is None else self.stack.canonical(path), leaf)

        wanted, rest = nnx.split_state(params, trained, ...)
        return wanted, rest

    def init_state(self) -> TrainState:
        """A new state, each leaf made on the devices that hold it: the model is never on one device as a whole."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self._init, out_shardings=self.state_shardings())()

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of a state."""
        return meshes.placed(self._shapes, self.state_shardings())

    def state_shardings(self) -> TrainState:
        return meshes.shardings(self._shapes, self.mesh)

    def abstract_checkpoint(self) -> TrainState:
        """Shapes, dtypes and shardings of what checkpoints hold, for restoring one: the canonical view of a state."""
        shapes = jax.eval_shape(self._init_canonical)
        return meshes.placed(shapes, meshes.shardings(shapes, self.mesh))

    def to_checkpoint(self, state: TrainState) -> TrainState:
        """The canonical view; what has to be cut for it lies in the memory of the hosts."""
        return state if self.stack is None else unstack_to_host(self.stack, state)

    def from_checkpoint(self, tree: Any) -> Any:
        """Arrays in the canonical view -> as a state keeps them; arrays that are joined for it are deleted."""
        return tree if self.stack is None else stack_arrays(self.stack, tree)

    @cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(self._init)

    def _init(self) -> TrainState:
        state = self._init_canonical()
        return state if self.stack is None else stacked(self.stack, state)

    def _init_canonical(self) -> TrainState:
        seed = self.config.train.seed
        model = Nemotron(self.config.model, self.recipe, jax.random.key(seed))
        _, params, buffers = split_model(model)
        trained, _ = nnx.split_state(params, self.trained, ...)
        return TrainState(
            step=jnp.int32(0),
            params=params,
            buffers={"model": buffers, "seed": jnp.uint32(seed)},
            opt_state=self.optimizer.init(trained),
            skipped=jnp.zeros(2, jnp.int32),
        )


def trainable_filter(rules: str, params: nnx.State, buffers: nnx.State) -> Callable[[tuple[Any, ...], Any], bool]:
    """Path rules in order, the last that matches wins: ``-*,+mtp/*`` trains the MTP module alone.

    Each rule is ``+`` (train) or ``-`` (freeze) and a glob over paths such as ``layers/1/mixer/gate/weight``;
    without rules everything is trained. The rules also say which router correction biases follow the load.

    Raises:
      ConfigError: a rule without its sign, one that matches no parameter, or nothing left to train.
    """
    trainable, paths = ({"/".join(map(str, path)) for path, _ in nnx.to_flat_state(tree)} for tree in (params, buffers))
    paths |= trainable
    parsed: list[tuple[bool, str]] = []
    for rule in filter(None, (part.strip() for part in rules.split(","))):
        if rule[0] not in "+-":
            raise ConfigError(f"train.trainable: the rule {rule!r} must start with + (train) or - (freeze).")
        if not fnmatch.filter(paths, rule[1:]):
            raise ConfigError(f"train.trainable: the rule {rule!r} matches no parameter, such as {min(paths)}.")
        parsed.append((rule[0] == "+", rule[1:]))

    def trained(path: tuple[Any, ...], _: Any) -> bool:
        name = "/".join(map(str, path))
        decisions = [train for train, pattern in parsed if fnmatch.fnmatchcase(name, pattern)]
        return decisions[-1] if decisions else True

    if not any(trained(tuple(path.split("/")), None) for path in trainable):
        raise ConfigError(f"train.trainable: {rules!r} leaves no parameter to train.")
    return trained
