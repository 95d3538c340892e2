"""Token dispatch of a mixture of experts: rows sorted by expert, and back with weights.

    permute:    rows[row_map[i, j]] = x[i]         for slot j of token i; rows sorted by expert, tokens in order
    unpermute:  y[i] = sum_j weights[i, j] rows[row_map[i, j]]

row_map is a permutation of 0 .. M*K - 1, so both directions, forward and backward, are gathers: no scatter-add whose
order could vary from run to run, no [tokens, experts] mask.

"reference": XLA gathers. "mosaic": rows that are copied as they are, or times one weight, are gathered by
gather_rows_mosaic.py; sums over the slots of a token stay XLA's. It has not run on a GPU, so it is not chosen unasked.

Shapes: M tokens, K experts of a token, D width, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import gather_rows_mosaic
from pallas_kernels.cost import BF16, FLOAT32, INT32, Cost
from pallas_kernels.dispatch import choose, require_shape


def permute(
    x: jax.Array, expert_ids: jax.Array, num_experts: int, *, impl: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Copy each token once per chosen expert, sorted by expert; differentiable in x.

    Args:
      x: [M, D].
      expert_ids: [M, K] int, each in 0 .. num_experts - 1.
      num_experts: E.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      rows [M*K, D] in x's dtype, sorted by expert (stable: tokens of one expert stay in order);
      group_sizes [E] int32, rows of each expert; row_map [M, K] int32, the row of each (token, slot).

    Raises:
      ValueError: shapes do not fit, or `impl` cannot run.
    """
    require_shape("permute", "x", x, "[M, D]", (None, None))
    require_shape("permute", "expert_ids", expert_ids, "[M, K]", (x.shape[0], None))
    unfit = {"mosaic": gather_rows_mosaic.unfit(x)}
    return _PERMUTE[choose("permute", impl, unfit=unfit)](x, expert_ids, num_experts)


def unpermute(rows: jax.Array, row_map: jax.Array, weights: jax.Array, *, impl: str | None = None) -> jax.Array:
    """Weighted sum over the experts of each token; differentiable in rows and weights.

    Args:
      rows: [M*K, D], in the order of `permute`.
      row_map: [M, K] int32 from `permute`.
      weights: [M, K] float.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      [M, D] in rows's dtype, summed in float32 (float64 for float64 inputs) in the order of the slots.

    Raises:
      ValueError: shapes do not fit, or `impl` cannot run.
    """
    require_shape("unpermute", "row_map", row_map, "[M, K]", (None, None))
    require_shape("unpermute", "rows", rows, "[M*K, D]", (row_map.size, None))
    require_shape("unpermute", "weights", weights, "[M, K]", row_map.shape)
    unfit = {"mosaic": gather_rows_mosaic.unfit(rows)}
    return _UNPERMUTE[choose("unpermute", impl, unfit=unfit)](rows, row_map, weights)


def _rows_at(rows, index, weights=None):
    """Each row times its weight, where there are weights, in float32 at least; in rows's dtype."""
    taken = rows.at[index].get(mode="promise_in_bounds")
    if weights is None:
        return taken
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    return (weights[:, None].astype(dtype) * taken.astype(dtype)).astype(rows.dtype)


Gather = Callable[..., jax.Array]  # rows [M, D], index [R], weights [R] or nothing -> [R, D], as `_rows_at`


def permute_reference(
    x: jax.Array, expert_ids: jax.Array, num_experts: int, gather: Gather = _rows_at
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sort the entries (token, slot) by expert and gather."""
    expert_of_row, entry_of_row = sorted_by_expert(expert_ids.reshape(-1).astype(jnp.int32), num_experts)
    row = jnp.arange(entry_of_row.size, dtype=jnp.int32)
    # Each expert's last row says where its rows end. The others' writes are dropped, each out of bounds in a place of
    # its own, so that the indices are unique.
    is_last = jnp.append(expert_of_row[1:] != expert_of_row[:-1], True)
    end = jnp.zeros((num_experts,), jnp.int32)
    end = end.at[jnp.where(is_last, expert_of_row, num_experts + row)].set(row + 1, mode="drop", unique_indices=True)
    group_sizes = jnp.diff(jax.lax.cummax(end), prepend=0)
    row_map = inverse(entry_of_row).reshape(expert_ids.shape)
    return _copy_rows(gather, x, entry_of_row, row_map), group_sizes, row_map


def sorted_by_expert(expert_of_entry: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """[M] int32 -> experts in ascending order and the entry of each row, [M]; entries of one expert stay in order."""
    entry = jnp.arange(expert_of_entry.size, dtype=jnp.int32)
    bits = max(expert_of_entry.size - 1, 0).bit_length()
    if num_experts << bits > np.iinfo(np.int32).max:
        experts, entries = jax.lax.sort((expert_of_entry, entry), num_keys=1, is_stable=True)
        return experts, entries
    # Both in one integer: half of the bytes for each pass of a radix sort.
    key = jax.lax.sort(expert_of_entry << bits | entry, is_stable=False)
    return key >> bits, key & (1 << bits) - 1


def inverse(permutation: jax.Array) -> jax.Array:
    """[M] -> [M], the inverse of a permutation; the indices are unique, so the scatter has one possible result."""
    index = jnp.arange(permutation.size, dtype=jnp.int32)
    return jnp.zeros_like(index).at[permutation].set(index, unique_indices=True, mode="promise_in_bounds")


def sum_over_slots(
    rows: jax.Array, row_map: jax.Array, weights: jax.Array | None = None, *, absent: bool = False
) -> jax.Array:
    """[R, D], [M, K] int32 -> [M, D] in rows's dtype: each token's rows, times their weights [M, K], added.

    absent: a slot may have a row past R, and then adds nothing. Summed in float32 (float64 for float64 inputs) in the
    order of the slots; gathered one slot at a time, so that [M, K, D] is never held.
    """
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    total = jnp.zeros((row_map.shape[0], rows.shape[1]), dtype)
    for slot in range(row_map.shape[1]):
        index = row_map[:, slot]
        row = rows.at[index].get(mode="fill", fill_value=0) if absent else _rows_at(rows, index)
        row = row.astype(dtype)
        total += row if weights is None else weights[:, slot, None].astype(dtype) * row
    return total.astype(rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _copy_rows(gather, x, entry_of_row, row_map):
    return gather(x, entry_of_row // row_map.shape[1])


def _copy_rows_fwd(gather, x, entry_of_row, row_map):
    return _copy_rows(gather, x, entry_of_row, row_map), row_map


def _copy_rows_bwd(gather, row_map, d_rows):
    return sum_over_slots(d_rows, row_map), None, None


_copy_rows.defvjp(_copy_rows_fwd, _copy_rows_bwd)


def unpermute_reference(
    rows: jax.Array, row_map: jax.Array, weights: jax.Array, gather: Gather = _rows_at
) -> jax.Array:
    """As `unpermute`."""
    return _unpermute(gather, rows, row_map, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpermute(gather, rows, row_map, weights):
    return sum_over_slots(rows, row_map, weights)


def _unpermute_fwd(gather, rows, row_map, weights):
    return _unpermute(gather, rows, row_map, weights), (rows, row_map, weights)


def _unpermute_bwd(gather, residuals, d_y):
    rows, row_map, weights = residuals
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    wide = d_y.astype(dtype)
    slots = range(row_map.shape[1])
    d_weights = jnp.stack([(wide * _rows_at(rows, row_map[:, slot]).astype(dtype)).sum(-1) for slot in slots], axis=1)
    entry_of_row = inverse(row_map.reshape(-1))
    weight_of_row = _rows_at(weights.reshape(-1), entry_of_row)
    d_rows = gather(d_y, entry_of_row // row_map.shape[1], weight_of_row)
    return d_rows, None, d_weights.astype(weights.dtype)


_unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)

_PERMUTE: dict[str, Callable[..., tuple[jax.Array, jax.Array, jax.Array]]] = {
    "reference": permute_reference,
    "mosaic": functools.partial(permute_reference, gather=gather_rows_mosaic.gather_rows),
}
_UNPERMUTE: dict[str, Callable[..., jax.Array]] = {
    "reference": unpermute_reference,
    "mosaic": functools.partial(unpermute_reference, gather=gather_rows_mosaic.gather_rows),
}


class Case(NamedTuple):
    """Shapes of one test or benchmark case."""

    name: str
    tokens: int
    slots: int
    width: int
    experts: int


CASES = (
    Case("one_expert", 5, 1, 3, 1),
    Case("one_slot", 17, 1, 4, 4),
    Case("several_slots", 23, 3, 5, 8),
    Case("more_experts_than_rows", 4, 2, 3, 32),
)


def example_inputs(case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random (args, kwargs) of `permute` for a case: the experts of a token are distinct, as a top-k gives them."""
    random = np.random.default_rng(seed)
    shape = (case.tokens, case.width)
    x = jax.random.normal(jax.random.key(seed), shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)
    scores = random.random((case.tokens, case.experts))
    expert_ids = jnp.asarray(np.argsort(-scores, axis=1)[:, : case.slots], jnp.int32)
    return (x, expert_ids, case.experts), {}


def unpermute_example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random (args, kwargs) of `unpermute` for a case; the weights are float32."""
    (_, expert_ids, experts), _ = example_inputs(case, seed, dtype)
    _, _, row_map = permute_reference(jnp.zeros((case.tokens, 1), dtype), expert_ids, experts)
    key_rows, key_weights = jax.random.split(jax.random.key(seed))
    shape = (case.tokens * case.slots, case.width)
    rows = jax.random.normal(key_rows, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)
    return (rows, row_map, jax.random.uniform(key_weights, row_map.shape, jnp.float32)), {}


# The tokens of grouped_matmul.BENCHMARKS.
BENCHMARKS = (
    Case("nano", 16384, 6, 2688, 128),
    Case("super", 8192, 22, 1024, 512),
    Case("ultra", 8192, 22, 2048, 512),
    Case("super_decode", 32, 22, 1024, 512),
)


def cost(case: Case) -> Cost:
    """Of `permute`: copies out, their gradients summed back."""
    entries = case.tokens * case.slots
    moved = BF16 * case.width * (case.tokens + entries) + INT32 * 2 * entries
    adds = float(entries * case.width)
    return Cost(0.0, moved, adds, moved)


def unpermute_cost(case: Case) -> Cost:
    """Of `unpermute`: a weighted sum; backward reads the rows again, for the gradient of the weights."""
    entries = case.tokens * case.slots
    token_bytes, row_bytes = BF16 * case.tokens * case.width, BF16 * entries * case.width
    small = (INT32 + FLOAT32) * entries
    adds = 2.0 * entries * case.width
    return Cost(
        adds, token_bytes + row_bytes + small, 2 * adds, token_bytes + 2 * row_bytes + small + FLOAT32 * entries
    )
