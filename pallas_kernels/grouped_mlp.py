"""The experts of a layer: each group of rows goes through its own two matrices, with relu2 between them.

    y[i] = relu2(x[i] @ up[group of row i]) @ down[group of row i]        relu2(z) = max(z, 0)^2

Two grouped matmuls; together, the backward pass need not make the gradient of the hidden rows and multiply it by the
derivative of relu2 in a pass of its own.

Shapes: M rows, L width, F hidden width, E groups (experts).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import grouped_matmul_mosaic
from pallas_kernels.cost import BF16, Cost
from pallas_kernels.dispatch import choose, require_shape
from pallas_kernels.grouped_matmul import grouped_matmul, random_loads


def grouped_mlp(
    x: jax.Array, up: jax.Array, down: jax.Array, group_sizes: jax.Array, *, impl: str | None = None
) -> jax.Array:
    """Send each group of rows through its own expert; differentiable in x, up and down.

    Args:
      x: [M, L], rows sorted by group.
      up: [E, L, F].
      down: [E, F, L].
      group_sizes: [E] int32, each >= 0 (0 is an empty group), sum <= M; rows past the sum give zeros.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      [M, L] in x's dtype. Products are accumulated in float32 (float64 for float64 inputs); the hidden rows are
      rounded to x's dtype after relu2.

    Raises:
      ValueError: shapes do not fit, or `impl` cannot run.
    """
    require_shape("grouped_mlp", "x", x, "[M, L]", (None, None))
    require_shape("grouped_mlp", "up", up, "[E, L, F]", (None, x.shape[1], None))
    require_shape("grouped_mlp", "down", down, "[E, F, L]", (up.shape[0], up.shape[2], x.shape[1]))
    require_shape("grouped_mlp", "group_sizes", group_sizes, "[E]", (up.shape[0],))
    unfit = grouped_matmul_mosaic.unfit(x, up) or grouped_matmul_mosaic.unfit(x, down)
    chosen = choose("grouped_mlp", impl, unfit={"mosaic": unfit})
    return _IMPLEMENTATIONS[chosen](x, up, down, group_sizes.astype(jnp.int32))


def _composed(impl: str) -> Callable[..., jax.Array]:
    """Two calls of an implementation of `grouped_matmul`."""

    def implementation(x, up, down, group_sizes):
        hidden = grouped_matmul(x, up, group_sizes, activation="relu2", impl=impl)
        return grouped_matmul(hidden, down, group_sizes, impl=impl)

    return implementation


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": grouped_matmul_mosaic.grouped_mlp_mosaic,
    "blocked": _composed("blocked"),
    "reference": _composed("reference"),
}


class Case(NamedTuple):
    """Shapes of one test or benchmark case; groups = len(group_sizes)."""

    name: str
    rows: int
    width: int
    hidden: int
    group_sizes: tuple[int, ...]


CASES = (
    Case("one_group", 13, 8, 6, (13,)),
    Case("uneven", 200, 12, 10, (3, 130, 1, 66)),
    Case("tiles", 300, 128, 192, (5, 0, 130, 150)),  # sizes that the Hopper kernels take
    Case("empty_groups_rows_past", 150, 12, 10, (0, 70, 0, 0, 60, 0)),
)


def example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random (args, kwargs) of `grouped_mlp` for a case."""
    groups = len(case.group_sizes)
    shapes = (case.rows, case.width), (groups, case.width, case.hidden), (groups, case.hidden, case.width)
    wide = jnp.promote_types(dtype, jnp.float32)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    arrays = (jax.random.normal(key, shape, wide).astype(dtype) for key, shape in zip(keys, shapes, strict=True))
    return (*arrays, jnp.array(case.group_sizes, jnp.int32)), {}


# The models of grouped_matmul.BENCHMARKS.
BENCHMARKS = (
    Case("nano", 98304, 2688, 1856, random_loads(98304, 128)),
    Case("super", 180224, 1024, 2688, random_loads(180224, 512)),
)


def cost(case: Case) -> Cost:
    """Two products forward, four backward, for which the hidden rows are kept; no group of BENCHMARKS is empty."""
    rows = sum(case.group_sizes)
    weights = 2 * len(case.group_sizes) * case.width * case.hidden
    product = 2.0 * rows * case.width * case.hidden
    ends, hidden = 2 * rows * case.width, rows * case.hidden
    return Cost(2 * product, BF16 * (ends + weights), 4 * product, BF16 * (1.5 * ends + hidden + 2 * weights))
