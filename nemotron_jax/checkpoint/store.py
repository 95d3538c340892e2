"""Training checkpoints with Orbax: asynchronous, atomic, checked.

Layout of ``DIR/checkpoints/<step>/``: ``params`` (the canonical tree, ``layers/0/mixer/...``), ``buffers``,
``optimizer`` (moments, step number, skipped steps) and ``meta`` (JSON: data position, checksums). A step exists for
readers only once Orbax has committed it, so a kill during a save costs that save alone.

Each leaf carries a checksum, computed on the devices that hold it; a restored leaf must give the same one. A step
that cannot be read or does not match is reported and passed over for the one before.
"""

from __future__ import annotations

import errno
import inspect
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from nemotron_jax.errors import CheckpointError
from nemotron_jax.parallel.processes import everywhere

FORMAT = 1
ITEMS = ("params", "buffers", "optimizer")

Tree = dict[str, Any]


@dataclass(frozen=True)
class Restored:
    step: int
    items: Tree  # {item: tree like the template}
    data: dict[str, Any]  # position in the data


class CheckpointStore:
    """The checkpoints of one working directory.

    Args:
      directory: made when missing.
      keep: the newest ones that stay.
      keep_every: steps divisible by this stay for ever; 0: none.
      warn: told about damaged steps.

    Raises:
      CheckpointError: there is a file in the place of the directory.
    """

    def __init__(
        self, directory: Path, *, keep: int = 1, keep_every: int = 0, warn: Callable[[str], None] = logging.warning
    ) -> None:
        self.directory = directory.absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} should be a directory of checkpoints, but is a file: move it away."
            )
        self._warn = warn
        _quieten()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True
            ),
            item_names=(*ITEMS, "meta"),
        )

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: Tree, data: dict[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied. Raises CheckpointError if this or the last save failed."""
        meta = {"format": FORMAT, "data": data, "checksums": _checksums(items)}
        saves = {name: ocp.args.StandardSave(_nested(tree)) for name, tree in items.items()}
        with _failures_of_saving(self.directory, step):
            self._manager.save(step, args=ocp.args.Composite(**saves, meta=ocp.args.JsonSave(meta)))

    def wait(self) -> None:
        """Until the last save is committed. Raises CheckpointError if it failed."""
        with _failures_of_saving(self.directory, None):
            self._manager.wait_until_finished()

    def restore(self, template: Tree) -> Restored | None:
        """The newest step that is whole, or None where there is no checkpoint.

        Args:
          template: {item: tree of ShapeDtypeStruct with shardings}; the items named here are read.

        Raises:
          CheckpointError: there are checkpoints, but none of them can be used.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                restored = self._restore(step, template)
            except Exception as error:
                self._warn(f"checkpoint {step} in {self.directory} is damaged and passed over: {_first_line(error)}")
                continue
            for later in (later for later in steps if later > step):
                self._manager.delete(later)  # their steps are about to be trained again
            return restored
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self.directory} can be read: restore one from a backup, or start "
                "again with another --workdir."
            )
        return None

    def read(self, template: Tree, step: int | None = None) -> Restored:
        """One step (default: the newest that is whole) for a reader: nothing is deleted.

        Raises:
          CheckpointError: no such step, or it is damaged.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"there is no checkpoint of step {step} in {self.directory}; there are {steps}.")
        problems = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                return self._restore(candidate, template)
            except Exception as error:
                problems.append(f"step {candidate}: {_first_line(error)}")
                self._warn(f"checkpoint {candidate} in {self.directory} is damaged: {_first_line(error)}")
        raise CheckpointError(f"no checkpoint in {self.directory} can be read. {' '.join(problems)}")

    def _restore(self, step: int, template: Tree) -> Restored:
        args = {name: ocp.args.StandardRestore(_nested(tree)) for name, tree in template.items()}
        # A process reads its own part; one that goes on to another step alone would leave the others waiting.
        try:
            result = self._manager.restore(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonRestore()))
        except Exception:  # Orbax and TensorStore raise many kinds for damaged files
            everywhere(False)
            raise
        if not everywhere(True):
            raise CheckpointError("another process cannot read its part.")
        meta = result["meta"]
        if meta.get("format") != FORMAT:
            raise CheckpointError(f"it has format {meta.get('format')!r}, this version reads {FORMAT}.")
        items = {name: _like(tree, result[name]) for name, tree in template.items()}
        found = _checksums(items)
        wrong = [name for name, value in found.items() if meta["checksums"].get(name) != value]
        if wrong:
            raise CheckpointError(f"{len(wrong)} tensors do not match their checksums, the first is {wrong[0]}.")
        return Restored(step, items, meta["data"])

    def close(self) -> None:
        self._manager.close()


def _quieten() -> None:
    """Leaves the telling to our own messages.

    Orbax logs dozens of lines a save, and the traceback of one that fails, which is raised all the same. TensorStore
    then has its threads report each write that it gives up because Orbax has closed their event loop. And where one
    read fails, the others under way are dropped: Orbax turns each GeneratorExit into an error that nobody can catch.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.unraisablehook is not _report_unraisable:
        _REPORT.append(sys.unraisablehook)
        sys.unraisablehook = _report_unraisable


_REPORT: list[Callable[[Any], Any]] = []  # the hooks that were there before ours


def _report_unraisable(problem: Any) -> None:
    error = problem.exc_value
    write_given_up = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    read_given_up = isinstance(getattr(error, "__cause__", None), GeneratorExit) and inspect.iscoroutine(problem.object)
    if not write_given_up and not read_given_up:
        _REPORT[-1](problem)


class _failures_of_saving:
    """Turns errors of a save into a CheckpointError, after removing what the failed save left behind."""

    def __init__(self, directory: Path, step: int | None) -> None:
        self.directory, self.step = directory, step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        _remove_uncommitted(self.directory)
        full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        hint = "The disk is full: make room" if full else "Make sure that the directory can be written to"
        raise CheckpointError(
            f"saving a checkpoint to {self.directory} failed. {hint}, then run the same command again: it goes on from "
            f"the checkpoint before. ({_first_line(error)})"
        ) from error


def _remove_uncommitted(directory: Path) -> None:
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.is_dir() and not (path / "commit_success.txt").exists():
            for _ in range(50):  # writes that were under way when one failed still put files there
                shutil.rmtree(path, ignore_errors=True)
                if not path.exists():
                    break
                time.sleep(0.1)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def named_leaves(tree: Any) -> dict[str, Any]:
    """{``layers/0/mixer/D``: leaf}: paths of dict keys, attributes and positions; nnx Variables count as leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in flat}


def _name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if len(parts) > 1 and parts[-1] == "value":
        parts.pop()
    return "/".join(parts)


def _nested(tree: Any) -> Tree:
    """Nested dicts with string keys: what lies on disk does not depend on our Python types."""
    root: Tree = {}
    for name, leaf in named_leaves(tree).items():
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def _like(template: Any, nested: Tree) -> Any:
    """The leaves of nested dicts in the structure of the template."""

    def find(name: str) -> Any:
        node: Any = nested
        for part in name.split("/"):
            node = node[part]
        return node

    structure = jax.tree.structure(template)
    return jax.tree.unflatten(structure, [find(name) for name in named_leaves(template)])


def _checksums(items: Tree) -> dict[str, int]:
    leaves = {f"{item}/{name}": leaf for item, tree in items.items() for name, leaf in named_leaves(tree).items()}
    # Leaves in the memory of a host come one by one: together they may not fit on the devices.
    hosted = {name: leaf for name, leaf in leaves.items() if leaf.sharding.memory_kind == "pinned_host"}
    sums = _checksum_all({name: leaf for name, leaf in leaves.items() if name not in hosted})
    for name, leaf in hosted.items():
        sums[name] = _checksum_one(jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))).block_until_ready()
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def _checksum_all(leaves: dict[str, Array]) -> dict[str, Array]:
    return {name: _checksum(leaf) for name, leaf in leaves.items()}


def _checksum(leaf: Array) -> Array:
    """A uint32 that changes with any bit of a leaf and with the order of its elements; exact on any sharding.

    Floats narrower than float32 count as their float32 value, so that a leaf may be read as either.
    """
    if jnp.issubdtype(leaf.dtype, jnp.floating) and np.dtype(leaf.dtype).itemsize < 4:
        leaf = leaf.astype(jnp.float32)
    width = np.dtype(leaf.dtype).itemsize
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)
    weight = jnp.uint32(1)
    for axis, size in enumerate(bits.shape):
        position = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        weight = weight * jnp.uint32(_factor(size)) + position * jnp.uint32(2)
    return jnp.sum(bits * weight, dtype=jnp.uint32)


_checksum_one = jax.jit(_checksum)  # one program a shape, not one a name


def _factor(size: int) -> int:
    return (size * 2654435761 + 40503) % 2**32 | 1


def block_checksum(block: np.ndarray, start: Sequence[int], shape: tuple[int, ...]) -> int:
    """The share of a block, whose first element has index ``start``, in the checksum of a leaf of this shape.

    The weights of _checksum are a constant plus, for each axis, a multiple of the index along it. So sums along the
    axes are enough, which numpy makes at the speed of memory.
    """
    shift = 0
    if block.dtype.name == "bfloat16":  # its float32 value has these bits in front, and zeros behind
        bits, shift = block.view(np.uint16), 16
    elif block.dtype.kind in "iu":
        bits = block.view(f"u{block.dtype.itemsize}").astype(np.uint32, copy=False)
    else:
        bits = block.astype(np.float32, copy=False).view(np.uint32)
    scales = [1]
    for size in reversed(shape):
        scales.insert(0, scales[0] * _factor(size) % 2**32)
    total = 0
    for axis, (first, scale) in enumerate(zip(start, scales[1:], strict=True)):
        # Sums over the elements before and behind an axis, modulo the size of their type.
        sums = bits.reshape(*bits.shape[: axis + 1], -1).sum(-1, dtype=bits.dtype)
        sums = sums.reshape(-1, bits.shape[axis]).sum(0, dtype=bits.dtype).astype(np.uint64)
        positions = np.arange(first, first + len(sums), dtype=np.uint64)
        total += 2 * scale * int((sums * positions).sum(dtype=np.uint64))
        if axis == 0:
            total += scales[0] * int(sums.sum())
    if not shape:
        total = int(bits)
    return (total << shift) % 2**32


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming what it should have been."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as {what}: {_first_line(error)}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold {what}, a JSON object, but holds {type(value).__name__}.")
    return value
