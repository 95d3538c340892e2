"""Products with packed weights: NVFP4 codes and block scales, unpacked on the way to the tensor cores (W4A16).

    out[m, n] = scale * sum over k of x[m, k] * code[n, k] * block scale[n, k / 16]

code * block scale is exact in bfloat16, products are summed in float32, and the scale of the tensor is applied to the
sum: nothing is rounded but the result. FP8 weights, which have no block scales, run through the same function.

A weight costs 0.5625 bytes where bfloat16 costs 2, so that few rows (decoding) take up to 3.56 times less time. Many
rows are bound by the tensor cores, for which the weight is unpacked once.

Shapes: M rows, K inputs, N outputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import block_scaled_matmul_mosaic
from pallas_kernels.cost import BF16, Cost
from pallas_kernels.dispatch import choose, require_shape, sharded
from pallas_kernels.nvfp4 import BLOCK, NVFP4
from pallas_kernels.nvfp4_matmul import nvfp4_matmul
from pallas_kernels.packed import Packed


def block_scaled_matmul(x: jax.Array | NVFP4, w: Packed | NVFP4, *, impl: str | None = None) -> jax.Array:
    """Multiply by a packed weight; differentiable in x, the weight is frozen.

    Args:
      x: [..., K] bfloat16 or float32. Or NVFP4, quantised along K: `nvfp4_matmul`, which is not differentiable.
      w: [K, N], NVFP4 or FP8. For NVFP4 x: NVFP4 [N, K], quantised along K.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      [..., N] in x's dtype, accumulated in float32; float32 for NVFP4 x.

    Raises:
      ValueError: shapes do not fit, or `impl` cannot run.
    """
    if isinstance(x, NVFP4) or isinstance(w, NVFP4):
        if not (isinstance(x, NVFP4) and isinstance(w, NVFP4)):
            raise ValueError(
                "block_scaled_matmul: expected an array and a Packed weight, or two NVFP4 tensors, got "
                f"{type(x).__name__} and {type(w).__name__}: quantise both (quantize_nvfp4) or neither"
            )
        return nvfp4_matmul(x, w, impl=impl)
    require_shape("block_scaled_matmul", "w", w, "[K, N]", (x.shape[-1], None))
    rows = x.reshape(-1, x.shape[-1])
    reason = block_scaled_matmul_mosaic.unfit(x, w, rows.shape[0]) or sharded()
    chosen = choose("block_scaled_matmul", impl, unfit={"mosaic": reason})
    return _matmul(rows, w, chosen).reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x_MK: jax.Array, w: Packed, impl: str) -> jax.Array:
    return _IMPLEMENTATIONS[impl](x_MK, w, x_MK.dtype)


def _matmul_fwd(x: jax.Array, w: Packed, impl: str) -> tuple[jax.Array, Packed]:
    return _matmul(x, w, impl), w  # packed: its operand is made once more for the gradient


def _matmul_bwd(impl: str, w: Packed, d_out: jax.Array) -> tuple[jax.Array, None]:
    return (_product("mn,nk->mk", d_out, w) * w.scale).astype(d_out.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _product(spec: str, left: jax.Array, w: Packed) -> jax.Array:
    # float32 is multiplied in full: XLA:GPU would round it to TF32.
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(spec, left, w.operand(left.dtype), precision=exact, preferred_element_type=jnp.float32)


def block_scaled_matmul_reference(x_MK: jax.Array, w: Packed, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """[M, K] x [K, N] -> [M, N] in dtype, of the unpacked weight; also the best for many rows."""
    return (_product("mk,nk->mn", x_MK, w) * w.scale).astype(dtype)


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": block_scaled_matmul_mosaic.multiply,
    "reference": block_scaled_matmul_reference,
}


class Case(NamedTuple):
    """Shapes of one test or benchmark case; with group_sizes, of `grouped_matmul` with packed experts."""

    name: str
    rows: int
    inputs: int
    outputs: int
    group_sizes: tuple[int, ...] = ()


CASES = (
    Case("one_row", 1, 256, 64),
    Case("odd_rows", 7, 2688, 144),
    Case("wide_rows", 64, 384, 80),
    Case("many_rows", 130, 64, 48),
    Case("experts", 22, 384, 80, (0, 9, 0, 1, 8, 0, 2)),  # the last two rows are of none
    Case("no_experts", 3, 256, 64, (0, 0)),
)

# Weights [4096, 8192] and what is near them in the released models; one token of Super in decoding, whose 22 experts
# are spread over 512.
_ONE_TOKEN = tuple(int(i % 23 == 0 and i < 506) for i in range(512))
BENCHMARKS = (
    *(Case(f"8192x4096_{rows}", rows, 8192, 4096) for rows in (1, 8, 16, 32, 64, 128)),
    *(Case(f"super_in_proj_{rows}", rows, 4096, 18560) for rows in (1, 16, 64)),
    *(Case(f"super_shared_up_{rows}", rows, 4096, 5376) for rows in (1, 16, 64)),
    Case("super_experts_up", 22, 1024, 2688, _ONE_TOKEN),
    Case("super_experts_down", 22, 2688, 1024, _ONE_TOKEN),
)


def example_inputs(case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random x, the three arrays of a weight (scales as uint8), and a dense weight of the same shape to compare with.

    All codes, and block scales from the smallest subnormal one to 416; outputs are about 1.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    experts = (len(case.group_sizes),) if case.group_sizes else ()
    x = jax.random.normal(keys[0], (case.rows, case.inputs), jnp.float32).astype(dtype)
    codes = jax.random.bits(keys[1], (*experts, case.outputs, case.inputs // 2), jnp.uint8)
    scales = jax.random.randint(keys[2], (*experts, case.outputs, case.inputs // BLOCK), 1, 0x7E).astype(jnp.uint8)
    scale = jnp.full(experts, 0.003 * case.inputs**-0.5, jnp.float32)
    dense = jax.random.normal(keys[3], (*experts, case.inputs, case.outputs), jnp.float32).astype(dtype)
    sizes = {"group_sizes": jnp.array(case.group_sizes, jnp.int32)} if case.group_sizes else {}
    return (x, codes, scales, scale, dense), sizes


def cost(case: Case) -> Cost:
    """One product; codes and block scales of weights without rows are not read."""
    read = sum(size > 0 for size in case.group_sizes) if case.group_sizes else 1
    packed = read * case.inputs * case.outputs * (1 / 2 + 1 / BLOCK)
    product = 2.0 * case.rows * case.inputs * case.outputs
    return Cost(product, packed + BF16 * case.rows * (case.inputs + case.outputs))
