"""NVFP4 operands of experts: each as `quantize_operands` makes them alone, and the kernels interpreted on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize_operands
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.quantize import absolute_maxima
from pallas_kernels.quantize_expert_operands import (
    CASES,
    Case,
    example_inputs,
    expert_maxima,
    expert_maxima_reference,
    quantize_expert_operands,
    quantize_expert_operands_reference,
)
from pallas_kernels.quantize_expert_operands_mosaic import expert_maxima as maxima_kernel
from pallas_kernels.quantize_expert_operands_mosaic import quantize_expert_operands as kernel


def defined(case, rows, columns):
    """The bits of the rows that belong to experts."""
    filled = sum(-(-size // 16) * 16 for size in case.group_sizes)
    return [
        None if z is None else np.asarray(z.astype(jnp.bfloat16)).view(np.uint16)[:count]
        for z, count in ((rows, sum(case.group_sizes)), (columns, filled))
    ]


def same(case, got, want):
    for found, expected in zip(defined(case, *got), defined(case, *want), strict=True):
        np.testing.assert_equal(found, expected)


@pytest.mark.parametrize("case", [case for case in CASES if not case.stochastic], ids=lambda case: case.name)
def test_each_expert_is_a_tensor_of_its_own(case):
    (x, group_sizes, *maxima), settings = example_inputs(case, 1, jnp.bfloat16)
    together = jax.jit(lambda *z: quantize_expert_operands(*z, **settings))
    rows, columns = defined(case, *together(x, group_sizes, *maxima))
    longest = -(-max(case.group_sizes) // 16) * 16

    @jax.jit
    def of_one(alone):
        mine = absolute_maxima(alone, hadamard=case.hadamard)
        return mine, [z[0] for z in quantize_operands(alone, *mine, **settings)]

    first = first_block = 0
    for expert, size in enumerate(case.group_sizes):
        filled = -(-size // 16) * 16
        alone = np.zeros((longest, x.shape[1]), x.dtype)  # zeros behind an expert's rows are blocks of their own
        alone[:size] = x[first : first + size]
        if size:
            mine, values = of_one(alone)
            np.testing.assert_array_equal([z[expert] for z in maxima], mine)
            for_rows, for_columns = (np.asarray(z).view(np.uint16) for z in values)
            np.testing.assert_array_equal(rows[first : first + size], for_rows[:size])
            np.testing.assert_array_equal(columns[first_block : first_block + filled], for_columns[:filled])
        first, first_block = first + size, first_block + filled


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (Case("both, drawn", 150, 64, (1, 0, 130), True, True), (True, True)),
        pytest.param(Case("rows, drawn", 60, 64, (3, 33), False, True), (True, False), marks=pytest.mark.slow),
        pytest.param(Case("columns, padded", 50, 112, (17, 0, 20), True, True), (False, True), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_kernel(case, wanted, interpret):
    (x, group_sizes, *maxima), settings = example_inputs(case, 1, jnp.bfloat16)
    x = x.at[3, 5].set(-0.0).at[17].set(0).at[:16, 9].set(0).at[40:60, 8:40].mul(300)
    maxima = expert_maxima(x, group_sizes, hadamard=case.hadamard)
    maxima = [amax if given else None for amax, given in zip(maxima, wanted, strict=True)]
    rest = case.hadamard, settings.get("seed"), settings.get("entries")
    got = kernel(x, group_sizes, *maxima, *rest, interpret)
    same(case, got, quantize_expert_operands_reference(x, group_sizes, *maxima, *rest))


@pytest.mark.parametrize("hadamard", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_kernel_of_maxima(hadamard, interpret):
    case = Case("", 290, 304, (1, 33, 0, 130, 110), hadamard)
    (x, group_sizes, *_), _ = example_inputs(case, 2, jnp.bfloat16)
    x = x.at[280:].set(jnp.nan).at[270, 300].set(-100).at[3, 7].set(jnp.inf)
    got = maxima_kernel(x, group_sizes, hadamard, interpret)
    np.testing.assert_array_equal(got, expert_maxima_reference(x, group_sizes, hadamard))


def test_operands_that_do_not_fit():
    x, sizes, amax = jnp.ones((100, 192), jnp.bfloat16), jnp.array([60, 40]), jnp.ones(2)
    with pytest.raises(ValueError, match="give amax, amax_columns or both"):
        quantize_expert_operands(x, sizes, None, None)
    with pytest.raises(ValueError, match=r"amax must have shape \[E\] = \[2\], got \[\]"):
        quantize_expert_operands(x, sizes, amax[0], None)
    with pytest.raises(ValueError, match=r"entries must have shape \[M\] = \[100\], got \[2\]"):
        quantize_expert_operands(x, sizes, amax, None, seed=jnp.uint32(1), entries=amax)
    with pytest.raises(ValueError, match=r"multiple of 16, got \[100, 40\]"):
        quantize_expert_operands(x[:, :40], sizes, amax, None)
    with pytest.raises(ValueError, match="bfloat16 or float32, got float16"):
        expert_maxima(x.astype(jnp.float16), sizes)
    with compiling_for("sm_90a"):
        assert "mpmd_map" in str(jax.make_jaxpr(quantize_expert_operands)(x, sizes, amax, amax))
        assert "mpmd_map" not in str(jax.make_jaxpr(quantize_expert_operands)(x.astype(jnp.float32), sizes, amax, amax))
