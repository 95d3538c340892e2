"""Matrix products of the experts: each group of rows has its own weight.

    out[i] = act(lhs[i] @ rhs[group of row i])        rows sorted by group; group j holds group_sizes[j] of them

Rows past sum(group_sizes) give zeros (and get zero gradients). relu2(z) = max(z, 0)^2.

Shapes: M rows, K inputs, N outputs, E groups (experts).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import choose
from pallas_kernels.segments import require_shape

ACTIVATIONS = {None: lambda z: z, "relu2": lambda z: jnp.square(jax.nn.relu(z))}


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    activation: str | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Multiply each group of rows by its own matrix; differentiable in lhs and rhs.

    Args:
      lhs: [M, K], rows sorted by group.
      rhs: [E, K, N].
      group_sizes: [E] int32, each >= 0 (0 is an empty group), sum <= M.
      activation: None, or "relu2" applied to the float32 product before it is rounded.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      [M, N] in lhs's dtype, accumulated in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes do not fit, unknown activation, or `impl` cannot run.
    """
    require_shape("grouped_matmul", "lhs", lhs, "[M, K]", (None, None))
    require_shape("grouped_matmul", "rhs", rhs, "[E, K, N]", (None, lhs.shape[1], None))
    require_shape("grouped_matmul", "group_sizes", group_sizes, "[E]", (rhs.shape[0],))
    if activation not in ACTIVATIONS:
        raise ValueError(f"grouped_matmul: activation must be 'relu2' or None, got {activation!r}")
    product = _IMPLEMENTATIONS[choose("grouped_matmul", impl)](lhs, rhs, group_sizes.astype(jnp.int32))
    return ACTIVATIONS[activation](product).astype(lhs.dtype)


def grouped_matmul_reference(lhs, rhs, group_sizes):
    """[M, K], [E, K, N], [E] -> [M, N] in the accumulation dtype. XLA:CPU does E times the needed work here."""
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    return jax.lax.ragged_dot(
        lhs, rhs, group_sizes, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype
    )


_IMPLEMENTATIONS = {"reference": grouped_matmul_reference}


class Case(NamedTuple):
    """Shapes and features of one test or benchmark case; groups = len(group_sizes)."""

    name: str
    rows: int
    inputs: int
    outputs: int
    group_sizes: tuple[int, ...]
    activation: str | None = None


CASES = (
    Case("one_group", 13, 8, 6, (13,)),
    Case("uneven", 200, 12, 10, (3, 130, 1, 66)),
    Case("empty_groups", 150, 12, 10, (0, 70, 0, 0, 80, 0)),
    Case("rows_past_the_sum", 150, 12, 10, (10, 0, 65, 4)),
    Case("all_empty", 9, 5, 4, (0, 0, 0)),
    Case("relu2", 140, 12, 10, (64, 0, 7, 65), activation="relu2"),
    Case("decode", 22, 16, 24, tuple(1 if i % 3 else 0 for i in range(33)), activation="relu2"),
)


def example_inputs(case: Case, key: jax.Array, dtype=jnp.float32) -> tuple[tuple[jax.Array, ...], dict]:
    """Random (args, kwargs) of `grouped_matmul` for a case."""
    key_lhs, key_rhs = jax.random.split(key)
    lhs = jax.random.normal(key_lhs, (case.rows, case.inputs), dtype)
    rhs = jax.random.normal(key_rhs, (len(case.group_sizes), case.inputs, case.outputs), dtype)
    return (lhs, rhs, jnp.array(case.group_sizes, jnp.int32)), {"activation": case.activation}
