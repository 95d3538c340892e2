"""The one matmul behind every Linear: three GEMMs (fprop, dgrad, wgrad), each in the precision it was given.

The weight gradient is accumulated and returned in the weight's own dtype (float32 for master weights), whatever
the dtype of the operands: rounding it to bfloat16 first loses small contributions of later microbatches.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from nemotron_jax.precision.quantized import quantized_matmul
from nemotron_jax.precision.quantized_experts import quantized_expert_matmul
from nemotron_jax.precision.recipe import Precision
from pallas_kernels import block_scaled_matmul, grouped_matmul
from pallas_kernels.packed import Packed


def matmul(
    x: Array, w: Array | Packed, precision: Precision, seed: Array | None = None, probe: Array | None = None
) -> Array:
    """``x [..., k] @ w [k, n] -> [..., n]`` in x's dtype.

    Args:
      x: activations.
      w: weight; cast to the precision's operand dtype here, so master weights stay float32. A packed one is frozen:
        it gets no gradient.
      precision: resolved at construction from the recipe.
      seed: uint32 scalar of this (step, microbatch, layer, weight), for stochastic rounding.
      probe: ``quantized.new_probe()``, whose gradient is the statistics of a quantised matmul; zeros of another.
    """
    if isinstance(w, Packed):
        return block_scaled_matmul(x.astype(precision.operands), w).astype(x.dtype)
    if precision.format:
        return quantized_matmul(x, w, precision, seed, probe)
    return _matmul(x, w, jnp.dtype(precision.operands))


def expert_matmul(
    x: Array,
    w: Array | Packed,
    group_sizes: Array,
    precision: Precision,
    seed: Array | None = None,
    entry_M: Array | None = None,
    probe: Array | None = None,
    *,
    activation: str | None = None,
) -> Array:
    """Each group of rows times its expert's weight (pallas_kernels.grouped_matmul): the matmul of the routed experts.

    Args:
      x: [m, k], rows sorted by expert.
      w: [e, k, n]; a packed one gets no gradient.
      group_sizes: [e] int32.
      seed: as in `matmul`.
      entry_M: uint32 [m], which (token, slot) of the global batch each row is: what its random bits depend on beside
        the seed. None: its place.
      probe: as in `matmul`.
      activation: None or "relu2".

    Returns:
      [m, n] in the precision's operand dtype; of a quantised precision in x's.
    """
    if precision.format and not isinstance(w, Packed):
        return quantized_expert_matmul(x, w, group_sizes, precision, seed, entry_M, probe, activation=activation)
    dtype = jnp.dtype(precision.operands)
    w = w if isinstance(w, Packed) else w.astype(dtype)
    return grouped_matmul(x.astype(dtype), w, group_sizes, activation=activation)


def gemm_precision(dtype: jnp.dtype) -> lax.Precision:
    """Full float32 products for float32 operands: XLA:GPU would otherwise round them to TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Array, w: Array, operands: jnp.dtype) -> Array:
    return _gemm(x, w, ((x.ndim - 1,), (0,)), operands, x.dtype)


def _gemm(
    a: Array, b: Array, contract: tuple[tuple[int, ...], tuple[int, ...]], operands: jnp.dtype, out: jnp.dtype
) -> Array:
    return lax.dot_general(
        a.astype(operands),
        b.astype(operands),
        (contract, ((), ())),
        precision=gemm_precision(operands),
        preferred_element_type=out,
    )


def _matmul_fwd(x: Array, w: Array, operands: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, w, operands), (x, w)


def _matmul_bwd(operands: jnp.dtype, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    rows = tuple(range(x.ndim - 1))
    dx = _gemm(dy, w, ((dy.ndim - 1,), (1,)), operands, x.dtype)
    dw = _gemm(x, dy, (rows, rows), operands, w.dtype)
    return dx, dw


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
