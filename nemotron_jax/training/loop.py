"""Pre-training from a RunConfig: data, state, steps, checkpoints, logs.

The run can be killed at any moment: the same command goes on from the last checkpoint, and its losses are bit for bit
those of a run that was never killed (same machine, same number of devices).
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import pallas_kernels.dispatch
from nemotron_jax.checkpoint.companions import carry_to_workdir
from nemotron_jax.checkpoint.load import CHECKPOINTS, CONFIG_FILE, TOKENIZER_FILE, is_hf, read_weights
from nemotron_jax.checkpoint.load import model_config as checkpoint_model
from nemotron_jax.checkpoint.store import CheckpointStore
from nemotron_jax.config import same_network
from nemotron_jax.data.pipeline import TrainData, build, load_tokenizer
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.errors import ConfigError, DataError
from nemotron_jax.model.counts import count_parameters, flops_per_token
from nemotron_jax.model.nemotron import Nemotron, matmul_paths
from nemotron_jax.parallel import mesh as meshes
from nemotron_jax.parallel.fit import check_batch, check_model
from nemotron_jax.parallel.processes import AgreedStop, in_turn
from nemotron_jax.precision.recipe import block_of
from nemotron_jax.run_config import RunConfig, differing_keys, to_dict
from nemotron_jax.training import workdir as workdirs
from nemotron_jax.training.metrics import METRICS_FILE, MetricsLog, read_rows
from nemotron_jax.training.plot import loss_png
from nemotron_jax.training.progress import Progress, human, mfu, startup_table
from nemotron_jax.training.signals import StopRequest
from nemotron_jax.training.state import TrainSetup, TrainState
from nemotron_jax.training.step import TrainSteps, global_batch, is_logged, make_validation_step

DONE, DIVERGED, STOPPED = 0, 3, 75
GATHERED_BYTES = 8e9  # of weights that fit on one device beside its share of the run

# A model and its tokenizer -> what it writes; given by the entry point, since training does not know inference.
Sampler = Callable[[Nemotron, Tokenizer], str]


def pretrain(config: RunConfig, workdir: Path, *, sampler: Sampler | None = None) -> int:
    """Trains to ``train.steps`` in a working directory, going on where an earlier call stopped.

    Args:
      sampler: writes sample.txt at the end.

    Returns:
      0 when the run is finished, 3 when it diverged, 75 when a signal stopped it (after saving).

    Raises:
      UserError: bad config, data, checkpoints or working directory.
    """
    with StopRequest() as stop:
        run = Run(config, workdir.absolute(), sampler)
        try:
            return run.train(stop)
        finally:
            run.close()


@dataclass(frozen=True)
class _Timer:
    """Wall time and waiting time since a logged step."""

    step: int
    start: float
    waited: float = 0.0


class Run:
    """A run being executed: what ``pretrain`` opens, in the order in which it can be refused."""

    def __init__(self, config: RunConfig, workdir: Path, sampler: Sampler | None) -> None:
        self.config, self.workdir, self.sampler = config, workdir, sampler
        self.first_process = jax.process_index() == 0
        mesh = meshes.make_mesh(config.parallel)
        check_mesh(config, mesh)
        self.setup = TrainSetup(config, mesh)
        _ = self.setup.phases, self.setup.trained  # bad path rules are refused before anything is written
        self.tokenizer, self.data = in_turn(self._claim)
        self.token_bytes = _token_bytes(self.tokenizer, config.model.vocab_size)
        self.progress = Progress(config.train.steps, enabled=self.first_process)
        self.store = CheckpointStore(
            workdir / CHECKPOINTS,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            warn=self.progress.message,
        )
        self.batches = self.data.train_iterator()
        self.state, self.last_saved = self._restore_or_init()
        self.metrics = MetricsLog(workdir, resume_step=self.step, write=self.first_process)
        self.flops_per_token = flops_per_token(config.model, config.data.seq_len)
        self.train_steps = [(first, TrainSteps(setup)) for first, setup in self.setup.phases]
        self.validation_steps = [(first, make_validation_step(setup)) for first, setup in self.setup.phases]
        self.stops = AgreedStop()

    def _claim(self) -> tuple[Tokenizer | None, TrainData]:
        with workdirs.claim(self.workdir, self.config, write=self.first_process):
            return _open_data(self.config, self.workdir, self.setup.mesh)

    @property
    def step(self) -> int:
        return int(self.state.step)

    def close(self) -> None:
        self.batches.close()
        self.store.close()
        self.metrics.close()
        self.progress.close()

    # The run

    def train(self, stop: StopRequest) -> int:
        """Steps until the end, a signal, or too many non-finite steps."""
        self.progress.message(self._startup_table())
        start, steps = self.step, self.config.train.steps
        timer = _Timer(start, time.perf_counter())
        skipped = jnp.int32(0)  # of the step before: looked at while the next one runs
        with jax.set_mesh(self.setup.mesh):
            for step in range(start + 1, steps + 1):
                if number := self.stops(stop.number, step):
                    return self._stopped(step - 1, signal.Signals(number).name)
                waiting = time.perf_counter()
                batch = next(self.batches)
                timer = _Timer(timer.step, timer.start, timer.waited + time.perf_counter() - waiting)
                self.state, metrics = _at(step, self.train_steps)(step, self.state, global_batch(self.setup, batch))
                if int(skipped) >= self.config.train.max_skipped_steps:
                    return self._diverged(step - 1)
                skipped = metrics["skipped_in_a_row"]
                if is_logged(step, self.config):
                    self._log(step, metrics, timer)
                    timer = _Timer(step, time.perf_counter())
                paused = time.perf_counter()
                if step % self.config.train.validate_every == 0 or step == steps:
                    self._validate(step)
                # Not in the middle of skipped steps: the last checkpoint should be a good one to go back to.
                wanted = step % self.config.checkpoint.every == 0 or step == steps
                if wanted and int(skipped) < (self.config.train.max_skipped_steps if step == steps else 1):
                    self._save(step)
                timer = _Timer(timer.step, timer.start + time.perf_counter() - paused, timer.waited)
        if int(skipped) >= self.config.train.max_skipped_steps:
            return self._diverged(steps)
        return self._finish()

    def _log(self, step: int, metrics: dict[str, Array], timer: _Timer) -> None:
        host = jax.device_get(metrics)
        values: dict[str, Any] = {
            name: value.tolist() if value.ndim else value.item() for name, value in sorted(host.items())
        }
        seconds = time.perf_counter() - timer.start
        tokens = self.config.train.global_batch_size * self.config.data.seq_len
        rate = (step - timer.step) * tokens / seconds
        flops, devices = self.flops_per_token, jax.devices()
        values |= {
            "tokens": step * tokens,
            "tokens_per_second": rate,
            "tflops_per_second": flops * rate / len(devices) / 1e12,
            "data_wait_fraction": timer.waited / seconds,
        }
        used = mfu(flops, rate, devices[0].device_kind, len(devices))
        if used is not None:
            values["mfu"] = used
        with workdirs.writing(self.workdir):
            self.metrics.log(step, values)
        self.progress.update(step, values)

    def _validate(self, step: int) -> None:
        sums: dict[str, float] = {}
        validation_step = _at(step, self.validation_steps)
        for batch in self.data.validation_batches():
            parts = validation_step(self.state, global_batch(self.setup, batch), self.token_bytes)
            for name, value in jax.device_get(parts).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        if not sums:
            return
        values = {"validation_loss": sums["nll"] / sums["weight"]}
        if sums["bytes"]:
            values["validation_bits_per_byte"] = sums["nll"] / np.log(2) / sums["bytes"]
        with workdirs.writing(self.workdir):
            self.metrics.log(step, values)
        self.progress.message(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    # Checkpoints

    def _items(self, state: TrainState) -> dict[str, Any]:
        optimizer = {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped}
        return {"params": state.params, "buffers": state.buffers, "optimizer": optimizer}

    def _restore_or_init(self) -> tuple[TrainState, int | None]:
        abstract = self.setup.abstract_checkpoint()
        restored = self.store.restore(self._items(abstract))
        if restored is not None:
            self.batches.set_state(restored.data)
            optimizer = restored.items.pop("optimizer")
            return self.setup.from_checkpoint(TrainState(**restored.items, **optimizer)), restored.step
        state = self.setup.init_state()
        if self.config.checkpoint.init_from:
            state = self._init_from(state, abstract, Path(self.config.checkpoint.init_from).expanduser())
        return state, None

    def _init_from(self, state: TrainState, abstract: TrainState, source: Path) -> TrainState:
        """Parameters and router biases of another run or a Hugging Face directory; all else starts anew."""
        items = read_weights(source, {"params": abstract.params, "buffers": abstract.buffers})
        items = self.setup.from_checkpoint(items)
        if self.first_process and is_hf(source):
            with workdirs.writing(self.workdir):
                carry_to_workdir(source, self.workdir)
        return TrainState(
            step=state.step,
            params=items["params"],
            buffers={**state.buffers, "model": items["buffers"]["model"]},
            opt_state=state.opt_state,
            skipped=state.skipped,
        )

    def _save(self, step: int) -> None:
        if self.last_saved != step:
            self.store.save(step, self._items(self.setup.to_checkpoint(self.state)), self.batches.get_state())
            self.last_saved = step

    # Ends

    def _stopped(self, step: int, signal_name: str) -> int:
        if step:
            self._save(step)
        self.store.wait()
        saved = f"saved step {step} in {self.workdir}" if step else "stopped before the first step"
        self.progress.message(f"{signal_name} received: {saved}. Run the same command again to go on.")
        return STOPPED

    def _diverged(self, step: int) -> int:
        self.store.wait()
        good = self.last_saved
        self.progress.message(
            f"error: the loss or gradient was not finite in {self.config.train.max_skipped_steps} steps in a row, the "
            f"last is step {step}. "
            + (f"The last good checkpoint is step {good} in " if good else "There is no checkpoint yet in ")
            + f"{self.workdir / CHECKPOINTS}. Lower optimizer.peak_lr or look at the data of these steps."
        )
        return DIVERGED

    def _finish(self) -> int:
        self.store.wait()
        sampled = self._model_to_sample()
        if not self.first_process:
            return DONE
        where = {"checkpoint": self.workdir / CHECKPOINTS / str(self.step)}
        with workdirs.writing(self.workdir):
            if loss_png(read_rows(self.workdir / METRICS_FILE), self.workdir / "loss.png"):
                where["loss curve"] = self.workdir / "loss.png"
            if self.tokenizer is not None and self.sampler is not None and sampled is not None:
                # Many processes sample alone, on a device of each.
                alone = jax.process_count() > 1
                with contextlib.nullcontext() if alone else jax.set_mesh(self.setup.mesh):
                    sample = self.sampler(sampled, self.tokenizer)
                workdirs.write_atomically(self.workdir / "sample.txt", sample)
                where["sample"] = self.workdir / "sample.txt"
        lines = [f"finished {self.step} steps."] + [f"  {name + ':':<12}{path}" for name, path in where.items()]
        if self.tokenizer is not None:
            lines.append(
                f"evaluate it: .venv/bin/python eval.py --checkpoint={_shown(self.workdir)} --task=perplexity "
                "--data=README.md"
            )
        self.progress.message("\n".join(lines))
        return DONE

    def _model_to_sample(self) -> Nemotron | None:
        """The model as one process can run it alone: where there are many, gathered on a device of each, if small."""
        alone = jax.process_count() == 1
        held = self.state.params, self.state.buffers["model"]
        if not alone and sum(leaf.nbytes for leaf in jax.tree.leaves(held)) > GATHERED_BYTES:
            return None
        model = self.setup.canonical_model(self.state)
        if not alone:
            graphdef, variables = nnx.split(model)
            whole = jax.jit(lambda leaves: leaves, out_shardings=meshes.replicated(self.setup.mesh))(variables)
            model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.addressable_data(0), whole))
        return model

    # The start

    def _startup_table(self) -> str:
        config, devices = self.config, jax.devices()
        counts = count_parameters(config.model)
        tokens = config.train.global_batch_size * config.data.seq_len
        first = f"step {self.step}" if self.step else "a new run"
        return startup_table(
            {
                "run": {
                    "workdir": _shown(self.workdir),
                    "start": first if not config.checkpoint.init_from or self.step else config.checkpoint.init_from,
                    "steps": f"{config.train.steps:,} of {tokens:,} tokens",
                    "data": self.data.statistics.summary(),
                },
                "machine": {
                    "devices": f"{len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)",
                    "mesh": meshes.describe(self.setup.mesh),
                    **_whole_on_each_device(self.setup),
                    **(
                        {"layers are kept as": self.setup.stack.spell(config.model.pattern)} if self.setup.stack else {}
                    ),
                },
                "model": {
                    "layers": config.model.pattern
                    + (f", MTP {config.model.mtp.pattern} x {config.model.mtp.depth}" if config.model.mtp else ""),
                    "parameters": f"{human(counts['total'])}, {human(counts['active'])} active a token",
                    "FLOPs a token": human(self.flops_per_token),
                },
                "operations": pallas_kernels.dispatch.describe(),
                **_precision_tables(self.setup),
            }
        )


def check_mesh(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError when the model, a microbatch or a row does not divide over the mesh."""
    precision = config.precision
    recipes = (precision.recipe, precision.switch_to) if precision.switch_at else (precision.recipe,)
    check_model(config.model, mesh, max(map(block_of, recipes)))
    check_batch(
        config.model,
        mesh,
        rows=config.train.global_batch_size // config.train.microbatches,
        rows_name="train.global_batch_size / train.microbatches",
        seq_len=config.data.seq_len,
        seq_name="data.seq_len",
    )


def _open_data(config: RunConfig, workdir: Path, mesh: jax.sharding.Mesh) -> tuple[Tokenizer | None, TrainData]:
    """The tokenizer (kept in the workdir, where evaluation finds it) and the data."""
    cache = workdir / workdirs.DATA_CACHE
    vocab = config.model.vocab_size
    tokenizer = load_tokenizer(config.data, cache, vocab_size=vocab)
    if tokenizer is not None and jax.process_index() == 0:
        _keep_tokenizer(tokenizer, workdir)
    if config.checkpoint.init_from:
        _check_source(config, tokenizer, Path(config.checkpoint.init_from).expanduser())
    data = build(
        config.data,
        tokenizer,
        global_batch_size=config.train.global_batch_size,
        vocab_size=vocab,
        seed=config.train.seed,
        cache_dir=cache,
        share=meshes.batch_share(mesh),
    )
    return tokenizer, data


def _keep_tokenizer(tokenizer: Tokenizer, workdir: Path) -> None:
    """Leaves the run's tokenizer where evaluation finds it; another one that is there already is moved aside.

    Raises:
      DataError: the run in the directory was trained with another tokenizer.
    """
    file = workdir / TOKENIZER_FILE
    if file.exists():
        if Tokenizer.load(file).fingerprint == tokenizer.fingerprint:
            return
        if (workdir / CONFIG_FILE).exists():
            raise DataError(
                f"{file} is not the tokenizer that the data give now: the data or data.tokenizer have changed since "
                "the run began. Put the old ones back, or start in a new --workdir."
            )
        file.replace(file.with_name(f"{TOKENIZER_FILE}.old"))
    tokenizer.save(file)


def _check_source(config: RunConfig, tokenizer: Tokenizer | None, source: Path) -> None:
    """Raises ConfigError when the run to start from has another model or another tokenizer than this one."""
    theirs, ours = checkpoint_model(source), config.model
    if not same_network(theirs, ours):
        values = (to_dict(RunConfig(replace(model, hf_extra=())))["model"] for model in (theirs, ours))
        differences = differing_keys(*values)
        raise ConfigError(
            f"checkpoint.init_from={source} holds another model; these keys differ (theirs -> ours):\n  "
            + "\n  ".join(differences)
        )
    file = source / TOKENIZER_FILE
    if tokenizer is not None and file.exists() and Tokenizer.load(file).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"checkpoint.init_from={source} was trained with another tokenizer: set data.tokenizer={file} to keep its "
            "tokens' meaning."
        )


def _token_bytes(tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray:
    """[V] float32: UTF-8 bytes of each token; zeros where they are not known."""
    sizes = np.zeros(vocab_size, np.float32)
    if tokenizer is not None:
        sizes[: tokenizer.vocab_size] = tokenizer.token_bytes
    return sizes


def _whole_on_each_device(setup: TrainSetup) -> dict[str, str]:
    """A line on weights that the mesh should cut and cannot; nothing where there are none."""
    found = meshes.kept_whole(setup.abstract_state().params, setup.mesh)
    lines = [
        f"along {name}, which {' * '.join(meshes.mesh_axes(name))} does not divide: weights of {size / 1e6:,.1f} MB"
        for name, size in found.items()
    ]
    return {"whole on each device": "\n".join(lines)} if lines else {}


def _at(step: int, phases: Sequence[tuple[int, Any]]) -> Any:
    """What belongs to a step, of (first step, what belongs to it and to those after it)."""
    return next(what for first, what in reversed(phases) if first <= step)


def _precision_tables(setup: TrainSetup) -> dict[str, dict[str, str]]:
    """One for each part of the run."""
    tables = {}
    for first, part in setup.phases:
        title = "precision" if first == 1 else f"precision from step {first:,} on"
        if first > setup.config.train.steps:
            title += f" (never: the run has {setup.config.train.steps:,} steps)"
        table = {"residual stream": part.recipe.activations, "weights, optimizer, router, SSM state": "float32"}
        tables[title] = table | part.recipe.describe(matmul_paths(setup.config.model))
    return tables


def _shown(path: Path) -> str:
    """Relative to the current directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
