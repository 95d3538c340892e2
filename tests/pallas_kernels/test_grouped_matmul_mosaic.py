"""The Hopper kernels in the interpreter, which simulates TMA, barriers and wgmma and finds races."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, grouped_matmul, grouped_matmul_kernels
from pallas_kernels import grouped_matmul_mosaic as mosaic
from pallas_kernels.grouped_matmul_kernels import TILE_ROWS
from tests.pallas_kernels.test_grouped_mlp import loop as mlp_loop


def loop(lhs, rhs, d_out, sizes, activation):
    """Product and gradients in float64, group by group; zero past the last."""
    lhs, rhs, d_out = (np.asarray(z, np.float64) for z in (lhs, rhs, d_out))
    out, d_lhs, d_rhs = np.zeros((len(lhs), rhs.shape[2])), np.zeros_like(lhs), np.zeros_like(rhs)
    start = 0
    for i, size in enumerate(sizes):
        rows = slice(start, start + size)
        start += size
        z, d = lhs[rows] @ rhs[i], d_out[rows]
        if activation == "relu2":
            z, d = np.maximum(z, 0) ** 2, 2 * np.maximum(z, 0) * d
        out[rows], d_lhs[rows], d_rhs[i] = z, d @ rhs[i].T, lhs[rows].T @ d
    return out, d_lhs, d_rhs


# Columns of a tile, activation, M, K, N, and sizes of the groups, of which each runs in the same compiled program.
CASES = {
    # One group longer than a tile, others shorter than an atom of 8 rows; N is one and a half tiles; rows past the sum.
    "narrow_last_tile": (128, None, 200, 64, 192, [(3, 0, 130, 1, 0, 50)]),
    # K is one and a half tiles of the gradient to rhs, the last group ends in the middle of a step; no rows past it.
    "half_rows": (64, "relu2", 160, 192, 64, [(100, 0, 44), (0, 0, 160)]),
    # M is no multiple of 8; nothing at all; every row; N is less than a tile.
    "few_rows": (192, None, 22, 64, 128, [(0, 1, 0, 5, 4), (0, 0, 0, 0, 0), (9, 0, 13, 0, 0)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_races(name, interpret, monkeypatch):
    monkeypatch.setattr(grouped_matmul_kernels, "NUM_SMS", 2)
    columns, activation, rows, inputs, outputs, all_sizes = CASES[name]
    monkeypatch.setattr(mosaic, "tile_columns", lambda outputs: columns)
    random = np.random.default_rng(0)
    lhs, rhs, d_out = (
        jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
        for shape in ((rows, inputs), (len(all_sizes[0]), inputs, outputs), (rows, outputs))
    )

    @jax.jit
    def run(lhs, rhs, sizes, d_out):
        function = functools.partial(mosaic.grouped_matmul_mosaic, group_sizes=sizes)
        out, vjp = jax.vjp(lambda lhs, rhs: function(lhs, rhs, activation=activation, interpret=interpret), lhs, rhs)
        return out, *vjp(d_out)

    for sizes in all_sizes:
        past = np.arange(rows)[:, None] >= sum(sizes)  # these rows may hold anything
        got = run(jnp.where(past, jnp.nan, lhs), rhs, jnp.array(sizes, jnp.int32), jnp.where(past, jnp.nan, d_out))
        for result, want in zip(got, loop(lhs, rhs, d_out, sizes, activation), strict=True):
            assert result.dtype == jnp.bfloat16
            result = np.asarray(result, np.float64)
            # relu2's derivative comes from a rounded output and is rounded again.
            assert np.linalg.norm(result - want) <= 4e-3 * np.linalg.norm(want)
            np.testing.assert_allclose(result, want, rtol=2**-6, atol=0.02 * np.abs(want).max())


# Columns of a tile, M, L, F, and sizes of the groups.
MLP_CASES = {
    # F is one and a half tiles, so a tile has one or two blocks of the derivative; a group's last tile is one row, so
    # one warpgroup passes by; M is no multiple of 8; rows past the sum.
    "narrow_last_tile": (128, 200 + 3, 64, 192, [(3, 0, 129, 1, 0, 50), (0, 203, 0, 0, 0, 0)]),
    # More blocks in a tile than slots in the ring.
    "whole_ring": (320, 90, 64, 320, [(90,), (0,)]),
}


@pytest.mark.parametrize("name", MLP_CASES)
def test_mlp_values_gradients_and_races(name, interpret, monkeypatch):
    monkeypatch.setattr(grouped_matmul_kernels, "NUM_SMS", 2)
    columns, rows, width, hidden, all_sizes = MLP_CASES[name]
    monkeypatch.setattr(mosaic, "tile_columns", lambda outputs: columns)
    random = np.random.default_rng(0)
    groups = len(all_sizes[0])
    x, up, down, d_out = (
        jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
        for shape in ((rows, width), (groups, width, hidden), (groups, hidden, width), (rows, width))
    )

    @jax.jit
    def run(x, up, down, sizes, d_out):
        out, vjp = jax.vjp(lambda *floats: mosaic.grouped_mlp_mosaic(*floats, sizes, interpret), x, up, down)
        return out, *vjp(d_out)

    for sizes in all_sizes:
        past = np.arange(rows)[:, None] >= sum(sizes)  # these rows may hold anything
        taken = jnp.where(past, jnp.nan, x), up, down, jnp.array(sizes, jnp.int32), jnp.where(past, jnp.nan, d_out)
        for result, want in zip(run(*taken), mlp_loop(x, up, down, sizes, d_out), strict=True):
            assert result.dtype == jnp.bfloat16
            result = np.asarray(result, np.float64)
            assert np.linalg.norm(result - want) <= 5e-3 * np.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "groups"),
    [
        (5003, 2688, 1856, 16),
        (5000, 1856, 2688, 16),
        (9001, 1024, 2688, 128),
        (9000, 2688, 1024, 128),
        (22, 1024, 2688, 64),
    ],
)
@pytest.mark.parametrize("activation", [None, "relu2"])
def test_on_a_gpu(rows, inputs, outputs, groups, activation):
    """Ten draws, each with rows past the sum that hold NaN, against float64; the same bits in a second run."""

    @jax.jit
    def run(lhs, rhs, sizes, d_out):
        function = functools.partial(grouped_matmul, group_sizes=sizes, activation=activation, impl="mosaic")
        out, vjp = jax.vjp(function, lhs, rhs)
        return out, *vjp(d_out)

    for seed in range(10):
        random = np.random.default_rng(seed)
        sizes = random.multinomial(random.integers(rows + 1), random.dirichlet(np.full(groups, 0.5))).astype(np.int32)
        lhs, rhs, d_out = (
            jnp.asarray(random.standard_normal(shape, np.float32), jnp.bfloat16)
            for shape in ((rows, inputs), (groups, inputs, outputs), (rows, outputs))
        )
        past = np.arange(rows)[:, None] >= sizes.sum()
        arguments = jnp.where(past, jnp.nan, lhs), rhs, jnp.asarray(sizes), jnp.where(past, jnp.nan, d_out)
        got, again = run(*arguments), run(*arguments)
        for result, repeated, want in zip(got, again, loop(lhs, rhs, d_out, sizes, activation), strict=True):
            np.testing.assert_array_equal(result, repeated)
            assert np.linalg.norm(np.asarray(result, np.float64) - want) <= 1e-2 * np.linalg.norm(want)


def test_operands_that_do_not_fit():
    def ones(*shape, dtype=jnp.bfloat16):
        return jnp.ones(shape, dtype)

    sizes = jnp.array([2, 3])
    with dispatch.compiling_for("sm_90a"):
        for lhs, rhs, reason in (
            (ones(5, 64, dtype=jnp.float32), ones(2, 64, 64), "must be bfloat16, got float32 and bfloat16"),
            (ones(5, 96), ones(2, 96, 64), "K and N must be multiples of 64, got 96 and 64"),
            (ones(0, 64), ones(2, 64, 64), "lhs has no rows"),
        ):
            assert grouped_matmul(lhs, rhs, sizes).shape == (len(lhs), 64)  # another implementation runs
            with pytest.raises(ValueError, match=reason):
                grouped_matmul(lhs, rhs, sizes, impl="mosaic")


def test_row_tiles_cover_every_row_once():
    random = np.random.default_rng(0)
    rows, groups = 1000, 9
    cut = jax.jit(mosaic.row_tiles, static_argnums=1)
    for _ in range(50):
        total = random.integers(rows + 1)
        sizes = random.multinomial(total, random.dirichlet(np.full(groups, 0.3))).astype(np.int32)
        tiles = jax.device_get(cut(sizes, rows))
        group_of_row = np.repeat(np.arange(groups + 1), [*sizes, rows - total])
        owners = np.zeros(rows, int)
        for t in range(tiles.last[-1]):
            mine = slice(tiles.row[t], min(tiles.end[t], tiles.row[t] + TILE_ROWS))
            assert mine.start < mine.stop
            assert (group_of_row[mine] == tiles.group[t]).all()
            owners[mine] += 1
        assert (owners == 1).all()
        np.testing.assert_array_equal(tiles.starts, np.append(0, np.cumsum(sizes)))
