"""The products of a grouped matmul one by one, for operands of which each product has its own.

    multiply_groups   out[i] = act(scale[e] lhs[i] @ rhs[e])                  row i of group e
    sum_groups        out[e] = scale[e] lhs[rows of e]^T @ d_out[rows of e]

Scales are those that quantised operands leave out: they multiply the float32 sums, which are then rounded once.
Not differentiable. The implementations are those of `grouped_matmul`.

Shapes: M rows sorted by group, K inputs, N outputs, E groups.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import grouped_matmul_mosaic
from pallas_kernels.dispatch import choose, require_shape
from pallas_kernels.grouped_matmul import ACTIVATIONS, outer_products_blocked, rows_times_blocked
from pallas_kernels.grouped_matmul_kernels import multiply_rows, outer_products
from pallas_kernels.grouped_matmul_mosaic import row_tiles, tile_columns, whole_atoms
from pallas_kernels.mosaic import Interpret


def multiply_groups(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    scale: jax.Array,
    *,
    transposed: bool = False,
    activation: str | None = None,
    dtype: DTypeLike | None = None,
    impl: str | None = None,
    interpret: Interpret = None,
) -> jax.Array:
    """Each group of rows times its matrix.

    Args:
      lhs: [M, K].
      rhs: [E, K, N], or transposed [E, N, K].
      group_sizes: [E] int32, sum <= M; rows past the sum give zeros.
      scale: float32 [E].
      activation: None or "relu2".
      dtype: of the result; None: that of lhs.
      impl: implementation name of `grouped_matmul`, None to choose. "mosaic" gives bfloat16 alone.

    Returns:
      [M, N].

    Raises:
      ValueError: shapes do not fit, or `impl` cannot run.
    """
    inner = 2 if transposed else 1
    require_shape("grouped_matmul", "rhs", rhs, "[E, N, K]" if transposed else "[E, K, N]", _of_rhs(lhs, inner))
    require_shape("grouped_matmul", "scale", scale, "[E]", group_sizes.shape)
    dtype = jnp.dtype(lhs.dtype if dtype is None else dtype)
    unfit = grouped_matmul_mosaic.unfit(lhs, rhs) or ("" if dtype == jnp.bfloat16 else f"a result of {dtype}")
    if _choose(impl, unfit) == "mosaic":
        tiles = row_tiles(group_sizes, lhs.shape[0])
        columns = tile_columns(rhs.shape[3 - inner])
        settings = {"transposed": transposed, "activation": activation, "interpret": interpret}
        return multiply_rows(lhs, rhs, tiles, columns, scale=scale, **settings)
    product = rows_times_blocked(lhs, rhs, group_sizes, "mn,kn->mk" if transposed else "mk,kn->mn")
    of_rows = jnp.repeat(scale, group_sizes, total_repeat_length=lhs.shape[0])
    return ACTIVATIONS[activation](product * of_rows[:, None]).astype(dtype)


def sum_groups(
    lhs: jax.Array,
    d_out: jax.Array,
    group_sizes: jax.Array,
    scale: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    impl: str | None = None,
    interpret: Interpret = None,
) -> jax.Array:
    """The sums of outer products of each group's rows.

    Args:
      lhs: [M, K]; rows past the last group may hold anything, here and in d_out.
      d_out: [M, N].
      group_sizes: [E] int32, sum <= M.
      scale: float32 [E].
      dtype: of the result; "mosaic": bfloat16 or float32.
      impl: as of `multiply_groups`.

    Returns:
      [E, K, N], zero for empty groups.

    Raises:
      ValueError: shapes do not fit, or `impl` cannot run.
    """
    require_shape("grouped_matmul", "d_out", d_out, "[M, N]", (lhs.shape[0], None))
    require_shape("grouped_matmul", "scale", scale, "[E]", group_sizes.shape)
    like_rhs: Any = jax.ShapeDtypeStruct((len(group_sizes), lhs.shape[1], d_out.shape[1]), d_out.dtype)
    dtype = jnp.dtype(dtype)
    fits = dtype in (jnp.bfloat16, jnp.float32)
    unfit = grouped_matmul_mosaic.unfit(lhs, like_rhs) or ("" if fits else f"a result of {dtype}")
    if _choose(impl, unfit) == "mosaic":
        tiles = row_tiles(group_sizes, lhs.shape[0])
        columns = tile_columns(d_out.shape[1])
        lhs, d_out = whole_atoms(lhs), whole_atoms(d_out)
        return outer_products(lhs, d_out, tiles, columns, dtype=dtype, scale=scale, interpret=interpret)
    return (outer_products_blocked(lhs, d_out, group_sizes) * scale[:, None, None]).astype(dtype)


def _choose(impl: str | None, unfit: str) -> str:
    return choose("grouped_matmul", impl, unfit={"mosaic": unfit, "reference": "products one by one"})


def _of_rhs(lhs: jax.Array, inner: int) -> tuple[int | None, ...]:
    return tuple(lhs.shape[1] if axis == inner else None for axis in range(3))
