"""Grouped matmul on Hopper: the product, its two gradients, and how each is cut into tiles.

    forward             out[i]    = act(lhs[i] @ rhs[group of row i])
    gradient to lhs     d_lhs[i]  = d_out[i] @ rhs[group of row i]^T
    gradient to rhs     d_rhs[e]  = lhs[rows of e]^T @ d_out[rows of e]

bfloat16 operands and results, float32 accumulators; grouped_matmul_kernels.py holds the kernels.

Shapes: M rows, K inputs, N outputs, E groups, T row tiles.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul_kernels import ALIGN, TILE_ROWS, RowTiles, multiply_rows, outer_products
from pallas_kernels.mosaic import Interpret


def tile_columns(outputs: int) -> int:
    """Columns of the output that a tile has, by what was fastest.

    Milliseconds on an H200 with an earlier form of these kernels, in which the last tile of N cost a whole one whatever
    N was; 98,304 rows in 128 groups (Nano), 180,224 in 512 (Super), random sizes, the largest 3 times the mean.

        N     product                256 columns    192     128
        1856  Nano up, forward               1.62   1.57   1.78
        1856  Nano up, d_rhs                 1.67   1.61   1.87
        2688  Nano up, d_lhs                 1.67   1.59   1.79
        2688  Super up, forward              1.91   1.82   2.09
        2688  Super up, d_rhs                2.03   1.98   2.23
        1024  Super up, d_lhs                1.78   2.05   1.90
        2688  Super, decoding 22 rows               0.052  0.057
    """
    return 256 if outputs % 256 == 0 and outputs % 192 else 192


def unfit(lhs: jax.Array, rhs: jax.Array) -> str:
    """The reason why these operands cannot be taken, or ""."""
    if lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16:
        return f"lhs and rhs must be bfloat16, got {lhs.dtype} and {rhs.dtype}"
    if rhs.shape[1] % 64 or rhs.shape[2] % 64:
        return f"K and N must be multiples of 64, got {rhs.shape[1]} and {rhs.shape[2]}"
    if lhs.shape[0] == 0:
        return "lhs has no rows"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul_mosaic(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, activation: str | None, interpret: Interpret = None
) -> jax.Array:
    """[M, K], [E, K, N], [E] int32 -> [M, N], all bfloat16."""
    return _forward(lhs, rhs, group_sizes, activation, interpret)[0]


def _forward(lhs, rhs, group_sizes, activation, interpret):
    tiles = row_tiles(group_sizes, lhs.shape[0])
    columns = tile_columns(rhs.shape[2])
    out = multiply_rows(lhs, rhs, tiles, columns, activation=activation, interpret=interpret)
    # relu2 has derivative 2 max(z, 0) = 2 sqrt(out): rounding out to bfloat16 costs half of its relative error there.
    return out, (lhs, rhs, group_sizes, out if activation == "relu2" else None)


def _backward(activation, interpret, residuals, d_out):
    lhs, rhs, group_sizes, out = residuals
    inputs, outputs = rhs.shape[1:]
    if activation == "relu2":
        d_out = (d_out.astype(jnp.float32) * 2 * jnp.sqrt(out.astype(jnp.float32))).astype(lhs.dtype)
    tiles = row_tiles(group_sizes, lhs.shape[0])
    d_lhs = multiply_rows(d_out, rhs, tiles, tile_columns(inputs), transposed=True, interpret=interpret)
    lhs, d_out = whole_atoms(lhs), whole_atoms(d_out)
    return d_lhs, outer_products(lhs, d_out, tiles, tile_columns(outputs), interpret=interpret), None


grouped_matmul_mosaic.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_mlp_mosaic(
    x: jax.Array, up: jax.Array, down: jax.Array, group_sizes: jax.Array, interpret: Interpret = None
) -> jax.Array:
    """max(x @ up, 0)^2 @ down: [M, L], [E, L, F], [E, F, L], [E] int32 -> [M, L], all bfloat16.

    Beside two calls of the product it saves a pass over [M, F] in the backward pass: the derivative of the activation
    is multiplied where the gradient of the down projection is made.
    """
    return _mlp_forward(x, up, down, group_sizes, interpret)[0]


def _mlp_forward(x, up, down, group_sizes, interpret):
    tiles = row_tiles(group_sizes, x.shape[0])
    hidden = multiply_rows(x, up, tiles, tile_columns(up.shape[2]), activation="relu2", interpret=interpret)
    out = multiply_rows(hidden, down, tiles, tile_columns(down.shape[2]), interpret=interpret)
    return out, (x, up, down, group_sizes, hidden)


def _mlp_backward(interpret, residuals, d_out):
    x, up, down, group_sizes, hidden = residuals
    width, hidden_width = up.shape[1:]
    tiles = row_tiles(group_sizes, x.shape[0])
    rows_times = functools.partial(multiply_rows, tiles=tiles, transposed=True, interpret=interpret)
    d_product = rows_times(d_out, down, columns=tile_columns(hidden_width), slope_at=hidden)
    d_x = rows_times(d_product, up, columns=tile_columns(width))
    sums = functools.partial(outer_products, tiles=tiles, interpret=interpret)
    x, hidden, d_product, d_out = (whole_atoms(z) for z in (x, hidden, d_product, d_out))
    d_up = sums(x, d_product, columns=tile_columns(hidden_width))
    return d_x, d_up, sums(hidden, d_out, columns=tile_columns(width)), None


grouped_mlp_mosaic.defvjp(_mlp_forward, _mlp_backward)


def whole_atoms(z: jax.Array) -> jax.Array:
    """Rows up to a multiple of 8: a copy, but of few rows, or of none where a batch is even."""
    return jnp.pad(z, ((0, -z.shape[0] % ALIGN), (0, 0))) if z.shape[0] % ALIGN else z


@functools.partial(jax.jit, static_argnums=1)  # traced once for the many calls of a layer, which XLA merges
def row_tiles(group_sizes: jax.Array, rows: int) -> RowTiles:
    """Cut `rows` rows, sorted by group, into tiles; computed on the device in four small kernels."""
    groups = group_sizes.shape[0]
    most = (rows + (groups + 1) * (TILE_ROWS - 1)) // TILE_ROWS
    group = jnp.arange(groups + 1, dtype=jnp.int32)
    # A masked sum is one kernel, a cumulative sum of so few numbers four.
    size_before = jnp.where(group[:groups] < group[:, None], group_sizes, 0)
    size_until = jnp.where(group[:groups] <= group[:, None], group_sizes, 0)
    starts = jnp.minimum(size_before.sum(1, dtype=jnp.int32), rows)
    ends = jnp.where(group == groups, rows, jnp.minimum(size_until.sum(1, dtype=jnp.int32), rows))
    tiles = (ends - starts + TILE_ROWS - 1) // TILE_ROWS
    last = jnp.where(group <= group[:, None], tiles, 0).sum(1, dtype=jnp.int32)
    tile = jnp.arange(most, dtype=jnp.int32)
    mine = jnp.minimum((last <= tile[:, None]).sum(1, dtype=jnp.int32), groups)
    row = starts[mine] + (tile - (last - tiles)[mine]) * TILE_ROWS
    return RowTiles(mine, row, ends[mine], last, starts)
