"""A tensor in NVFP4 along both of its axes at once, as the three products of a training step want it.

    rows     quantize_nvfp4(x)            blocks of 16 columns, for the products that sum over columns
    columns  quantize_nvfp4(H(x^T))       blocks of 16 rows, for the weight gradient, which sums over rows (tokens)

H is the identity or the Hadamard transform of every 16 rows. Both are bit for bit what pallas_kernels/nvfp4.py says,
each with an amax of its own; stochastic rounding draws the bytes of pallas_kernels/random_bits.py, one stream for each.

Shapes: M rows (tokens), N columns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import floats, quantize_mosaic
from pallas_kernels.cost import BF16, Cost
from pallas_kernels.dispatch import choose, require_shape, sharded
from pallas_kernels.nvfp4 import BLOCK, NVFP4, hadamard16_of, quantize_nvfp4
from pallas_kernels.random_bits import DGRAD, WGRAD, random_bytes


def quantize(
    x: jax.Array,
    amax: jax.Array,
    amax_columns: jax.Array,
    *,
    hadamard: bool = False,
    seed: jax.Array | None = None,
    impl: str | None = None,
) -> tuple[NVFP4, NVFP4]:
    """Quantise to NVFP4 along columns and along rows.

    Args:
      x: [M, N] bfloat16 or float32, M and N multiples of 16.
      amax: float32 []: max |x|, which maps to the largest code and scale (`absolute_maxima`).
      amax_columns: float32 []: the same after the transform.
      hadamard: transform every 16 rows before the second, in float32 and rounded to x's dtype.
      seed: uint32 [], for stochastic rounding of both; None: to nearest.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      x: codes uint8 [M, N / 2], scales float8_e4m3fn [M, N / 16]; x^T: codes [N, M / 2], scales [N, M / 16].

    Raises:
      ValueError: shapes or dtypes do not fit, or `impl` cannot run.
    """
    require_shape("quantize", "x", x, "[M, N]", (None, None))
    require_shape("quantize", "amax", amax, "[]", ())
    require_shape("quantize", "amax_columns", amax_columns, "[]", ())
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"quantize: x must be bfloat16 or float32, got {x.dtype}")
    if any(size % BLOCK for size in x.shape):
        raise ValueError(f"quantize: M and N must be multiples of {BLOCK}, got {list(x.shape)}")
    chosen = choose("quantize", impl, unfit={"mosaic": quantize_mosaic.unfit(x) or sharded()})
    return _IMPLEMENTATIONS[chosen](x, amax, amax_columns, hadamard, seed)


def absolute_maxima(x: jax.Array, *, hadamard: bool = False) -> tuple[jax.Array, jax.Array]:
    """max |x| of x [M, N] and max |H(x^T)|, float32 []: what `quantize` is given, in one pass over x."""
    amax = floats.absolute_max(x)
    if not hadamard:
        return amax, amax
    blocks = x.reshape(-1, BLOCK, x.shape[1])
    return amax, floats.absolute_max(hadamard16_of([blocks[:, i] for i in range(BLOCK)], axis=1))


def quantize_reference(
    x: jax.Array, amax: jax.Array, amax_columns: jax.Array, hadamard: bool, seed: jax.Array | None
) -> tuple[NVFP4, NVFP4]:
    """Arguments and results as of `quantize`."""
    rounding, bits, bits_columns = "nearest", None, None
    if seed is not None:
        rounding, rows = "stochastic", jnp.arange(x.shape[0], dtype=jnp.uint32)
        bits, bits_columns = (random_bytes(seed, stream, rows, x.shape[1]) for stream in (DGRAD, WGRAD))
        bits_columns = bits_columns.T
    return (
        quantize_nvfp4(x, rounding=rounding, bits=bits, amax=amax),
        quantize_nvfp4(x.T, rounding=rounding, bits=bits_columns, hadamard=hadamard, amax=amax_columns),
    )


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[NVFP4, NVFP4]]] = {
    "mosaic": quantize_mosaic.quantize,
    "reference": quantize_reference,
}


class Case(NamedTuple):
    """Shape of one test or benchmark case."""

    name: str
    rows: int
    columns: int
    hadamard: bool
    stochastic: bool = False


CASES = (
    Case("one_block", 16, 16, True),
    Case("plain", 128, 192, False),
    Case("hadamard", 256, 128, True),
    Case("stochastic", 128, 192, True, True),
    Case("odd_blocks", 48, 80, True, True),
)

# 2 x 8192 tokens of Nano, and their 6 experts a token: activations, and gradients.
BENCHMARKS = (
    Case("activation", 16384, 2688, True),
    Case("activation_no_rht", 16384, 2688, False),
    Case("gradient", 16384, 2688, True, True),
    Case("experts", 98304, 2688, True),
    Case("experts_gradient", 98304, 1856, True, True),
)


def example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random (args, kwargs) of `quantize` for a case; the rows are of different sizes."""
    of_x, of_sizes = jax.random.split(jax.random.key(seed))
    sizes = jnp.exp2(jax.random.randint(of_sizes, (case.rows, 1), -6, 3).astype(jnp.float32))
    x = (jax.random.normal(of_x, (case.rows, case.columns), jnp.float32) * sizes).astype(dtype)
    settings: dict[str, Any] = {"hadamard": case.hadamard}
    if case.stochastic:
        settings["seed"] = jnp.uint32(seed + 7)
    return (x, *absolute_maxima(x, hadamard=case.hadamard)), settings


def cost(case: Case) -> Cost:
    """x is read once, codes and scales are written twice; the work of the arithmetic units is not counted."""
    return Cost(0.0, case.rows * case.columns * (BF16 + 2 * (1 / 2 + 1 / BLOCK)))
