"""Functions of the part of their operands that each device holds: where kernels, sorts and collectives live.

XLA cannot cut a kernel (a custom call) or a sort into parts by itself; it would gather their operands. Between them
lie matmuls and elementwise work, which it shards by the sharding table alone.

Inside, no collective is hidden: an operand with fewer logical axes than the mesh has is whole on each device, and its
gradient is summed over the axes that it does not name. A result that is a partial sum over an axis has to be summed
there before it is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import PartitionSpec

from nemotron_jax.parallel.mesh import mesh_axes, shards

Axes = tuple[str | None, ...]


def per_device(
    function: Callable[..., Any], operands: Sequence[Axes | None], results: Any, *, whole: Sequence[str] = ()
) -> Callable[..., Any]:
    """``function`` under ``jax.shard_map``; itself where there is no mesh, or one device.

    Args:
      function: of arrays, or None in place of some.
      operands: logical axes of each operand (None, or an axis None: not sharded).
      results: logical axes of the results, a tuple for each, in the structure that the function returns.
      whole: logical axes to keep on each device as a whole.

    A logical axis that its mesh axes do not divide, in one of the operands, is whole on each device.

    Raises:
      ValueError: the time does not divide: its parts know of each other, so they cannot be whole.
    """

    def run(*arrays: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(*arrays)
        sizes = [
            (name, size)
            for axes, array in zip(operands, arrays, strict=True)
            if axes is not None and array is not None
            for name, size in zip(axes, array.shape, strict=True)
        ]
        for name, size in sizes:
            if name == "time" and name not in whole and size % shards(name):
                raise ValueError(f"{size} tokens of a row do not divide over {shards(name)} devices")
        kept = {name for name, size in sizes if name is not None and size % shards(name)} | set(whole)

        def spec(axes: Axes | None) -> PartitionSpec:
            names = (None if name is None or name in kept else mesh_axes(name) or None for name in axes or ())
            return PartitionSpec(*names)

        in_specs = tuple(None if array is None else spec(axes) for axes, array in zip(operands, arrays, strict=True))
        out_specs = jax.tree.map(spec, results, is_leaf=_is_axes)
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

    return run


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def gathered(part: Array, axes: Axes, shape: Sequence[int], names: Sequence[str] = ("embed", "latent")) -> Array:
    """Inside `per_device`: a part of a weight of ``shape``, made whole along the logical axes ``names``.

    The gradient is summed over the devices of these axes in its own dtype and cut back into parts.
    """
    for dimension, name in enumerate(axes):
        if name is not None and name in names and part.shape[dimension] < shape[dimension]:
            part = lax.all_gather(part, mesh_axes(name), axis=dimension, tiled=True)
    return part


def index(name: str) -> Array:
    """Inside `per_device`: which part of a logical axis this device holds."""
    return lax.axis_index(mesh_axes(name))
