"""Groups of rows, each filled up with zeros to whole blocks.

Shapes: M rows sorted by group, E groups, P rows of whole blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class WholeBlocks(NamedTuple):
    """Where rows go.

    Attributes:
      place: int32 [M], of each row; past the end for rows of no group.
      sizes: int32 [E], of the groups when filled up.
      expert_of_block: int32, E where there is none.
      rows: P, room for any group sizes.
    """

    place: jax.Array
    sizes: jax.Array
    expert_of_block: jax.Array
    rows: int

    def filled(self, z: jax.Array) -> jax.Array:
        """[M, N] -> [P, N]."""
        return jnp.zeros((self.rows, z.shape[1]), z.dtype).at[self.place].set(z, mode="drop", unique_indices=True)


def whole_rows(rows: int, groups: int, size: int) -> int:
    """P for M rows in any groups and blocks of ``size``."""
    return -(-(rows + groups * (size - 1)) // size) * size


def whole_blocks(group_sizes: jax.Array, rows: int, size: int) -> WholeBlocks:
    """Groups of ``rows`` rows padded to multiples of ``size``."""
    total = whole_rows(rows, len(group_sizes), size)
    sizes = -(-group_sizes // size) * size
    ends, padded_ends = jnp.cumsum(group_sizes), jnp.cumsum(sizes)
    row = jnp.arange(rows)
    expert = jnp.searchsorted(ends, row, side="right")
    shift = jnp.append(padded_ends - sizes - (ends - group_sizes), total)
    blocks = jnp.searchsorted(padded_ends, jnp.arange(0, total, size), side="right")
    return WholeBlocks(row + shift[expert], sizes, blocks, total)
