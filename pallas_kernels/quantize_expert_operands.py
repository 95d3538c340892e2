"""NVFP4 operands of routed experts: `quantize_operands` of each expert's rows, as a tensor of its own.

    rows     code * scale of blocks of 16 columns, row by row where x has them
    columns  code * scale of blocks of 16 rows of H(x): each expert's rows are filled up with zeros to whole blocks,
             and the blocks of all follow each other

An expert has an amax for each of the two. The kernel reads the rows where they are: what fills blocks up is made in
registers, so that the second result is the only padded array there is.

Shapes: M rows sorted by expert, N columns, E experts, P rows of whole blocks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import floats, quantize_expert_operands_mosaic, quantize_operands_mosaic
from pallas_kernels.cost import BF16, Cost
from pallas_kernels.dispatch import choose, require_shape, sharded
from pallas_kernels.grouped_matmul import random_loads
from pallas_kernels.nvfp4 import BLOCK, e2m1_value, hadamard16_of, nvfp4_codes
from pallas_kernels.random_bits import DGRAD, WGRAD, random_bytes
from pallas_kernels.whole_blocks import whole_blocks

Maxima = tuple[jax.Array, jax.Array]
Operands = tuple[jax.Array | None, jax.Array | None]


def quantize_expert_operands(
    x: jax.Array,
    group_sizes: jax.Array,
    amax: jax.Array | None,
    amax_columns: jax.Array | None,
    *,
    hadamard: bool = False,
    seed: jax.Array | None = None,
    entries: jax.Array | None = None,
    impl: str | None = None,
) -> Operands:
    """code * block scale of each expert's rows, along columns and along rows; without the global scales.

    Args:
      x: [M, N] bfloat16 or float32, rows sorted by expert; N a multiple of 16.
      group_sizes: [E] int32, sum <= M.
      amax: float32 [E]: max |x| of each expert (`expert_maxima`); None: without the first result.
      amax_columns: float32 [E]: the same after the transform; None: without the second.
      hadamard: transform every 16 rows before the second, in float32 and rounded to x's dtype.
      seed: uint32 [], for stochastic rounding; None: to nearest.
      entries: uint32 [M]: what the random bits of a row depend on beside the seed; None: its place.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      In x's dtype, exact: [M, N]; and [P, N], the experts' groups of rows each filled up to a multiple of 16, P as of
      `whole_blocks`. Rows past the last group may hold anything in both.

    Raises:
      ValueError: shapes or dtypes do not fit, nothing is wanted, or `impl` cannot run.
    """
    _check(x, group_sizes)
    for name, given in (("amax", amax), ("amax_columns", amax_columns)):
        if given is not None:
            require_shape("quantize_expert_operands", name, given, "[E]", group_sizes.shape)
    if amax is None and amax_columns is None:
        raise ValueError("quantize_expert_operands: give amax, amax_columns or both; without them there is no result")
    if entries is not None:
        require_shape("quantize_expert_operands", "entries", entries, "[M]", (len(x),))
    if seed is not None and entries is None:
        entries = jnp.arange(len(x), dtype=jnp.uint32)
    function = _IMPLEMENTATIONS[implementation(x, impl)][0]
    return function(x, group_sizes.astype(jnp.int32), amax, amax_columns, hadamard, seed, entries)


def expert_maxima(
    x: jax.Array, group_sizes: jax.Array | None, *, hadamard: bool = False, impl: str | None = None
) -> Maxima:
    """max |x| and max |H(x)| of each expert's rows, float32 [E]: what `quantize_expert_operands` is given.

    group_sizes: None: one expert has all rows.
    """
    if group_sizes is not None:
        group_sizes = group_sizes.astype(jnp.int32)
    _check(x, group_sizes)
    return _IMPLEMENTATIONS[implementation(x, impl)][1](x, group_sizes, hadamard)


def implementation(x: jax.Array, impl: str | None = None) -> str:
    """The implementation that `quantize_expert_operands` runs for x [M, N]."""
    unfit = quantize_operands_mosaic.unfit(x) or sharded()
    return choose("quantize_expert_operands", impl, unfit={"mosaic": unfit})


def _check(x: jax.Array, group_sizes: jax.Array | None) -> None:
    require_shape("quantize_expert_operands", "x", x, "[M, N]", (None, None))
    if group_sizes is not None:
        require_shape("quantize_expert_operands", "group_sizes", group_sizes, "[E]", (None,))
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"quantize_expert_operands: x must be bfloat16 or float32, got {x.dtype}")
    if x.shape[1] % BLOCK:
        raise ValueError(f"quantize_expert_operands: N must be a multiple of {BLOCK}, got {list(x.shape)}")


def quantize_expert_operands_reference(
    x: jax.Array,
    group_sizes: jax.Array,
    amax: jax.Array | None,
    amax_columns: jax.Array | None,
    hadamard: bool,
    seed: jax.Array | None,
    entries: jax.Array | None,
) -> Operands:
    """Arguments and results as of `quantize_expert_operands`."""
    m, n = x.shape
    last = len(group_sizes) - 1

    def values(blocks, amax, axis, bits):
        bits = None if bits is None else bits.reshape(blocks.shape)
        codes, scales = nvfp4_codes(blocks, amax[:, None, None], axis=axis, bits=bits)
        return (e2m1_value(codes) * floats.e4m3_value(scales)).astype(x.dtype).reshape(-1, n)

    def bits(stream):
        return None if seed is None or entries is None else random_bytes(seed, stream, entries, n)

    rows = columns = None
    if amax is not None:
        expert_M = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(m), side="right")
        rows = values(x.reshape(m, -1, BLOCK), amax[jnp.minimum(expert_M, last)], 2, bits(DGRAD))
    if amax_columns is not None:
        whole = whole_blocks(group_sizes, m, BLOCK)
        drawn = bits(WGRAD)
        blocks = _blocks(whole.filled(x), hadamard)
        drawn = None if drawn is None else whole.filled(drawn)
        columns = values(blocks, amax_columns[jnp.minimum(whole.expert_of_block, last)], 1, drawn)
    return rows, columns


def expert_maxima_reference(x: jax.Array, group_sizes: jax.Array | None, hadamard: bool) -> Maxima:
    """Arguments and results as of `expert_maxima`."""
    group_sizes = jnp.array([len(x)], jnp.int32) if group_sizes is None else group_sizes
    whole = whole_blocks(group_sizes, len(x), BLOCK)
    filled = whole.filled(x)
    zeros = jnp.zeros(len(group_sizes), jnp.float32)
    of_blocks = (floats.absolute_max(_blocks(filled, turn), axis=(1, 2)) for turn in (False, hadamard))
    plain, turned = (zeros.at[whole.expert_of_block].max(largest, mode="drop") for largest in of_blocks)
    return plain, turned


def _blocks(filled: jax.Array, hadamard: bool) -> jax.Array:
    """[P, N] -> [P / 16, 16, N], transformed."""
    blocks = filled.reshape(-1, BLOCK, filled.shape[1])
    return hadamard16_of([blocks[:, i] for i in range(BLOCK)], axis=1) if hadamard else blocks


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Operands], Callable[..., Maxima]]] = {
    "mosaic": (
        quantize_expert_operands_mosaic.quantize_expert_operands,
        quantize_expert_operands_mosaic.expert_maxima,
    ),
    "reference": (quantize_expert_operands_reference, expert_maxima_reference),
}


class Case(NamedTuple):
    """Shape of one test or benchmark case; experts = len(group_sizes)."""

    name: str
    rows: int
    columns: int
    group_sizes: tuple[int, ...]
    hadamard: bool
    stochastic: bool = False


CASES = (
    Case("one_block", 16, 16, (16,), True),
    Case("uneven", 200, 64, (3, 130, 0, 66), False),
    Case("rows_past_the_sum", 150, 128, (10, 0, 65, 4), True),
    Case("stochastic", 170, 64, (1, 33, 130), True, True),
    Case("all_empty", 9, 64, (0, 0), True),
)

# 2 x 8192 tokens of Nano, 6 experts each: the rows of up_proj, and the gradients of its output.
BENCHMARKS = (
    Case("nano", 98304, 2688, random_loads(98304, 128), True),
    Case("nano_gradient", 98304, 1856, random_loads(98304, 128), True, True),
    Case("super_gradient", 180224, 1024, random_loads(180224, 512), True, True),
)


def example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random (args, kwargs) of `quantize_expert_operands` for a case; experts are of different sizes."""
    of_x, of_sizes, of_entries = jax.random.split(jax.random.key(seed), 3)
    sizes = jnp.exp2(jax.random.randint(of_sizes, (case.rows, 1), -6, 3).astype(jnp.float32))
    x = (jax.random.normal(of_x, (case.rows, case.columns), jnp.float32) * sizes).astype(dtype)
    group_sizes = jnp.array(case.group_sizes, jnp.int32)
    settings: dict[str, Any] = {"hadamard": case.hadamard}
    if case.stochastic:
        entries = jax.random.permutation(of_entries, case.rows).astype(jnp.uint32)
        settings |= {"seed": jnp.uint32(seed + 7), "entries": entries}
    return (x, group_sizes, *expert_maxima_reference(x, group_sizes, case.hadamard)), settings


def cost(case: Case) -> Cost:
    """x is read once, operands are written twice."""
    return Cost(0.0, 3 * BF16 * sum(case.group_sizes) * case.columns)
