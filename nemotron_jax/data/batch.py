"""The one thing that the data pipeline hands to training: a batch of packed rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows; every array is [B, T] (or [T] for a single row), NumPy or JAX.

    tokens int32; targets int32: the token that follows each one; loss_weights float32: 0 where that next token
    belongs to another document or is padding; segment_ids int32: 1, 2, ... along a row, one number a document, 0 on
    padding; positions int32: from 0 at each document's first token in the row. ``extras`` holds further arrays.
    """

    tokens: Any
    targets: Any
    loss_weights: Any
    segment_ids: Any
    positions: Any
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows of [T] arrays -> one Batch of [B, T] NumPy arrays."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
