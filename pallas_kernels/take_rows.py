"""Rows of a table by their numbers, as embeddings are looked up, with a gradient that is the same in every run.

    rows[i] = table[ids[i]]                d_table[v] = sum over the i with ids[i] = v of d_rows[i]

"reference": XLA's gather and scatter-add, which on GPUs adds in any order, by atomics.
"mosaic": on Hopper the gradient is a sum of outer products. Sorted by blocks of BLOCK rows of the table, the entries
of a block are a group, and with one-hot vectors of their places in it, d_table of the block = one_hot^T d_rows: the
weight gradient of the grouped matmul. Sums are float32 in a fixed order, and each row of the table is written once,
those that nobody asked for too. Widths that are no multiple of COLUMNS, and a last block of fewer rows, are padded,
which costs a copy of the gradient.

Shapes: V rows of the table, D width, M entries.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.cost import BF16, INT32, Cost
from pallas_kernels.dispatch import choose, require_shape
from pallas_kernels.grouped_matmul_kernels import outer_products
from pallas_kernels.grouped_matmul_mosaic import row_tiles, tile_columns, whole_atoms
from pallas_kernels.mosaic import Interpret
from pallas_kernels.permute import permute

BLOCK = 128  # rows of the table in a group: the tile of outer_products
COLUMNS = 64  # that outer_products takes at a time


def take_rows(
    table: jax.Array, ids: jax.Array, *, dtype: DTypeLike | None = None, impl: str | None = None
) -> jax.Array:
    """Look up rows; differentiable in the table.

    Args:
      table: [V, D].
      ids: [M] int, each in 0 .. V - 1.
      dtype: of the result; None is that of the table.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      [M, D]. The gradient has the dtype of the table; "mosaic" adds in float32.

    Raises:
      ValueError: shapes do not fit, or `impl` cannot run.
    """
    require_shape("take_rows", "table", table, "[V, D]", (None, None))
    require_shape("take_rows", "ids", ids, "[M]", (None,))
    table, ids = jnp.asarray(table), jnp.asarray(ids, jnp.int32)
    dtype = jnp.dtype(table.dtype if dtype is None else dtype)
    chosen = choose("take_rows", impl, unfit={"mosaic": _unfit(table, ids, dtype)})
    return _IMPLEMENTATIONS[chosen](table, ids, dtype)


def _unfit(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> str:
    """Why the kernel cannot take these operands, or ""."""
    if dtype != jnp.bfloat16 or table.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the rows must be bfloat16, of a bfloat16 or float32 table, got {dtype} of {table.dtype}"
    if ids.shape[0] == 0:
        return "there are no ids"
    return ""


def take_rows_reference(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[V, D], [M] -> [M, D]; the gradient is summed in float32 at least, though a table of fewer bits is given."""
    wide = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    return wide.at[ids].get(mode="promise_in_bounds").astype(dtype)


def take_rows_mosaic(table: jax.Array, ids: jax.Array, dtype: jnp.dtype, interpret: Interpret = None) -> jax.Array:
    """[V, D] bfloat16 or float32, [M] int32 -> [M, D] bfloat16."""
    assert dtype == jnp.bfloat16
    return _take(table.shape[0], table.dtype, interpret, table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _take(size: int, of_table: jnp.dtype, interpret: Interpret, table: jax.Array, ids: jax.Array) -> jax.Array:
    return take_rows_reference(table, ids, jnp.dtype(jnp.bfloat16))


def _take_fwd(size, of_table, interpret, table, ids):
    return _take(size, of_table, interpret, table, ids), ids


def _take_bwd(size, of_table, interpret, ids, d_rows):
    width = d_rows.shape[1]
    d_rows = jnp.pad(d_rows, ((0, 0), (0, -width % COLUMNS)))
    rows, group_sizes, row_map = permute(d_rows, (ids // BLOCK)[:, None], -(-size // BLOCK))
    place = jnp.zeros_like(ids).at[row_map[:, 0]].set(ids % BLOCK, unique_indices=True, mode="promise_in_bounds")
    one_hot = (place[:, None] == jnp.arange(BLOCK)).astype(rows.dtype)
    tiles = row_tiles(group_sizes, ids.shape[0])
    d_table = outer_products(
        whole_atoms(one_hot), whole_atoms(rows), tiles, tile_columns(rows.shape[1]), dtype=of_table, interpret=interpret
    )
    return d_table.reshape(-1, rows.shape[1])[:size, :width], None


_take.defvjp(_take_fwd, _take_bwd)

_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": take_rows_mosaic,
    "reference": take_rows_reference,
}


class Case(NamedTuple):
    """Shapes of one test or benchmark case; ``common``: share of the entries that are one and the same row."""

    name: str
    size: int
    width: int
    entries: int
    common: float = 0.0


CASES = (
    Case("few", 7, 5, 20),
    Case("blocks", 512, 128, 300),
    Case("padded", 300, 168, 260),
    Case("skewed", 256, 64, 203, common=0.8),
)


def example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random (args, kwargs) of `take_rows` for a case."""
    of_table, of_ids, of_common = jax.random.split(jax.random.key(seed), 3)
    table = jax.random.normal(of_table, (case.size, case.width), jnp.promote_types(dtype, jnp.float32)).astype(dtype)
    ids = jax.random.randint(of_ids, (case.entries,), 0, case.size, jnp.int32)
    ids = jnp.where(jax.random.uniform(of_common, ids.shape) < case.common, case.size // 3, ids)
    return (table, ids), {}


# The vocabulary of the released models and the width of Nano, 2 x 8192 tokens; in text the commonest token is every
# twentieth or so, and padding can be most of a batch.
BENCHMARKS = (
    Case("nano", 131072, 2688, 16384),
    Case("nano_skewed", 131072, 2688, 16384, common=0.5),
)


def cost(case: Case) -> Cost:
    """Copies; backward, their gradients are read and a whole table is written."""
    rows, ids = BF16 * case.entries * case.width, INT32 * case.entries
    return Cost(0.0, 2 * rows + ids, float(case.entries * case.width), rows + ids + BF16 * case.size * case.width)
