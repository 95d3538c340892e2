"""One update: ``state, metrics = train_step(state, batch)``; and the validation step.

Gradients of all microbatches are summed in float32 before one optimizer update. A step whose loss or gradient is not
finite changes nothing but the step number and the count of skipped steps.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax

from nemotron_jax.data.batch import Batch
from nemotron_jax.model.context import Context, mix_seed
from nemotron_jax.parallel import mesh as meshes
from nemotron_jax.parallel.stack import stacked, unstacked
from nemotron_jax.parallel.xla import compiler_options
from nemotron_jax.run_config import RunConfig
from nemotron_jax.training.losses import loss_fn, microbatches, totals
from nemotron_jax.training.optimizer import learning_rate
from nemotron_jax.training.state import TrainSetup, TrainState
from nemotron_jax.training.statistics import new_probes, operand_statistics, zero_gradients

Metrics = dict[str, Array]


class TrainSteps:
    """The updates of the steps that are logged, and of all others, which leave statistics out.

    Under a quantised recipe these are two programs, whose results may differ in the last bits: counting takes passes
    over all operands, and for a condition within one program a GPU waits, at each matmul.
    """

    def __init__(self, setup: TrainSetup) -> None:
        self._config = setup.config
        self._programs: dict[bool, Any] = {True: make_train_step(setup)}
        if setup.config.log.every > 1 and new_probes(setup.recipe, setup.config.model):
            self._programs[False] = make_train_step(setup, statistics=False)
        self._compiled = len(self._programs) == 1  # at the first call

    def __call__(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """``step``: the number of the update, from 1. It donates the state."""
        if not self._compiled:  # side by side; tracing does not gain by that
            lowered = {logged: program.lower(state, batch) for logged, program in self._programs.items()}
            with ThreadPoolExecutor(len(lowered)) as pool:
                compiled = pool.map(lambda each: each.compile(), lowered.values())
                self._programs = dict(zip(lowered, compiled, strict=True))
            self._compiled = True
        return self._programs[is_logged(step, self._config) or len(self._programs) == 1](state, batch)


def is_logged(step: int, config: RunConfig) -> bool:
    """Whether the metrics of a step are written down."""
    return step % config.log.every == 0 or step in (1, config.train.steps)


def make_train_step(
    setup: TrainSetup, *, statistics: bool = True
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted update. It donates the state that it is given.

    Metrics (float32 scalars unless said): loss, mtp_loss_<k>, load_balance_loss, grad_norm (before clipping),
    learning_rate, skipped_steps and skipped_in_a_row (int32), max_vio (the largest expert load over the mean, of all
    MoE layers), expert_load [MoE layers, 2] (smallest and largest load over the mean); with ``statistics`` those of
    training/statistics.py, under a quantised recipe or where ``log.zero_gradients`` asks for them.
    """
    shardings = setup.state_shardings()
    return jax.jit(
        lambda state, batch: _train_step(setup, state, batch, statistics),
        in_shardings=(shardings, meshes.batch_sharding(setup.mesh)),
        out_shardings=(shardings, meshes.replicated(setup.mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(setup.mesh),
    )


def _train_step(setup: TrainSetup, state: TrainState, batch: Batch, statistics: bool) -> tuple[TrainState, Metrics]:
    config = setup.config
    step_seed = mix_seed(state.buffers["seed"], state.step)
    trained, frozen = setup.split_params(state.params)
    probes = new_probes(setup.recipe, config.model) if statistics else {}
    (grads, counts_of_probes), metrics = _gradients(
        setup, trained, frozen, probes, state.buffers["model"], batch, step_seed
    )

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
    rate = learning_rate(config.optimizer, config.train.steps, state.step)
    updates, opt_state = setup.optimizer.update(grads, state.opt_state, trained)
    new_trained = jax.tree.map(lambda w, u: w - rate * u, trained, updates)
    counts = {name: value for name, value in metrics.items() if name.endswith("expert_counts")}
    new_buffers = _update_router_biases(setup, state.buffers["model"], counts)

    def if_finite(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    skipped = jnp.stack([state.skipped[0] + ~finite, jnp.where(finite, 0, state.skipped[1] + 1)])
    new_state = TrainState(
        step=state.step + 1,
        params=nnx.merge_state(if_finite(new_trained, trained), frozen),
        buffers={"model": if_finite(new_buffers, state.buffers["model"]), "seed": state.buffers["seed"]},
        opt_state=if_finite(opt_state, state.opt_state),
        skipped=skipped,
    )
    shown = {name: value for name, value in metrics.items() if name not in counts}
    shown |= {"grad_norm": grad_norm, "learning_rate": rate}
    shown |= {"skipped_steps": skipped[0], "skipped_in_a_row": skipped[1]}
    if statistics and (counts_of_probes or config.log.zero_gradients):
        shown |= operand_statistics(counts_of_probes) | zero_gradients(grads, config.model, setup.stack)
    return new_state, shown | _expert_load(counts)


def _gradients(
    setup: TrainSetup,
    trained: nnx.State,
    frozen: nnx.State,
    probes: dict[str, Array],
    buffers: nnx.State,
    batch: Batch,
    seed: Array,
) -> tuple[tuple[nnx.State, dict[str, Array]], Metrics]:
    """Gradients of the global batch's loss (and of probes) and its metrics, summed over the microbatches in float32."""
    train = setup.config.train
    total_weights = totals(batch, setup.config.model)

    def of(inputs: tuple[nnx.State, dict[str, Array]], part: Batch, seed: Array) -> tuple[Array, Metrics]:
        trained, probes = inputs
        model = nnx.merge(setup.graphdef, trained, frozen, buffers)
        return loss_fn(model, part, seed, total_weights, 1 / train.microbatches, train, probes or None)

    inputs = (trained, probes)
    grad = jax.grad(of, has_aux=True)
    if train.microbatches == 1:
        return grad(inputs, batch, mix_seed(seed, 0))

    def one(sums: Any, numbered: tuple[Array, Batch]) -> tuple[Any, None]:
        number, part = numbered
        return jax.tree.map(jnp.add, sums, grad(inputs, part, mix_seed(seed, number))), None

    parts = microbatches(batch, train.microbatches)
    first = jax.tree.map(lambda rows: rows[0], parts)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), jax.eval_shape(grad, inputs, first, seed))
    sums, _ = lax.scan(one, zeros, (jnp.arange(train.microbatches), parts))
    return sums


def _update_router_biases(setup: TrainSetup, buffers: nnx.State, counts: Metrics) -> nnx.State:
    """``bias += rate * sign(mean count - count)`` for each MoE layer that is trained (Megatron-LM, moe_utils.py)."""
    if setup.stack is not None:
        buffers = unstacked(setup.stack, buffers)
    flat = []
    for path, variable in nnx.to_flat_state(buffers):
        layer = "/".join(map(str, path)).removesuffix("/mixer/gate/e_score_correction_bias")
        count = counts[f"{layer}/expert_counts"]
        rate = setup.config.train.router_bias_rate if setup.trained(path, variable) else 0.0
        flat.append((path, variable.replace(variable.get_value() + rate * jnp.sign(count.mean() - count))))
    updated = nnx.from_flat_state(flat)
    return updated if setup.stack is None else stacked(setup.stack, updated)


def _expert_load(counts: Metrics) -> Metrics:
    if not counts:
        return {}
    load = jnp.stack([jnp.stack([c.min(), c.max()]) / jnp.maximum(c.mean(), 1e-9) for c in counts.values()])
    return {"max_vio": load[:, 1].max(), "expert_load": load}


def make_validation_step(setup: TrainSetup) -> Callable[[TrainState, Batch, Any], dict[str, Array]]:
    """The jitted evaluation of one batch: sums of weighted nll, of loss weights, and of the bytes they stand for.

    The third argument is float32 [V], the bytes of each token: the same in every process.
    """
    shardings = setup.state_shardings()

    def validate(state: TrainState, batch: Batch, token_bytes: Array) -> dict[str, Array]:
        model = nnx.merge(setup.graphdef, state.params, state.buffers["model"])
        ctx = Context(segment_ids=batch.segment_ids, positions=batch.positions, seed=state.buffers["seed"])
        hidden_BTD, _, _ = model.hidden(batch.tokens, ctx, remat=setup.config.train.remat)
        logprobs_BT = model.token_logprobs(hidden_BTD, batch.targets)
        return {
            "nll": -(batch.loss_weights * logprobs_BT).sum(),
            "weight": batch.loss_weights.sum(),
            "bytes": (batch.loss_weights * token_bytes[batch.targets]).sum(),
        }

    whole = meshes.replicated(setup.mesh)
    return jax.jit(
        validate,
        in_shardings=(shardings, meshes.batch_sharding(setup.mesh), whole),
        out_shardings=whole,
        compiler_options=compiler_options(setup.mesh),
    )


def global_batch(setup: TrainSetup, batch: Batch) -> Batch:
    """This process's rows of a batch (``meshes.batch_share``) as arrays over all devices."""
    sharding = meshes.batch_sharding(setup.mesh)
    share, shares = meshes.batch_share(setup.mesh)

    def place(rows: Any) -> Array:
        count, columns = rows.shape

        def part(index: Any) -> Any:
            first, last, _ = index[0].indices(count * shares)
            return rows[first - share * count : last - share * count, index[1]]

        return jax.make_array_from_callback((count * shares, columns), sharding, part)

    return jax.tree.map(place, batch)
