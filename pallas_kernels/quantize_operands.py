"""NVFP4 where the product that follows is one of bfloat16: code * block scale in place of codes, along both axes.

    rows     code * scale of blocks of 16 columns
    columns  code * scale of blocks of 16 rows of H(x), which stays [M, N]

As `quantize` rounds (pallas_kernels/quantize.py), so that a GEMM of these operands and the two global scales is one of
NVFP4 tensors; without codes in between, which would be written and read again, and without a transposition.

Shapes: M rows (tokens), N columns.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import floats, quantize_operands_mosaic
from pallas_kernels.cost import BF16, Cost
from pallas_kernels.dispatch import choose, require_shape, sharded
from pallas_kernels.nvfp4 import BLOCK, e2m1_value, hadamard16_of, nvfp4_codes
from pallas_kernels.quantize import Case
from pallas_kernels.random_bits import DGRAD, WGRAD, random_bytes

Rounded = tuple[jax.Array, jax.Array]  # code * scale [M, N], and the e4m3 codes of the scales


def quantize_operands(
    x: jax.Array,
    amax: jax.Array | None,
    amax_columns: jax.Array | None,
    *,
    hadamard: bool = False,
    seed: jax.Array | None = None,
    impl: str | None = None,
) -> tuple[Rounded | None, Rounded | None]:
    """code * block scale of x along columns and along rows; the global scales are left out, as in `NVFP4.operand`.

    Args:
      x: [M, N] bfloat16 or float32, M and N multiples of 16.
      amax: float32 []: max |x| (`quantize.absolute_maxima`); None: without the first result.
      amax_columns: float32 []: the same after the transform; None: without the second.
      hadamard: transform every 16 rows before the second, in float32 and rounded to x's dtype.
      seed: uint32 [], for stochastic rounding; None: to nearest.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      Each a pair: code * scale [M, N] in x's dtype, exact, and the scales as e4m3 codes uint8: [M, N / 16] and
      [M / 16, N].

    Raises:
      ValueError: shapes or dtypes do not fit, nothing is wanted, or `impl` cannot run.
    """
    require_shape("quantize_operands", "x", x, "[M, N]", (None, None))
    for name, given in (("amax", amax), ("amax_columns", amax_columns)):
        if given is not None:
            require_shape("quantize_operands", name, given, "[]", ())
    if amax is None and amax_columns is None:
        raise ValueError("quantize_operands: give amax, amax_columns or both; without them there is no result")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"quantize_operands: x must be bfloat16 or float32, got {x.dtype}")
    if any(size % BLOCK for size in x.shape):
        raise ValueError(f"quantize_operands: M and N must be multiples of {BLOCK}, got {list(x.shape)}")
    return _IMPLEMENTATIONS[implementation(x, impl)](x, amax, amax_columns, hadamard, seed)


def implementation(x: jax.Array, impl: str | None = None) -> str:
    """The implementation that `quantize_operands` runs for x [M, N]."""
    return choose("quantize_operands", impl, unfit={"mosaic": quantize_operands_mosaic.unfit(x) or sharded()})


def quantize_operands_reference(
    x: jax.Array, amax: jax.Array | None, amax_columns: jax.Array | None, hadamard: bool, seed: jax.Array | None
) -> tuple[Rounded | None, Rounded | None]:
    """Arguments and results as of `quantize_operands`."""
    m, n = x.shape

    def rounded(blocks, axis, amax, stream):
        bits = None
        if seed is not None:
            bits = random_bytes(seed, stream, jnp.arange(m, dtype=jnp.uint32), n).reshape(blocks.shape)
        codes, scales = nvfp4_codes(blocks, amax.reshape(1, 1, 1), axis=axis, bits=bits)
        values = (e2m1_value(codes) * floats.e4m3_value(scales)).astype(x.dtype)
        return values.reshape(m, n), scales.reshape(m // 16 if axis == 1 else m, -1)

    rows = None if amax is None else rounded(x.reshape(m, n // BLOCK, BLOCK), 2, amax, DGRAD)
    if amax_columns is None:
        return rows, None
    blocks = x.reshape(m // BLOCK, BLOCK, n)
    if hadamard:
        blocks = hadamard16_of([blocks[:, i] for i in range(BLOCK)], axis=1)
    return rows, rounded(blocks, 1, amax_columns, WGRAD)


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Rounded | None, Rounded | None]]] = {
    "mosaic": quantize_operands_mosaic.quantize_operands,
    "reference": quantize_operands_reference,
}

# The inputs of a case are those of `quantize`.
CASES = (
    Case("one_block", 16, 16, True),
    Case("plain", 128, 192, False),
    Case("hadamard", 256, 128, True),
    Case("stochastic", 128, 192, True, True),
)

# 2 x 8192 tokens of Nano: activations, and the gradient of in_proj's output, whose 10,304 columns are 161 x 64.
BENCHMARKS = (
    Case("activation", 16384, 2688, True),
    Case("gradient", 16384, 2688, True, True),
    Case("in_proj_gradient", 16384, 10304, True, True),
)


def cost(case: Case) -> Cost:
    """x is read once, operands and scales are written twice."""
    return Cost(0.0, case.rows * case.columns * (BF16 + 2 * (BF16 + 1 / BLOCK)))
