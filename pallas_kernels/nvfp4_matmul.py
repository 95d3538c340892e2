"""Products of two NVFP4 tensors, as tensor cores that know the format compute them and as any others do.

    out[m, n] = alpha * sum over k of (code_a[m, k] block_a[m, k / 16]) (code_b[n, k] block_b[n, k / 16])
    alpha     = the scales of both tensors, amax / (6 * 448) each, applied to the float32 sum

"cudnn" is jax.nn.scaled_matmul: XLA makes a call of cuDNN's block-scaled matmul of it where the compute capability is
10.x, with padding to tiles of 128 rows and the order of scales that tcgen05.mma wants. "reference" multiplies
code * block scale, which is exact in bfloat16, by a plain GEMM. Both sum the same products, in another order.

Shapes: M and N rows, K the summed axis, last in both, in blocks of 16.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels import floats
from pallas_kernels.cost import FLOAT32, Cost
from pallas_kernels.dispatch import choose
from pallas_kernels.nvfp4 import BLOCK, NVFP4, quantize_nvfp4


def nvfp4_matmul(a: NVFP4, b: NVFP4, *, impl: str | None = None) -> Array:
    """a [..., K] times b [N, K], both quantised along K -> float32 [..., N]; not differentiable.

    Args:
      a, b: scales of 16x16 blocks are repeated over their rows, as NVFP4 has them; amax of the tensor or of its rows.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Raises:
      ValueError: shapes do not fit, or `impl` cannot run.
    """
    if b.codes.ndim != 2 or a.codes.shape[-1] != b.codes.shape[-1]:
        raise ValueError(
            "nvfp4_matmul: expected a [..., K] and b [N, K], both quantised along the same K, got "
            f"a {_shape(a)} and b {_shape(b)}: quantise the transpose of what has K elsewhere"
        )
    *rows, halves = a.codes.shape
    codes, scales = a.codes.reshape(-1, halves), a.scales.reshape(-1, a.scales.shape[-1])
    product = _IMPLEMENTATIONS[choose("nvfp4_matmul", impl)](codes, scales, b.codes, b.scales)
    alpha = a.global_scale().reshape(-1, 1) * b.global_scale().reshape(1, -1)
    return (product * alpha).reshape(*rows, len(b.codes))


def _shape(tensor: NVFP4) -> list[int]:
    return [*tensor.codes.shape[:-1], 2 * tensor.codes.shape[-1]]


def nvfp4_matmul_reference(a_codes: Array, a_scales: Array, b_codes: Array, b_scales: Array) -> Array:
    """Codes [M, K / 2] and [N, K / 2] with their block scales -> float32 [M, N], without alpha."""
    one = jnp.float32(1)
    a, b = (NVFP4(*tensor, one).operand(jnp.bfloat16) for tensor in ((a_codes, a_scales), (b_codes, b_scales)))
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def nvfp4_matmul_cudnn(a_codes: Array, a_scales: Array, b_codes: Array, b_scales: Array) -> Array:
    """The same, by codes and scales."""
    a, a_scales = _for_cudnn(a_codes, a_scales)
    b, b_scales = _for_cudnn(b_codes, b_scales)
    return jax.nn.scaled_matmul(a, b, a_scales, b_scales, preferred_element_type=jnp.float32)[0]


def _for_cudnn(codes: Array, scales: Array) -> tuple[Array, Array]:
    """float4_e2m1fn [1, M, K] and float8_e4m3fn [1, M, K / 16]; K padded to 32: rows of whole 16 bytes."""
    odd = scales.shape[-1] % 2
    codes = jnp.pad(codes, ((0, 0), (0, odd * BLOCK // 2)))
    scales = jnp.pad(floats.e4m3_bits(scales), ((0, 0), (0, odd)))
    pairs = lax.bitcast_convert_type(codes, jnp.float4_e2m1fn)  # the low nibble first
    return pairs.reshape(1, len(codes), -1), floats.as_e4m3(scales)[None]


_IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "cudnn": nvfp4_matmul_cudnn,
    "reference": nvfp4_matmul_reference,
}


class Case(NamedTuple):
    """[rows, inner] times [outputs, inner]."""

    name: str
    rows: int
    inner: int
    outputs: int


CASES = (
    Case("one_block", 1, 16, 8),
    Case("odd_sizes", 37, 272, 48),
    Case("tiles", 128, 128, 256),
)

# Layers of Super that its recipe trains in NVFP4, at 8192 tokens: y = x w, and the gradient of w.
BENCHMARKS = (
    Case("super_in_proj", 8192, 4096, 18560),
    Case("super_in_proj_dw", 4096, 8192, 18560),
    Case("super_shared_up", 8192, 4096, 5376),
)


def example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[Array, ...], dict[str, Array]]:
    """Codes, block scales (as uint8) and amax of both tensors, then the two before they were quantised, in dtype."""
    keys = jax.random.split(jax.random.key(seed), 2)
    shapes = (case.rows, case.inner), (case.outputs, case.inner)
    full = [jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True)]
    # A tenth of the size every few rows, so that block scales differ.
    full = [z * 10.0 ** -(jnp.arange(len(z)) % 3)[:, None] for z in full]
    tensors = [quantize_nvfp4(z) for z in full]
    arrays = [part for t in tensors for part in (t.codes, floats.e4m3_bits(t.scales), t.amax)]
    return (*arrays, *(z.astype(dtype) for z in full)), {}


def cost(case: Case) -> Cost:
    """One product."""
    m, k, n = case.rows, case.inner, case.outputs
    return Cost(2.0 * m * k * n, (m + n) * k * (1 / 2 + 1 / BLOCK) + FLOAT32 * m * n)
