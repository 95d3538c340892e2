"""Products of two NVFP4 tensors, as tensor cores that know the format compute them and as any others do.

    out[m, n] = alpha * sum over k of (code_a[m, k] block_a[m, k / 16]) (code_b[n, k] block_b[n, k / 16])
    alpha     = the scales of both tensors, amax / (6 * 448) each, applied to the float32 sum

"cudnn" is jax.nn.scaled_matmul: XLA makes a call of cuDNN's block-scaled matmul of it where the compute capability is
10.x, with padding to tiles of 128 rows and the order of scales that tcgen05.mma wants. "reference" multiplies
code * block scale, which is exact in bfloat16, by a plain GEMM. Both sum the same products, in another order.

On a mesh, M, N and whole blocks of K are cut over devices as the operands are, and codes travel as bytes.
(scaled_matmul's own partitioning lets K and the scales be cut differently, and fails.)

Shapes: M and N rows, K the summed axis, last in both, in B blocks of 16.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
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
    product = _IMPLEMENTATIONS[implementation(2 * halves, impl)](codes, scales, b.codes, b.scales)
    alpha = a.global_scale().reshape(-1, 1) * b.global_scale().reshape(1, -1)
    return (product * alpha).reshape(*rows, len(b.codes))


def implementation(inner: int, impl: str | None = None) -> str:
    """What multiplies tensors with ``inner`` elements along K here; arguments and errors of `nvfp4_matmul`."""
    return choose("nvfp4_matmul", impl, unfit={"cudnn": _parts_of_blocks(inner)})


def _parts_of_blocks(inner: int) -> str:
    """Why devices of the mesh might hold parts of blocks ("" where they cannot), which XLA cannot name on the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = [size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes]
    products = {math.prod(some) for n in range(len(sizes)) for some in itertools.combinations(sizes, n + 1)}
    bad = sorted(p for p in products if inner % p == 0 and inner // BLOCK % p)
    return f"cut over {bad[0]} devices, K = {inner} is not whole blocks of {BLOCK} on each" if bad else ""


def _shape(tensor: NVFP4) -> list[int]:
    return [*tensor.codes.shape[:-1], 2 * tensor.codes.shape[-1]]


def nvfp4_matmul_reference(a_codes: Array, a_scales: Array, b_codes: Array, b_scales: Array) -> Array:
    """Codes [M, K / 2] and [N, K / 2] with their block scales -> float32 [M, N], without alpha."""
    one = jnp.float32(1)
    a, b = (NVFP4(*tensor, one).operand(jnp.bfloat16) for tensor in ((a_codes, a_scales), (b_codes, b_scales)))
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def nvfp4_matmul_cudnn(a_codes: Array, a_scales: Array, b_codes: Array, b_scales: Array) -> Array:
    """The same, by codes and scales."""
    blocks = [codes.reshape(*scales.shape, BLOCK // 2) for codes, scales in ((a_codes, a_scales), (b_codes, b_scales))]
    return _cut_by_blocks(*blocks, floats.e4m3_bits(a_scales), floats.e4m3_bits(b_scales))


@custom_partitioning
def _cut_by_blocks(a_MBH: Array, b_NBH: Array, a_scales_MB: Array, b_scales_NB: Array) -> Array:
    """Packed codes and e4m3 codes, all uint8; H = 8 bytes of a block."""
    a, a_scales = _for_cudnn(a_MBH, a_scales_MB)
    b, b_scales = _for_cudnn(b_NBH, b_scales_NB)
    return jax.nn.scaled_matmul(a, b, a_scales, b_scales, preferred_element_type=jnp.float32)[0]


def _for_cudnn(codes_MBH: Array, scales_MB: Array) -> tuple[Array, Array]:
    """float4_e2m1fn [1, M, K] and float8_e4m3fn [1, M, B]; K padded to 32: rows of whole 16 bytes."""
    odd = (0, scales_MB.shape[1] % 2)
    codes_MBH, scales_MB = jnp.pad(codes_MBH, ((0, 0), odd, (0, 0))), jnp.pad(scales_MB, ((0, 0), odd))
    pairs = lax.bitcast_convert_type(codes_MBH, jnp.float4_e2m1fn)  # the low nibble first
    return pairs.reshape(1, len(scales_MB), -1), floats.as_e4m3(scales_MB)[None]


def _partition(mesh: Any, operands: Any, result: Any) -> Any:
    """Rows and blocks as they lie; blocks whole on each device where the two operands differ or do not divide."""

    def cut(array: Any, axis: int) -> Any:
        spec = (*array.sharding.spec, *[None] * array.ndim)[axis]
        return None if array.shape[axis] % math.prod(mesh.shape[name] for name in _names(spec)) else spec

    a, b, *_ = operands
    rows, columns = cut(a, 0), cut(b, 0)
    if set(_names(rows)) & set(_names(columns)):
        columns = None
    blocks = cut(a, 1) if cut(a, 1) == cut(b, 1) else None

    def product(*parts: Array) -> Array:
        whole_or_part = _cut_by_blocks.fun(*parts)
        return lax.psum(whole_or_part, _names(blocks)) if _names(blocks) else whole_or_part

    specs = (rows, blocks, None), (columns, blocks, None), (rows, blocks), (columns, blocks)
    return (
        mesh,
        product,
        NamedSharding(mesh, PartitionSpec(rows, columns)),
        tuple(NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs),
    )


def _names(spec: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if spec is None else (spec,) if isinstance(spec, str) else tuple(spec)


_cut_by_blocks.def_partition(partition=_partition, sharding_rule="m b h, n b h, m b, n b -> m n")


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
