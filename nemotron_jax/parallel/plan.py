"""A training step on paper: memory of a device, bytes that travel, time of each block and what limits it.

Nothing is compiled, and no device is asked: shapes and the sharding table say what each device holds, and what it
holds says what has to travel.

    weights     float32 masters and two moments, cut as the sharding table says; gathered in the operands' dtype along
                `fsdp` and `context` for each use, their gradients summed over all devices that see other tokens, and
                cut again
    experts     along `expert` at the width of the experts' input (the latent one, where there is one): tokens are
                gathered and sums scattered, each way and back (parallel/experts_gathered.py); on more devices than a
                token has experts its rows travel, there and back, and three widths back (parallel/experts.py)
    tensor      the partial sums of each block's last matmul, and of its input's gradient
    context     keys and values of attention, one state a row of Mamba-2 (parallel/context.py)

Peaks are those that makers publish, so times are lower bounds, and shares of them say more than their sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from nemotron_jax.config import ModelConfig
from nemotron_jax.errors import ConfigError, did_you_mean
from nemotron_jax.parallel.experts_gathered import rows_of_a_round
from nemotron_jax.parallel.fit import check_batch, check_model
from nemotron_jax.parallel.mesh import AXES, mesh_axes, spec
from nemotron_jax.parallel.stack import Stack
from nemotron_jax.run_config import ParallelConfig

# One H200 (NVIDIA's data sheet): dense bfloat16 FLOP/s, bytes/s and bytes of its memory, bytes/s of NVLink one way.
PEAK_FLOPS, HBM_SPEED, HBM_BYTES, NVLINK = 989.4e12, 4.8e12, 141e9, 450e9
FLOAT32_SLOWDOWN = 8  # of matmuls whose operands are float32, without TF32: an order of magnitude, published nowhere

HOST = 8  # GPUs that NVLink connects
SHARED = mesh_axes("embed")  # devices along these gather a weight for each use: `fsdp` and `context`


@dataclass(frozen=True)
class Interconnect:
    """Bytes/s of one GPU, one way, to GPUs outside of its NVLink domain, and how many GPUs the domain holds."""

    network: float
    domain: int = HOST


INTERCONNECTS = {
    "ib200": Interconnect(25e9),  # one 200 Gb/s port a GPU
    "ib400": Interconnect(50e9),  # one 400 Gb/s port a GPU: DGX H100 and H200
    "ib800": Interconnect(100e9),
    "nvl72": Interconnect(50e9, domain=72),
}


@dataclass(frozen=True)
class Saved:
    """What a block leaves for its backward pass, bytes a token and bytes.

    Attributes:
      wide: arrays of the model's or the latent width: whole on each device of `tensor`.
      inner: arrays over heads or feed-forward channels: cut by `tensor`.
      rows: arrays with a row of the experts' input width for each chosen expert of a token.
      inner_rows: the same of the experts' feed-forward width: cut by `tensor`.
      copies: of weights, in the dtype of the operands.
    """

    wide: float = 0.0
    inner: float = 0.0
    rows: float = 0.0
    inner_rows: float = 0.0
    copies: float = 0.0


@dataclass(frozen=True)
class Part:
    """A part of the model: all its layers of one kind, the embeddings, the head.

    Attributes:
      name: "M", "*", "E", "-", "embeddings", "head"; with "mtp " in front for those of the MTP module.
      stored: how many there are, each with ``tensors``.
      runs: how often a token goes through each in the forward pass.
      tensors: {path: (shape, logical axes)} of one.
      flops: of one forward pass, a token.
      saved: of one run.
    """

    name: str
    stored: int
    runs: int
    tensors: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]
    flops: float
    saved: Saved = Saved()


@dataclass(frozen=True)
class Work:
    """What is planned. ``batch``: rows of a microbatch on all devices together; ``operands``: bytes of a number."""

    batch: int
    seq: int
    operands: int = 2
    remat: str = "full"
    interconnect: str = "ib400"


@dataclass(frozen=True)
class _Axis:
    """Devices of one or more mesh axes that exchange something: how many, and how many of them share an NVLink."""

    size: int
    near: int

    def gather(self, whole: float) -> tuple[float, float]:
        """(NVLink, network) bytes into a device that gathers ``whole``; a reduce-scatter of it costs as much.

        What comes from other hosts comes once a host, through the ports of all its devices, and goes on over NVLink.
        """
        if self.size == 1:
            return 0.0, 0.0
        hosts = self.size / self.near
        return whole * (self.size - 1) / self.size, whole * (hosts - 1) / hosts / self.near

    def exchange(self, sent: float) -> tuple[float, float]:
        """(NVLink, network) bytes out of a device in an all-to-all of ``sent``: each device gets an equal part."""
        return sent * (self.near - 1) / self.size, sent * (self.size - self.near) / self.size


class Plan:
    """The numbers of one model on one mesh; with a stack, of its layers scanned (parallel.stack_layers)."""

    def __init__(
        self,
        model: ModelConfig,
        parts: Sequence[Part],
        parallel: ParallelConfig,
        work: Work,
        stack: Stack | None = None,
    ) -> None:
        self.model, self.parts, self.work, self.stack = model, parts, work, stack
        self.sizes = {axis: getattr(parallel, axis) for axis in AXES}
        if -1 in self.sizes.values():
            raise ConfigError("plan counts no devices: give each axis of --mesh its size (those not named are 1).")
        self.mesh = AbstractMesh(tuple(self.sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
        if work.interconnect not in INTERCONNECTS:
            hint = did_you_mean(work.interconnect, INTERCONNECTS)
            raise ConfigError(
                f"--interconnect must be one of {', '.join(INTERCONNECTS)}, got {work.interconnect!r}.{hint}"
            )
        self.domain = INTERCONNECTS[work.interconnect].domain
        check_model(model, self.mesh)
        check_batch(model, self.mesh, rows=work.batch, rows_name="--batch", seq_len=work.seq, seq_name="--seq")
        self.rows = work.batch // math.prod(self.sizes[axis] for axis in mesh_axes("batch"))
        self.rows_travel = model.moe.top_k < self.sizes["expert"]  # else tokens are gathered
        self.tokens = self.rows * work.seq // math.prod(self.sizes[axis] for axis in mesh_axes("time"))  # of a device

    # Who holds what

    def _cut(self, shape: Sequence[int], axes: Sequence[str]) -> dict[str, int]:
        """{mesh axis: its size} of those that cut a weight."""
        parts = spec(shape, axes, self.mesh)
        used = [axis for names in parts for axis in ((names,) if isinstance(names, str) else names or ())]
        return {axis: self.sizes[axis] for axis in used if self.sizes[axis] > 1}

    def _elements(self, part: Part) -> float:
        """Of a device, in one of the part's weights."""
        tensors = part.tensors.values()
        return sum(math.prod(shape) / math.prod(self._cut(shape, axes).values()) for shape, axes in tensors)

    def _gathered_elements(self, part: Part) -> float:
        """The same when the devices that share each weight's width have put it together."""
        return sum(self._in_use(shape, axes) for shape, axes in part.tensors.values())

    def _in_use(self, shape: Sequence[int], axes: Sequence[str]) -> float:
        """Elements of a weight on a device that has gathered its width."""
        cut = self._cut(shape, axes)
        return math.prod(shape) / math.prod(size for axis, size in cut.items() if axis not in SHARED)

    def _group(self, axes: Sequence[str]) -> _Axis:
        """The devices that these axes connect. A mesh is laid out with its last axis within a host first."""
        size = near = stride = 1
        for axis in reversed(AXES):
            if axis in axes:
                size *= self.sizes[axis]
                near *= max(1, min(self.sizes[axis], self.domain // stride))
            stride *= self.sizes[axis]
        return _Axis(size, min(near, size))

    # Memory

    def memory(self) -> dict[str, float]:
        """Bytes of a device: what stays between steps, and the most that a step adds."""
        held = sum(part.stored * self._elements(part) for part in self.parts)
        activations, gradients = self._peak()
        memory = {
            "parameters": 4 * held,
            "optimizer": 8 * held,
            "gradients": gradients,
            "activations": activations,
        }
        return memory | {"total": sum(memory.values())}

    def _peak(self) -> tuple[float, float]:
        """(activations, gradients) when their sum is largest, over the forward and the backward pass.

        The backward pass gives up what was kept and makes gradients. The head does so in the forward pass. Layers of a
        scan have all their gradients from the start, and what they keep until the last of them is through.
        """
        order, around = self._order(), self._around()
        stacked = sum(self._gradient(part) for part, number in order if around.get(number))
        kept, most = 0.0, (0.0, 0.0)
        for part, _ in order:
            if part.name == "head":
                most = max(most, (kept + self._head(), stacked), key=sum)
            kept += self._kept(part)
        gradients, made, through = stacked, set[str](), 0.0
        for part, number in reversed(order):
            scans = around.get(number, ())
            if not scans and (part.stored > 1 or part.name not in made):
                gradients += self._gradient(part)
                made.add(part.name)
            if part.name != "head":
                now = kept + self._at_work(part)
                now += self._carried(part) * bool(scans) + sum(self._sliced(scan, order) for scan in scans[1:])
                most = max(most, (now, gradients), key=sum)
            through += self._kept(part)
            if not scans or number == scans[0].start:
                kept, through = kept - through, 0.0
        return most

    def _around(self) -> Mapping[int, tuple[range, ...]]:
        """{layer: the layers of the scans around it, the outermost first}."""
        return dict(enumerate(self.stack.around)) if self.stack else {}

    def _carried(self, part: Part) -> float:
        """Bytes of experts' float32 gradients, not cut yet, that a scan holds for longer than the layer at work.

        XLA carries them into the next iteration, to reduce them beside what is there to be done: so all of them are
        there at a time, not the largest alone; and where devices have different experts, those of two layers.
        """
        sums = [4 * self._in_use(*weight) for weight in self._experts_cut_by_fsdp(part)]
        return sum(sums) - (max(sums, default=0) if self.sizes["expert"] == 1 else 0)

    def _sliced(self, scan: range, order: Sequence[tuple[Part, int]]) -> float:
        """Bytes of an inner scan's own: weights and what was kept, cut out of the outer stack, and its gradients."""
        inside = [part for part, number in order if number in scan]
        return sum(4 * self._elements(part) + self._gradient(part) + self._kept(part) for part in inside)

    def _order(self) -> list[tuple[Part, int]]:
        """One part for each run of each layer, as in a forward pass; the layer's number, -1 for other parts."""
        named = {part.name: part for part in self.parts}
        after = ["head"]
        if self.model.mtp is not None:
            depth = ["embeddings", "mtp eh_proj", *(f"mtp {letter}" for letter in self.model.mtp.pattern), "head"]
            after += depth * self.model.mtp.depth
        layers = [(named[letter], number) for number, letter in enumerate(self.model.pattern)]
        return [(named["embeddings"], -1), *layers, *((named[name], -1) for name in after)]

    def _gradient(self, part: Part) -> float:
        """Bytes of one layer's gradients: float32; of experts that are whole here, in the dtype of the operands."""
        total = 0.0
        for path, (shape, axes) in part.tensors.items():
            cut = self._cut(shape, axes)
            size = self.work.operands if "/experts/" in path and not cut.keys() & set(SHARED) else 4
            total += size * math.prod(shape) / math.prod(cut.values())
        return total

    def _saved(self, part: Part) -> float:
        """Bytes that one run of a layer leaves, were nothing recomputed."""
        saved, tensor, experts = part.saved, self.sizes["tensor"], self.sizes["expert"]
        rows = 0.0 if self.rows_travel else self._rows(part)  # they are sent once more instead (parallel/experts.py)
        return self.tokens * (saved.wide + saved.inner / tensor) + rows + saved.copies / tensor / experts

    def _rows(self, part: Part) -> float:
        """Bytes of rows of the experts; where tokens are gathered, of a round, and those tokens."""
        rows = self.tokens * (part.saved.rows + part.saved.inner_rows / self.sizes["tensor"])
        devices = self.sizes["expert"]
        if devices == 1 or self.rows_travel or not part.name.endswith("E"):
            return rows
        moe, tokens = self.model.moe, int(self.tokens * devices)
        quota, _ = rows_of_a_round(tokens, moe.top_k, moe.num_experts // devices, devices)
        return rows * quota / (self.tokens * moe.top_k) + tokens * self._expert_width() * self.work.operands

    def _kept(self, part: Part) -> float:
        """Bytes that one run leaves until its backward pass."""
        wide = self.tokens * self.model.hidden_size * self.work.operands
        if part.name == "head":  # its gradients are made at once
            return 4 * self._elements(part) + wide
        if part.name in ("embeddings", "mtp eh_proj"):
            return wide if part.name == "embeddings" else 3 * wide
        if self.work.remat == "none":
            return self._saved(part)
        returned = part.name.endswith("E") and self.sizes["expert"] > 1  # what the experts sent back is kept as well
        return wide + self.tokens * self._expert_width() * self.work.operands * returned

    def _expert_width(self) -> int:
        return self.model.moe.latent_size or self.model.hidden_size

    def _at_work(self, part: Part) -> float:
        """Bytes that the backward pass of one run needs beside what was kept.

        While it computes, or while its experts' gradients are about to be cut: both weights' in float32 by then, the
        last made still in the dtype of the operands too.
        """
        again = max(0.0, self._saved(part) - self._kept(part))
        tensor = self.sizes["tensor"]
        own = self.tokens * (part.saved.wide + part.saved.inner / tensor)
        rows = self._rows(part) * (TRAVELLING if self.rows_travel else WORKING)
        computing = self._gathered(part) + again + rows + WORKING * own + self._without_kernel(part)
        uncut = [self._in_use(*weight) for weight in self._experts_cut_by_fsdp(part)]
        if self.rows_travel or not uncut:
            return computing
        return max(computing, 4 * sum(uncut) + self.work.operands * max(uncut))

    def _experts_cut_by_fsdp(self, part: Part) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
        """(shape, axes) of the experts' weights that are gathered for each use."""
        experts = (weight for path, weight in part.tensors.items() if "/experts/" in path)
        return [weight for weight in experts if self._cut(*weight).keys() & set(SHARED)]

    def _without_kernel(self, part: Part) -> float:
        """Bytes of products of experts whose width on a device no kernel takes: a loop over blocks of rows.

        Its result is float32, and XLA holds the one that the loop writes into beside the one that it started from.
        """
        moe = self.model.moe
        if not part.name.endswith("E") or not (moe.intermediate_size / self.sizes["tensor"]) % KERNEL_WIDTH:
            return 0.0
        return 2 * 4 * self.tokens * moe.top_k * self._expert_width()

    def _gathered(self, part: Part) -> float:
        """Bytes of weights that are put together for a block, and of gradients that are not cut yet.

        These are the largest float32 one; of experts on other devices, sums over the rounds of all of them.
        """
        gathered, largest, summed = 0.0, 0.0, 0.0
        # `Saved.copies` are the same weights. (Where rows travel they count once more: TRAVELLING was fitted so.)
        copied = part.saved.copies > 0 and not self.rows_travel
        for shape, axes in part.tensors.values():
            cut = self._cut(shape, axes)
            whole = self._in_use(shape, axes)
            if cut.keys() & set(SHARED):
                gathered += 0.0 if copied else self.work.operands * whole
                largest = max(largest, 4 * whole)
            if "expert" in cut and self.rows_travel:
                summed += (4 + self.work.operands) * whole
        return gathered + max(largest, summed)

    def _head(self) -> float:
        """Float32 logits of a chunk, their gradient, and that of the whole weight in float32 (model/logprobs.py)."""
        vocab = self.model.vocab_size / self.sizes["tensor"]
        chunk = min(self.tokens, max(1.0, MAX_LOGITS / vocab))
        weight = (4 + self.work.operands) * self.model.hidden_size * vocab
        return chunk * vocab * (4 + self.work.operands) + weight

    # Traffic

    def traffic(self, part: Part) -> dict[str, tuple[float, float]]:
        """{collective: (NVLink, network) bytes into a device} of one layer of a kind, in one step."""
        again = 2 if self.work.remat == "full" and part.name[-1] in "M*E-" else 1  # forward passes
        found: dict[str, tuple[float, float]] = {}
        # The head makes its gradients in the forward pass.
        gathers = part.runs * (1 if part.name == "head" else again + 1) * self.work.operands
        wide = self.tokens * self.model.hidden_size * self.work.operands
        if part.name == "embeddings":  # vectors are looked up where they are
            _add(found, "fsdp all-to-all", self._group(SHARED).exchange(2 * part.runs * wide))
        for shape, axes in part.tensors.values():
            cut = self._cut(shape, axes)
            here = math.prod(shape) / math.prod(cut.values())
            if cut.keys() & set(SHARED) and part.name != "embeddings":
                whole = self._in_use(shape, axes)
                _add(found, "fsdp all-gather", self._group(SHARED).gather(gathers * whole))
                _add(found, "fsdp reduce-scatter", self._group(SHARED).gather(4 * part.runs * whole))
            others = [axis for axis in (*mesh_axes("batch"), *mesh_axes("time")) if axis not in cut]
            reduced = self._group(others).gather(2 * 4 * here)  # to all of them: a reduce-scatter and a gather
            _add(found, "gradient all-reduce", reduced)
        if part.name[-1] in "M*E-":
            passes = part.runs * (again + 1)  # the last matmul in each forward pass, the input's gradient
            _add(found, "tensor all-reduce", self._group(["tensor"]).gather(2 * passes * wide))
        if part.name.endswith("E"):
            vector, group = self._expert_width() * self.work.operands, self._group(["expert"])
            if self.rows_travel:
                sent = part.runs * (2 + 3) * self.tokens * self.model.moe.top_k * vector
                _add(found, "expert all-to-all", group.exchange(sent))
            else:
                whole = part.runs * self.tokens * group.size * vector
                _add(found, "expert all-gather", group.gather((again + 1) * whole))
                _add(found, "expert reduce-scatter", group.gather(2 * whole))
        if part.name.endswith("*"):
            attention = self.model.attention
            heads = max(1.0, attention.num_kv_heads / self.sizes["tensor"])
            keys = 2 * self.rows * self.work.seq * heads * attention.head_dim * self.work.operands
            _add(found, "context all-gather", self._group(["context"]).gather(part.runs * (again + 2) * keys))
        if part.name.endswith("M"):
            mamba = self.model.mamba
            states = self.rows * self.sizes["context"] * mamba.inner_size / self.sizes["tensor"] * mamba.state_size * 4
            _add(found, "context all-gather", self._group(["context"]).gather(part.runs * (again + 1) * states))
        return {name: both for name, both in found.items() if any(both)}

    # Time

    def seconds(self, part: Part) -> dict[str, float]:
        """{resource: seconds that one layer of a kind keeps it busy in one step}, on H200s."""
        again = 2 if self.work.remat == "full" and part.name[-1] in "M*E-" else 1
        flops = part.runs * (2 + again) * part.flops * self.tokens / self.sizes["tensor"]
        weights = self._gathered_elements(part)
        saved = self.tokens * (part.saved.wide + part.saved.inner / self.sizes["tensor"]) + self._rows(part)
        # Weights are read in each pass and their gradient is written; what is saved is written, read, and its gradient
        # too. The optimizer reads and writes 7 float32 numbers a weight.
        moved = part.runs * ((again + 1) * self.work.operands + 4) * weights + 28 * self._elements(part)
        moved += part.runs * (2 + again) * 2 * saved
        nvlink, network = (sum(way) for way in zip((0.0, 0.0), *self.traffic(part).values(), strict=True))
        slow = 1 if self.work.operands < 4 else FLOAT32_SLOWDOWN
        return {
            "compute": flops * slow / PEAK_FLOPS,
            "HBM": moved / HBM_SPEED,
            "NVLink": nvlink / NVLINK,
            "network": network / INTERCONNECTS[self.work.interconnect].network,
        }

    # All of it

    def report(self) -> dict[str, Any]:
        """What the command prints: GB, and milliseconds of a step."""
        memory = self.memory()
        blocks: dict[str, Any] = {}
        bytes_of: dict[str, float] = {}
        totals = dict.fromkeys(("compute", "HBM", "NVLink", "network"), 0.0)
        for part in self.parts:
            seconds = self.seconds(part)
            for name, value in seconds.items():
                totals[name] += part.stored * value
            for name, ways in self.traffic(part).items():
                bytes_of[name] = bytes_of.get(name, 0.0) + part.stored * sum(ways)
            blocks[part.name] = {
                "layers": part.stored,
                "limit": max(seconds, key=lambda name: seconds[name]),
                "ms_a_layer": {name: round(1e3 * value, 4) for name, value in seconds.items()},
            }
        flops = 3 * sum(part.stored * part.runs * part.flops for part in self.parts)
        devices = math.prod(self.sizes.values())
        return {
            "devices": devices,
            "mesh": self.sizes,
            "batch": self.work.batch,
            "seq": self.work.seq,
            "remat": self.work.remat,
            "stack": self.stack.spell(self.model.pattern) if self.stack else None,
            "interconnect": self.work.interconnect,
            "memory_gb": {name: round(value / 1e9, 3) for name, value in memory.items()},
            "fits_h200": memory["total"] <= HBM_BYTES,
            "flops_per_device": flops * self.work.batch * self.work.seq / devices,
            "collective_gb": {name: round(value / 1e9, 3) for name, value in bytes_of.items()},
            "ms": {name: round(1e3 * value, 3) for name, value in totals.items()},
            "limit": max(totals, key=lambda name: totals[name]),
            "blocks": blocks,
        }


# Of what a block has saved, how much its backward pass holds beside at a time; and of its experts' rows where they
# travel, with their gradients, in rounds with room for half as many again. Fitted to compiled steps (BENCHMARKS.md).
WORKING, TRAVELLING = 0.5, 4.0
MAX_LOGITS = 2**29  # model/logprobs.py
KERNEL_WIDTH = 64  # pallas_kernels/grouped_matmul_mosaic.py: what it takes is a multiple


def _add(found: dict[str, tuple[float, float]], name: str, more: tuple[float, float]) -> None:
    before = found.get(name, (0.0, 0.0))
    found[name] = (before[0] + more[0], before[1] + more[1])
