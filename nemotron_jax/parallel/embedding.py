"""Rows of a table that no device holds: cut over the vocabulary ("tensor") and the width ("fsdp" and "context").

The table stays where it is. Devices that share its width exchange their tokens, look all of them up in their part of
the columns, and hand the results to the devices of the tokens: [B, T, D] travels instead of the table [V, D], which is
ten times larger at 8,192 tokens a device. Parts of the vocabulary are summed, all but one being zero.

Shapes: B batch, T time, D model width, V vocabulary, Z devices that share a width.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from nemotron_jax.parallel.local import index, per_device
from nemotron_jax.parallel.mesh import mesh_axes
from pallas_kernels import take_rows


def lookup(table: Array, tokens: Array, dtype: DTypeLike) -> Array:
    """table [V, D] float32, tokens [B, T] int32 -> their rows [B, T, D] in ``dtype``; the gradient is float32."""
    vocab, width = table.shape

    def of_device(part: Array, tokens: Array) -> Array:
        cut_width = part.shape[1] < width
        if cut_width:
            tokens = lax.all_gather(tokens, mesh_axes("embed"))  # [Z, B, T]
        if part.shape[0] < vocab:
            place = tokens - index("vocab") * part.shape[0]
            inside = (place >= 0) & (place < part.shape[0])
            rows = jnp.where(inside[..., None], _at(part, jnp.where(inside, place, 0), dtype), 0)
        else:
            rows = _at(part, tokens, dtype)
        if cut_width:
            return lax.all_to_all(rows, mesh_axes("embed"), split_axis=0, concat_axis=3, tiled=True)
        return rows[None]

    run = per_device(of_device, (("vocab", "embed"), ("batch", "time")), ("vocab", "batch", "time", None))
    return run(table, tokens).sum(0, dtype=dtype)


def _at(part: Array, place: Array, dtype: DTypeLike) -> Array:
    return take_rows(part, place.reshape(-1), dtype=dtype).reshape(*place.shape, part.shape[1])
