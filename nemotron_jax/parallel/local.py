"""Functions of the part of their operands that each device holds: where kernels, sorts and collectives live.

XLA cannot cut a kernel (a custom call) or a sort into parts by itself; it would gather their operands. Between them
lie matmuls and elementwise work, which it shards by the sharding table alone.

Inside, no collective is hidden: an operand with fewer logical axes than the mesh has is whole on each device, and its
gradient is summed over the axes that it does not name. A result that is a partial sum over an axis has to be summed
there before it is returned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from nemotron_jax.parallel.mesh import mesh_axes, resolved, shards

Axes = tuple[str | None, ...]


def per_device(
    function: Callable[..., Any], operands: Sequence[Axes | None], results: Any, *, whole: Sequence[str] = ()
) -> Callable[..., Any]:
    """``function`` under ``jax.shard_map``; itself where there is no mesh, or one device.

    Args:
      function: of arrays, or None in place of some.
      operands: logical axes of each operand (None, or an axis None: not sharded).
      results: logical axes of the results, a tuple for each, in the structure that the function returns; taken as they
        are (mesh.INSTEAD goes by a shape).
      whole: logical axes to keep on each device as a whole.

    A logical axis that its mesh axes do not divide, in one of the operands, is whole on each device.
    """

    def run(*arrays: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(*arrays)
        cut = [
            None
            if axes is None or array is None
            else [(name and resolved(name, size, mesh), size) for name, size in zip(axes, array.shape, strict=True)]
            for axes, array in zip(operands, arrays, strict=True)
        ]
        sizes = [size for one in cut for size in one or ()]
        kept = {name for name, size in sizes if name is not None and size % shards(name)} | set(whole)

        alone = tuple(axis for axis, size in mesh.shape.items() if size == 1)

        def spec(axes: Axes | None) -> PartitionSpec:
            names: list[tuple[str, ...]] = []
            for name in axes or ():
                wanted = () if name is None or name in kept else mesh_axes(name)
                names.append(tuple(axis for axis in wanted if not any(axis in others for others in names)))
            if names:  # axes of one device: named somewhere, no sum over them is made
                names[0] += tuple(axis for axis in alone if not any(axis in others for others in names))
            return PartitionSpec(*(axes or None for axes in names))

        in_specs = tuple(
            None if array is None else spec(None if one is None else tuple(name for name, _ in one))
            for one, array in zip(cut, arrays, strict=True)
        )
        out_specs = jax.tree.map(spec, results, is_leaf=_is_axes)
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

    return run


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def gathered(part: Array, axes: Axes, shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Inside `per_device`: the part of a weight of ``shape`` made whole along the axes of FSDP ("embed", "latent", or
    "expert_weights": whole experts, but those of this device alone).

    It travels in ``dtype``. The gradient is summed over the devices in the dtype of the part, and cut back into parts.
    """
    dimension = _cut_by_fsdp(part, axes, shape)
    return part.astype(dtype) if dimension is None else _gather(dimension, jnp.dtype(dtype), part.dtype, part)


def together(x: Array, weights: Any) -> tuple[Array, Any]:
    """The identity; in the backward pass no gradient of the two leaves before that of the other is there.

    Gradients of weights travel, and XLA schedules what is not needed soon for the end, where nothing is left to hide
    it behind. Tied to a gradient that other layers wait for, they travel while those are computed. Those of vectors
    are left out: they are small, and would wait for the large ones before them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x, weights
    leaves, tree = jax.tree.flatten(weights)
    trained = [i for i, leaf in enumerate(leaves) if leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not trained:
        return x, weights
    x, tied = _together(x, [leaves[i] for i in trained])
    for i, leaf in zip(trained, tied, strict=True):
        leaves[i] = leaf
    return x, jax.tree.unflatten(tree, leaves)


def after(x: Array, tree: Any) -> Any:
    """The leaves of a tree, there when ``x`` is and not before; nothing of it in the backward pass.

    What is gathered of them cannot start earlier, and queues behind what was: collectives run one after the other, in
    the order in which they start.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _after(lax.stop_gradient(x), leaves))


@jax.custom_vjp
def _after(x: Array, leaves: list[Array]) -> list[Array]:
    return lax.optimization_barrier((x, leaves))[1]


def _after_fwd(x: Array, leaves: list[Array]) -> tuple[list[Array], None]:
    return _after(x, leaves), None


def _after_bwd(_: None, gradients: list[Array]) -> tuple[None, list[Array]]:
    return None, gradients


_after.defvjp(_after_fwd, _after_bwd)


@jax.custom_vjp
def _together(x: Array, weights: list[Array]) -> tuple[Array, list[Array]]:
    return x, weights


def _together_fwd(x: Array, weights: list[Array]) -> tuple[tuple[Array, list[Array]], None]:
    return (x, weights), None


def _together_bwd(_: None, gradients: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
    return lax.optimization_barrier(gradients)


_together.defvjp(_together_fwd, _together_bwd)


def scattered(whole: Array, axes: Axes, part: Array, shape: Sequence[int]) -> Array:
    """The transpose of `gathered`: a sum over the devices, each with its ``part``."""
    dimension = _cut_by_fsdp(part, axes, shape)
    return whole if dimension is None else _scatter(dimension, whole)


def _cut_by_fsdp(part: Array, axes: Axes, shape: Sequence[int]) -> int | None:
    # parts that a gathered dimension stays in
    here: dict[str | None, int] = {"embed": 1, "latent": 1, "expert_weights": shards("experts")}
    cut = [d for d, size in enumerate(shape) if axes[d] in here and part.shape[d] * here[axes[d]] < size]
    return cut[0] if cut else None  # a mesh axis cuts one dimension of an array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(dimension: int, dtype: jnp.dtype, master: jnp.dtype, part: Array) -> Array:
    return lax.all_gather(part.astype(dtype), mesh_axes("embed"), axis=dimension, tiled=True)


def _scatter(dimension: int, whole: Array) -> Array:
    # XLA would add up the gradients of a weight that is used more than once, and keep them whole until the last of them
    # is there: those of the head, which Ultra's training uses three times, took 12.9 GB through the backward pass.
    part = lax.psum_scatter(whole, mesh_axes("embed"), scatter_dimension=dimension, tiled=True)
    return lax.optimization_barrier(part)


def _gather_fwd(dimension: int, dtype: jnp.dtype, master: jnp.dtype, part: Array) -> tuple[Array, None]:
    return _gather(dimension, dtype, master, part), None


def _gather_bwd(dimension: int, dtype: jnp.dtype, master: jnp.dtype, _: None, d: Array) -> tuple[Array]:
    return (_scatter(dimension, d.astype(master)),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def index(name: str) -> Array:
    """Inside `per_device`: which part of a logical axis this device holds."""
    return lax.axis_index(mesh_axes(name))
