"""The one sharding table: mesh axes, logical axes, and what follows from them.

Weights name *logical* axes where they are declared; RULES is the only place that says which mesh axis shards them.
The engine is GSPMD: parameters, optimizer moments and batches are placed by these rules and XLA inserts the
collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nemotron_jax.errors import ConfigError
from nemotron_jax.run_config import ParallelConfig

AXES = ("data", "fsdp", "expert", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "time": "context",
    # weights
    "vocab": "tensor",
    "embed": ("fsdp", "context"),  # gathered for each use: all devices of a row hold a part of every weight
    "latent": ("fsdp", "context"),
    "heads": "tensor",  # query heads and the inner channels of Mamba
    "kv_heads": "tensor",
    "groups": "tensor",  # Mamba's B and C
    "mlp": "tensor",
    "experts": "expert",  # whose rows travel to them
    "expert_weights": ("expert", "fsdp", "context"),  # whole experts: gathered without reordering any
    "expert_mlp": "tensor",
    "norm": None,
    "layers": None,  # of a stacked view (stack.py)
}
INSTEAD = {"expert_weights": "experts"}  # where the first does not divide a dimension; other dimensions take the rest


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all five axes over all devices; the axis given as -1 takes the devices that are left.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    asked = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in asked.values() if size > 0)
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in asked.items()}
    if math.prod(sizes.values()) != len(devices):
        multiple = " or a multiple" if -1 in asked.values() else ""
        raise ConfigError(
            f"the mesh {_spell(asked)} needs {fixed} devices{multiple}, but there are {len(devices)}: change "
            f"config.parallel so that the axes multiply to the number of devices{_one_that_would_do(asked, devices)}."
        )
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _one_that_would_do(asked: dict[str, int], devices: Sequence[jax.Device]) -> str:
    """``, such as fsdp=8``: for each axis the nearest size that makes the mesh fit, the others as they are."""
    fixed = math.prod(size for size in asked.values() if size > 0)
    good = {}
    for axis, size in asked.items():
        most, rest = divmod(len(devices), fixed // max(size, 1))
        if rest or size == -1:
            continue
        fits = [n for n in range(1, most + 1) if most % n == 0] if -1 in asked.values() else [most]
        good[axis] = min(fits, key=lambda n: abs(n - size))
    changed = {axis: size for axis, size in good.items() if size != asked[axis]}
    return f", such as {' or '.join(f'{axis}={size}' for axis, size in changed.items())}" if changed else ""


def _spell(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def describe(mesh: Mesh) -> str:
    """``data=4, fsdp=2``: the axes longer than one."""
    used = {axis: size for axis, size in mesh.shape.items() if size > 1}
    return _spell(used) if used else "one device"


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that shard a logical axis."""
    rule = RULES[name]
    return (rule,) if isinstance(rule, str) else rule or ()


def shards(name: str) -> int:
    """Parts into which the mesh of this trace (``jax.set_mesh``) cuts a logical axis; 1 outside of a mesh."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(axis, 1) for axis in mesh_axes(name))


def resolved(name: str, size: int, mesh: Mesh | AbstractMesh) -> str:
    """The logical axis by which a dimension of ``size`` is cut: itself, or what INSTEAD says."""
    cut = math.prod(mesh.shape[axis] for axis in mesh_axes(name))
    return INSTEAD.get(name, name) if size % cut else name


def spec(shape: Sequence[int], axes: Sequence[str], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """PartitionSpec of an array from its logical axes.

    A dimension that its mesh axes do not divide stays whole on every device (two key/value heads over four tensor
    devices), and a mesh axis is used once an array, by its first dimension.
    """
    used: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for size, name in zip(shape, axes, strict=True):
        wanted = tuple(axis for axis in mesh_axes(resolved(name, size, mesh)) if axis not in used)
        if wanted and size % math.prod(mesh.shape[axis] for axis in wanted) == 0:
            used.update(wanted)
            parts.append(wanted)
        else:
            parts.append(None)
    return PartitionSpec(*parts)


def uncut(shape: Sequence[int], axes: Sequence[str], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Logical axes of an array that are whole on each device because their mesh axes do not divide them."""
    parts = spec(shape, axes, mesh)
    used = {axis for part in parts for axis in ((part,) if isinstance(part, str) else part or ())}
    return tuple(
        name
        for name, part in zip(axes, parts, strict=True)
        if part is None and any(mesh.shape[axis] > 1 for axis in mesh_axes(name) if axis not in used)
    )


def kept_whole(tree: Any, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """{logical axis: bytes} of the matrices of a tree of nnx Variables that `uncut` leaves whole along it.

    Vectors are left out: they are small.
    """
    found: dict[str, int] = {}
    for variable in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        array = variable.get_value()
        for name in uncut(array.shape, variable.axes, mesh) if array.ndim > 1 else ():
            found[name] = found.get(name, 0) + array.size * array.dtype.itemsize
    return found


def shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of arrays or shapes.

    nnx Variables follow the logical axes that they were declared with, and so do optimizer moments, which are
    Variables too; everything else is replicated.
    """

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return replicated(mesh)
        return leaf.replace(NamedSharding(mesh, spec(leaf.get_value().shape, leaf.axes, mesh)))

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes as ShapeDtypeStructs that carry these shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of the [B, T] arrays of a batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["time"]))


def batch_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(i, n): the rows of a batch that the devices of a process (this one) hold are the i-th of n equal parts.

    Processes have the same part where an axis that does not divide the rows (context, tensor) goes over several.

    Raises:
      ConfigError: the rows of the processes overlap without being the same.
    """
    shards = math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())
    held: dict[int, set[int]] = {}  # rows of a batch of one row a shard, by process
    places = batch_sharding(mesh).devices_indices_map((shards, mesh.shape["context"]))
    for device, index in places.items():
        held.setdefault(_process(device), set()).add(index[0].indices(shards)[0])
    mine = held[jax.process_index() if process is None else process]
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != shards or len({len(rows) for rows in parts}) != 1:
        raise ConfigError(
            f"the mesh {describe(mesh)} does not fit {len(held)} processes: context * tensor "
            f"({mesh.shape['context'] * mesh.shape['tensor']}) and the number of devices of a process "
            f"({mesh.size // len(held)}) must divide one another."
        )
    return parts.index(tuple(sorted(mine))), len(parts)


def _process(device: Any) -> int:
    return device.process_index


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array) -> Array:
    """Keeps activations [B, T, ...] sharded over batch and time, rows contiguous; the identity outside of a mesh.

    A collective along the width would have XLA lay out the whole residual stream by columns, of which kernels and
    gathers read rows at a fraction of the memory's speed.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    names = ("batch", "time") + ("norm",) * (x.ndim - 2)
    x = jax.lax.with_sharding_constraint(x, spec(x.shape, names, mesh))
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if mesh.size > 1 else x
