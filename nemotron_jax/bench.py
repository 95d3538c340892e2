"""How fast a model trains, prefills and decodes: one command, one JSON object (`python -m nemotron_jax bench`).

Weights and tokens are random and made on the devices; the programs are those that training and generation run. A
step runs a number of times with the next one always in the queue, so that the device does not wait for Python.

Shapes: B batch, T time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemotron_jax import trace
from nemotron_jax.config import ModelConfig
from nemotron_jax.data.batch import Batch
from nemotron_jax.errors import ConfigError, UserError
from nemotron_jax.model.context import Context
from nemotron_jax.model.counts import flops_per_token
from nemotron_jax.model.nemotron import Nemotron, abstract, split_model
from nemotron_jax.parallel import mesh as meshes
from nemotron_jax.parallel.fit import check_batch, check_model
from nemotron_jax.parallel.xla import compiler_options
from nemotron_jax.precision.recipe import block_of, recipe
from nemotron_jax.run_config import DataConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from nemotron_jax.training.losses import loss_fn, totals
from nemotron_jax.training.progress import mfu
from nemotron_jax.training.state import TrainSetup
from nemotron_jax.training.step import make_train_step
from pallas_kernels import aot, dispatch

COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|ragged-all-to-all|reduce-scatter"
WARM_UP = 2  # steps that are not counted, each run alone
PROFILED = 3


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
      model: its MTP module takes part in training only.
      batch: rows of a step, of all devices together.
      seq: tokens of a row; when decoding, tokens that each row already holds.
      precision: recipe. Weights have the dtype of its residual stream, but for the router's and vectors (float32).
      remat: of training steps, "none" or "full".
      optimizer: of training steps. False: loss and gradients, in the dtype of the weights, and nothing else. True:
        the whole step of train.py, with float32 weights, clipping and AdamW.
      documents: of a training row, packed and equally long; 1: no segment ids.
      steps: timed ones.
      cache: a folder that keeps compiled programs, so that the next run finds them; "": an empty one, for this run.
      profile: a folder for a profile of three more steps, which is summed up too; "": none. GPUs only.
      compile_only: nothing is run, and no memory taken.
      target: a GPU to compile for that is not there, a key of ``pallas_kernels.aot.TARGETS``: nothing is run.
      target_devices: how many of them.
    """

    model: ModelConfig
    batch: int = 1
    seq: int = 8192
    precision: str = "auto"
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    remat: str = "none"
    optimizer: bool = False
    documents: int = 1
    steps: int = 20
    cache: str = ""
    profile: str = ""
    compile_only: bool = False
    target: str = ""
    target_devices: int = 1


@dataclass(frozen=True)
class Program:
    """A step that can be compiled and repeated.

    Attributes:
      step: jitted.
      shapes: of its arguments, with shardings.
      start: makes the first arguments on the devices.
      following: (arguments, results) -> the next arguments.
      mark: results -> a small array that is there when the step is done.
      parameters: of the model.
      tokens, flops: of one step on all devices together.
      flops_formula: where flops come from.
    """

    step: Any
    shapes: tuple[Any, ...]
    start: Callable[[], tuple[Any, ...]]
    following: Callable[[tuple[Any, ...], Any], tuple[Any, ...]]
    mark: Callable[[Any], Array]
    parameters: int
    tokens: int
    flops: float
    flops_formula: str


def run(what: str, work: Workload) -> dict[str, Any]:
    """Measures ``what``, a key of PROGRAMS; returns what the command prints.

    Raises:
      ConfigError: the mesh does not fit the devices, or the batch the mesh.
      UserError: the step does not fit into the memory of a device, or the compiler of the target is not installed.
    """
    if work.precision == "auto":
        work = dataclasses.replace(work, precision="bfloat16" if work.target else recipe("auto").activations)
    if work.target:
        try:
            devices = aot.devices(work.target, work.target_devices)
        except RuntimeError as error:
            raise UserError(str(error)) from error
    else:
        devices = jax.devices()
    if work.profile and devices[0].platform != "gpu":
        raise UserError(f"--profile sums up what GPUs did, and here are devices of kind {devices[0].platform!r}.")
    mesh = meshes.make_mesh(work.parallel, devices)
    _check(work, mesh)
    with aot.compiling_for(work.target) if work.target else contextlib.nullcontext():
        program = PROGRAMS[what](work, mesh)
        compiled, seconds = _compile(program, mesh, work)
        plan = compiled.memory_analysis()
        result = {
            "bench": what,
            "pattern": work.model.pattern,
            "parameters": program.parameters,
            "batch": work.batch,
            "seq": work.seq,
            "precision": work.precision,
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "mesh": meshes.describe(mesh),
            "operations": dispatch.describe(),
            "compile_seconds": seconds,
            "planned_memory_gb": {  # of one device, by the compiler
                name: round(getattr(plan, f"{name}_size_in_bytes") / 1e9, 3)
                for name in ("argument", "output", "alias", "temp")
            },
        }
    if len(devices) > 1:  # one in a scanned layer counts once
        result["collectives"] = dict(Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text())))
    if what == "train":
        result |= {"optimizer": work.optimizer, "remat": work.remat, "documents": work.documents}
        result |= {"stack_layers": work.parallel.stack_layers}
    if not (work.target or work.compile_only):
        times, peak, mark = _repeat(program, compiled, work)
        result |= _speed(program, times, peak, devices)
        if what == "train":
            result["loss"] = float(mark)  # of the last step: without --optimizer, that of every step
        if work.profile:
            result["profile"] = trace.summary(trace.read(Path(work.profile)), PROFILED)
    return result


def _check(work: Workload, mesh: Mesh) -> None:
    check_model(work.model, mesh, block_of(work.precision))
    check_batch(work.model, mesh, rows=work.batch, rows_name="--batch", seq_len=work.seq, seq_name="--seq")
    if work.seq % work.documents:
        raise ConfigError(f"--seq={work.seq} must be a multiple of --documents ({work.documents}).")


# Compiling and timing


def _say(message: str) -> None:
    print(f"bench: {message}", file=sys.stderr, flush=True)


def _compile(program: Program, mesh: Mesh, work: Workload) -> tuple[Any, dict[str, Any]]:
    """The compiled step, and the seconds of tracing and of both.

    A cache is warm for another process only: Mosaic numbers the kernels of a process, so a second lowering in the
    same one makes another program. Devices that are not there cannot read a cache, and jax would put constants on
    them if they were set.
    """
    there = not work.target
    with contextlib.ExitStack() as stack:
        folder = work.cache or stack.enter_context(tempfile.TemporaryDirectory())
        cache = "warm" if os.path.isdir(folder) and os.listdir(folder) else "empty"
        stack.enter_context(_cache_in(folder))
        _say(f"compiling, {cache} cache")
        started = time.perf_counter()
        with jax.set_mesh(mesh) if there else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = program.step.lower(*program.shapes)
        tracing = time.perf_counter() - started
        compiled = lowered.compile()
        seconds = {"cache": cache, "tracing": round(tracing, 2), "total": round(time.perf_counter() - started, 2)}
        _say(f"compiled in {seconds['total']} s")
    return compiled, seconds


@contextlib.contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """Compiled programs, however small, are kept in this folder alone."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def set_all(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # jax looks at the settings once

    set_all(settings)
    try:
        yield
    finally:
        set_all(before)


def _repeat(program: Program, compiled: Any, work: Workload) -> tuple[list[float], int | None, Array]:
    """Seconds of each step, from the end of the one before to its own; the peak memory of single steps in bytes; and
    the last step's mark."""
    _say("making weights and inputs")
    try:
        arguments = jax.block_until_ready(program.start())
        _say(f"running {WARM_UP} + {work.steps} steps")
        ends: list[float] = []
        before = None
        for number in range(WARM_UP + work.steps + 1):
            results = compiled(*arguments)
            arguments, mark = program.following(arguments, results), program.mark(results)
            del results  # before the next step is queued: its gradients take the same place
            if number < WARM_UP:
                mark.block_until_ready()
                peak = _peak_bytes()
            elif before is not None:
                before.block_until_ready()
                ends.append(time.perf_counter())
            before = mark
        if work.profile:
            jax.block_until_ready(mark)
            with jax.profiler.trace(work.profile):
                for _ in range(PROFILED):
                    results = compiled(*arguments)
                    arguments, mark = program.following(arguments, results), program.mark(results)
                    del results
                mark.block_until_ready()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = str(error).splitlines()[0]
        raise UserError(f"out of memory ({line}): lower --batch or --seq, or use --remat=full.") from error
    return [end - start for start, end in pairwise(ends)], peak, mark


def _peak_bytes() -> int | None:
    """The most memory that was in use on a device so far; None where the device does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one), default=None)


def _speed(program: Program, seconds: list[float], peak: int | None, devices: list[Any]) -> dict[str, Any]:
    median = statistics.median(seconds)
    rate = program.tokens / median
    used = mfu(program.flops / program.tokens, rate, devices[0].device_kind, len(devices))
    return {
        "steps": len(seconds),
        "step_ms": round(1e3 * median, 3),
        "step_ms_min": round(1e3 * min(seconds), 3),
        "tokens_per_second": round(rate, 1),
        "tflops_per_second": round(program.flops / median / len(devices) / 1e12, 4),  # of one device
        "mfu": None if used is None else round(used, 4),
        "mfu_formula": f"flops a step ({program.flops:.6g}: {program.flops_formula}) / step_ms / "
        "(devices * published dense bfloat16 FLOP/s of a device)",
        "peak_memory_gb": None if peak is None else round(peak / 1e9, 3),
    }


# Programs


@dataclass(frozen=True)
class _Weights:
    """Weights that are never float32 as a whole: each leaf is drawn and rounded where it stays."""

    work: Workload
    model: ModelConfig
    mesh: Mesh

    def graphdef(self) -> nnx.GraphDef:
        return split_model(abstract(self.model, recipe(self.work.precision, self.model)))[0]

    def _init(self) -> tuple[nnx.State, nnx.State]:
        rules = recipe(self.work.precision, self.model)
        _, params, buffers = split_model(Nemotron(self.model, rules, jax.random.key(0)))
        flat = [
            (path, leaf.replace(leaf.get_value().astype(rules.activations)) if _is_matrix(path, leaf) else leaf)
            for path, leaf in nnx.to_flat_state(params)
        ]
        return nnx.from_flat_state(flat), buffers

    def shapes(self) -> tuple[nnx.State, nnx.State]:
        shapes = jax.eval_shape(self._init)
        return meshes.placed(shapes, meshes.shardings(shapes, self.mesh))

    def make(self) -> tuple[nnx.State, nnx.State]:
        return jax.jit(self._init, out_shardings=meshes.shardings(jax.eval_shape(self._init), self.mesh))()


def _is_matrix(path: tuple[Any, ...], leaf: nnx.Variable) -> bool:
    """All but vectors and the router, which is float32 in every recipe."""
    return leaf.get_value().ndim > 1 and "gate" not in path


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _batch(work: Workload) -> Batch:
    """Random tokens; the last token of each document predicts nothing."""
    shape = (work.batch, work.seq)
    tokens = np.random.default_rng(0).integers(work.model.vocab_size, size=shape, dtype=np.int32)
    length = work.seq // work.documents
    position = np.broadcast_to(np.arange(work.seq, dtype=np.int32), shape)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_weights=(position % length != length - 1).astype(np.float32),
        segment_ids=position // length + 1 if work.documents > 1 else None,
        positions=position % length,
    )


def _train(work: Workload, mesh: Mesh) -> Program:
    batch = _batch(work)
    sharding = meshes.batch_sharding(mesh)
    batch_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
    tokens = work.batch * work.seq
    train = TrainConfig(steps=10**6, global_batch_size=work.batch, remat=work.remat)
    program = partial(
        Program,
        tokens=tokens,
        flops=tokens * flops_per_token(work.model, work.seq),
        flops_formula="tokens * flops_per_token of the params command, recomputation not counted",
    )
    if work.optimizer:
        config = RunConfig(
            work.model,
            data=DataConfig(seq_len=work.seq),
            train=train,
            precision=PrecisionConfig(work.precision),
            parallel=work.parallel,
        )
        setup = TrainSetup(config, mesh)
        state = setup.abstract_state()
        return program(
            step=make_train_step(setup, statistics=False),
            shapes=(state, batch_shapes),
            start=lambda: (setup.init_state(), jax.device_put(batch, sharding)),
            following=lambda arguments, results: (results[0], arguments[1]),
            mark=lambda results: results[1]["loss"],
            parameters=_size((state.params, state.buffers["model"])),
        )
    weights = _Weights(work, work.model, mesh)
    graphdef = weights.graphdef()
    shapes = weights.shapes()

    def step(params: nnx.State, buffers: nnx.State, batch: Batch) -> tuple[Array, nnx.State]:
        def loss(params: nnx.State) -> Array:
            model = nnx.merge(graphdef, params, buffers)
            return loss_fn(model, batch, jnp.uint32(0), totals(batch, work.model), 1.0, train)[0]

        return jax.value_and_grad(loss)(params)

    return program(
        step=jax.jit(
            step,
            out_shardings=(meshes.replicated(mesh), meshes.shardings(shapes[0], mesh)),
            compiler_options=compiler_options(mesh),
        ),
        shapes=(*shapes, batch_shapes),
        start=lambda: (*weights.make(), jax.device_put(batch, sharding)),
        following=lambda arguments, _: arguments,
        mark=lambda results: results[0],
        parameters=_size(shapes),
    )


def _prefill(work: Workload, mesh: Mesh) -> Program:
    return _inference(work, mesh, length=work.seq, filled=0, room=0)


def _decode(work: Workload, mesh: Mesh) -> Program:
    return _inference(work, mesh, length=1, filled=work.seq, room=WARM_UP + work.steps + 1)


def _inference(work: Workload, mesh: Mesh, *, length: int, filled: int, room: int) -> Program:
    """Steps of ``length`` tokens a row behind ``filled`` ones; greedy choice of the next token.

    A step of one token goes on from the last one's state, which it overwrites; a longer one starts anew.
    """
    model = dataclasses.replace(work.model, mtp=None)
    weights = _Weights(work, model, mesh)
    graphdef = weights.graphdef()
    shapes = weights.shapes()
    rows = NamedSharding(mesh, PartitionSpec(meshes.RULES["batch"]))
    decoding = length == 1

    def empty() -> Any:
        built = nnx.merge(graphdef, *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        return built.init_state(work.batch, max(filled + room, length))

    def inputs() -> tuple[Any, Any]:
        """Tokens [B, T] and the state; a filled one holds random numbers."""
        state = empty()
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))
        layers = state.layers
        if filled:
            layers = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), layers)
        tokens = jax.random.randint(jax.random.key(2), (work.batch, length), 0, model.vocab_size, jnp.int32)
        return tokens, dataclasses.replace(state, lengths=state.lengths + filled, layers=layers)

    def step(params: nnx.State, buffers: nnx.State, tokens_BT: Array, state: Any) -> tuple[Array, Any]:
        built = nnx.merge(graphdef, params, buffers)
        new_tokens = None if decoding else jnp.full((work.batch,), length, jnp.int32)
        hidden_BTD, state, _ = built.hidden(tokens_BT, Context(new_tokens=new_tokens), state)
        return jnp.argmax(built.logits(hidden_BTD[:, -1:]), axis=-1).astype(jnp.int32), state

    head = 2 * model.hidden_size * model.vocab_size
    if decoding:
        flops = flops_per_token(model, 2 * filled) / 3
        formula = "rows * the forward third of flops_per_token of the params command, attending to seq tokens"
    else:
        flops = length * (flops_per_token(model, length) / 3 - head) + head
        formula = "tokens * the forward third of flops_per_token of the params command, lm_head once a row"
    input_shapes = jax.eval_shape(inputs)
    return Program(
        step=jax.jit(step, donate_argnums=(3,) if decoding else (), compiler_options=compiler_options(mesh)),
        shapes=(*shapes, *meshes.placed(input_shapes, jax.tree.map(lambda _: rows, input_shapes))),
        start=lambda: (*weights.make(), *jax.jit(inputs, out_shardings=rows)()),
        following=lambda arguments, results: (*arguments[:2], *results) if decoding else arguments,
        mark=lambda results: results[0],
        parameters=_size(shapes),
        tokens=work.batch * length,
        flops=work.batch * flops,
        flops_formula=formula,
    )


PROGRAMS: dict[str, Callable[[Workload, Mesh], Program]] = {"train": _train, "prefill": _prefill, "decode": _decode}
