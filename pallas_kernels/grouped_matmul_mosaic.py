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
from jax.experimental import pallas as pl

from pallas_kernels.grouped_matmul_kernels import ALIGN, TILE_ROWS, Plan, RowTiles, multiply_rows, outer_products
from pallas_kernels.mosaic import Interpret


def choose_plan(direction: str, rows: int, inputs: int, outputs: int, groups: int) -> Plan:
    """The fastest plan measured for such shapes; direction: "forward", "d_lhs" or "d_rhs"."""
    del direction, inputs
    if rows <= 4 * groups:  # bound by reading the weights: many small tiles keep all multiprocessors at it
        return Plan(columns=64, stages=8)
    fits = min((192, 256, 128, 64), key=lambda c: (pl.cdiv(outputs, c) * c * (1 + 16 / c), -c))
    return Plan(columns=fits, stages={256: 4, 192: 4, 128: 6, 64: 8}[fits])


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
    rows = lhs.shape[0]
    tiles = row_tiles(group_sizes, rows)
    plan = choose_plan("forward", rows, rhs.shape[1], rhs.shape[2], rhs.shape[0])
    out = multiply_rows(lhs, rhs, tiles, plan, activation=activation, interpret=interpret)
    # relu2 has derivative 2 max(z, 0) = 2 sqrt(out): rounding out to bfloat16 costs half of its relative error there.
    return out, (lhs, rhs, group_sizes, out if activation == "relu2" else None)


def _backward(activation, interpret, residuals, d_out):
    lhs, rhs, group_sizes, out = residuals
    rows = lhs.shape[0]
    groups, inputs, outputs = rhs.shape
    if activation == "relu2":
        d_out = (d_out.astype(jnp.float32) * 2 * jnp.sqrt(out.astype(jnp.float32))).astype(lhs.dtype)
    tiles = row_tiles(group_sizes, rows)
    plan = choose_plan("d_lhs", rows, outputs, inputs, groups)
    d_lhs = multiply_rows(d_out, rhs, tiles, plan, transposed=True, interpret=interpret)
    plan = choose_plan("d_rhs", rows, inputs, outputs, groups)
    d_rhs = outer_products(_whole_atoms(lhs), _whole_atoms(d_out), tiles, plan, rhs.dtype, interpret)
    return d_lhs, d_rhs, None


grouped_matmul_mosaic.defvjp(_forward, _backward)


def _whole_atoms(z):
    """Rows up to a multiple of 8: a copy, but of few rows, or of none where a batch is even."""
    return jnp.pad(z, ((0, -z.shape[0] % ALIGN), (0, 0))) if z.shape[0] % ALIGN else z


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
