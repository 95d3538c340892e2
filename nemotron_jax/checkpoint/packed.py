"""Quantised weights as they lie on disk -> packed weights of the model, with their scales verbatim.

A leaf of ours is packed when every tensor that it comes from is quantised in one way and a matmul is what it is for.
Others (the head, experts of which some are quantised otherwise) are dequantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from nemotron_jax.checkpoint import modelopt
from nemotron_jax.checkpoint.hf import Entry
from nemotron_jax.checkpoint.hf_directory import HFDirectory
from nemotron_jax.parallel.mesh import spec
from pallas_kernels.packed import Packed


def is_packable(source: HFDirectory, path: str) -> bool:
    """Whether a leaf (``layers/3/mixer/out_proj/weight``) can stay as it is stored."""
    schemes = {source.scheme(entry) for entry in source.table.of_leaf[path]}
    formats = {scheme and scheme.algo == modelopt.FP8 for scheme in schemes}
    return len(formats) == 1 and None not in schemes and path.startswith(("layers/", "mtp/"))


def read_packed(source: HFDirectory, path: str, axes: Sequence[str], dense: Sharding) -> Packed:
    """One leaf, each device's part read for that device alone.

    Args:
      path, axes: of the leaf, its logical axes.
      dense: how the leaf would be sharded if it were not packed.
    """
    entries = source.table.of_leaf[path]
    shape = source.table.shapes[path]
    stacked = entries[0].expert is not None
    scheme = source.scheme(entries[0])
    assert scheme is not None
    swapped = (*axes[:-2], axes[-1], axes[-2])
    before = sum(entries[0].rows[: entries[0].leaves.index(path)])

    def matrix(suffix: str, columns: int) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            rows, inputs = (slice(*part.indices(size)[:2]) for part, size in zip(index[-2:], local, strict=True))

            def of(entry: Entry) -> np.ndarray:
                stored = source.module(entry)[suffix]
                array = stored.rows(before + rows.start, before + rows.stop)[:, inputs]
                return source.report.check_finite(f"{entry.module}.{suffix}", array)

            return np.stack([of(entry) for entry in entries[index[0]]]) if stacked else np.array(of(entries[0]))

        local = (shape[-1], columns)
        whole = (*shape[:-2], *local)
        return jax.make_array_from_callback(whole, _sharding(whole, swapped, dense), part)

    def scale(index: Any) -> np.ndarray:
        chosen = entries[index[0]] if stacked else entries[:1]
        values = np.stack([_global_scale(source, entry) for entry in chosen])
        return values if stacked else values[0]

    inputs = shape[-2]
    if scheme.algo == modelopt.FP8:
        codes, blocks = matrix("weight", inputs), None
    else:
        codes = matrix("weight_packed" if scheme.compressed else "weight", inputs // 2)
        blocks = matrix("weight_scale", inputs // modelopt.BLOCK)
    scales = shape[:-2]
    packed = Packed(
        codes, blocks, jax.make_array_from_callback(scales, _sharding(scales, axes[: len(scales)], dense), scale)
    )
    for entry in entries:
        source.release(entry)
    return packed


def _global_scale(source: HFDirectory, entry: Entry) -> np.ndarray:
    """weight_scale_2 (NVFP4) or weight_scale (FP8) of one module, float32 []."""
    scheme = source.scheme(entry)
    assert scheme is not None
    stored = {suffix: tensor.rows() for suffix, tensor in source.module(entry).items() if len(tensor.shape) < 2}
    return source.report.check_finite(entry.module, modelopt.global_scale(scheme, stored))


def _sharding(shape: Sequence[int], axes: Sequence[str], dense: Sharding) -> Sharding:
    if not isinstance(dense, NamedSharding):
        return dense
    assert isinstance(dense.mesh, Mesh)
    return NamedSharding(dense.mesh, spec(shape, axes, dense.mesh))
