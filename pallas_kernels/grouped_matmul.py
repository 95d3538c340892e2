"""Matrix products of the experts: each group of rows has its own weight.

    out[i] = act(lhs[i] @ rhs[group of row i])        rows sorted by group; group j holds group_sizes[j] of them

Rows past sum(group_sizes) give zeros (and get zero gradients). relu2(z) = max(z, 0)^2.

Shapes: M rows, K inputs, N outputs, E groups (experts).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import block_scaled_matmul_mosaic, grouped_matmul_mosaic
from pallas_kernels.cost import BF16, Cost
from pallas_kernels.dispatch import choose, require_shape
from pallas_kernels.packed import Packed
from pallas_kernels.zeros import zeros_after

ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda z: z,
    "relu2": lambda z: jnp.square(jax.nn.relu(z)),
}


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array | Packed,
    group_sizes: jax.Array,
    *,
    activation: str | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Multiply each group of rows by its own matrix; differentiable in lhs and rhs.

    Args:
      lhs: [M, K], rows sorted by group.
      rhs: [E, K, N]; a packed one gets no gradient.
      group_sizes: [E] int32, each >= 0 (0 is an empty group), sum <= M.
      activation: None, or "relu2" applied to the float32 product before it is rounded.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      [M, N] in lhs's dtype, accumulated in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes do not fit, unknown activation, or `impl` cannot run.
    """
    require_shape("grouped_matmul", "lhs", lhs, "[M, K]", (None, None))
    require_shape("grouped_matmul", "rhs", rhs, "[E, K, N]", (None, lhs.shape[1], None))
    require_shape("grouped_matmul", "group_sizes", group_sizes, "[E]", (rhs.shape[0],))
    if activation not in ACTIVATIONS:
        raise ValueError(f"grouped_matmul: activation must be 'relu2' or None, got {activation!r}")
    if isinstance(rhs, Packed):
        reason = block_scaled_matmul_mosaic.unfit(lhs, rhs, lhs.shape[0])
        chosen = choose("grouped_matmul", impl, unfit={"mosaic": reason, "reference": "packed weights"})
        dtype = jnp.dtype(lhs.dtype if activation is None else jnp.float32)
        product = _packed_product(lhs, rhs, group_sizes.astype(jnp.int32), chosen, dtype)
        return ACTIVATIONS[activation](product).astype(lhs.dtype)
    chosen = choose("grouped_matmul", impl, unfit={"mosaic": grouped_matmul_mosaic.unfit(lhs, rhs)})
    return _IMPLEMENTATIONS[chosen](lhs, rhs, group_sizes.astype(jnp.int32), activation)


def _activated(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An implementation from a product in the accumulation dtype."""

    def implementation(lhs, rhs, group_sizes, activation):
        return ACTIVATIONS[activation](product(lhs, rhs, group_sizes)).astype(lhs.dtype)

    return implementation


def grouped_matmul_reference(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """[M, K], [E, K, N], [E] -> [M, N] in the accumulation dtype.

    XLA:CPU and XLA:GPU compute it as E masked products of all rows, so it is the truth, not the default.
    """
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    return jax.lax.ragged_dot(lhs, rhs, group_sizes, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)


@jax.custom_vjp
def grouped_matmul_blocked(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The same in plain XLA with no wasted products but the last block of a group: [M, N] accumulation dtype.

    On two CPU cores, 8192 rows, K 192, N 256, 16 groups: 11 ms against 95 ms of the reference, forward and backward
    17 ms against 257 ms; a batched product over padded, gathered blocks measured the same and needs more memory.
    """
    return rows_times_blocked(lhs, rhs, group_sizes, "mk,kn->mn")


def _blocked_fwd(lhs, rhs, group_sizes):
    return grouped_matmul_blocked(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _blocked_bwd(residuals, d_out):
    lhs, rhs, group_sizes = residuals
    d_out = d_out.astype(lhs.dtype)  # the operand type of the forward product
    d_lhs = rows_times_blocked(d_out, rhs, group_sizes, "mn,kn->mk")
    d_rhs = outer_products_blocked(lhs, d_out, group_sizes)
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype), None


grouped_matmul_blocked.defvjp(_blocked_fwd, _blocked_bwd)

ROW_BLOCK = 128


def _row_block(rows):
    return min(ROW_BLOCK, max(rows, 1))


def _pad_rows(z, block):
    """A block that starts in the last row must fit: dynamic_slice would move it back."""
    return jnp.pad(z, ((0, block), (0, 0)))


def rows_times_blocked(lhs: jax.Array, rhs: jax.Array | Packed, group_sizes: jax.Array, spec: str) -> jax.Array:
    """Each group's rows times its matrix, block by block, in the order of the rows: "mk,kn->mn" or "mn,kn->mk".

    A group's last block runs into the rows after it. They are written again: by their own group, which comes later,
    or, past the sum, by the zeros at the end.
    """
    rows = lhs.shape[0]
    width = rhs.shape[2] if spec.endswith("n") else rhs.shape[1]
    packed = isinstance(rhs, Packed)
    block = _row_block(rows)
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    padded = _pad_rows(lhs, block)
    ends = jnp.cumsum(group_sizes)

    def one_group(out, group):
        weight, start, size = group

        def one_block(i, out):
            row = start + i * block
            taken = jax.lax.dynamic_slice_in_dim(padded, row, block)
            dense = weight.operand(lhs.dtype) if packed else weight
            product = jnp.einsum(spec, taken, dense, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)
            return jax.lax.dynamic_update_slice_in_dim(out, product, row, axis=0)

        return jax.lax.fori_loop(0, -(-size // block), one_block, out), None

    out = zeros_after(padded, (rows + block, width), dtype)
    out, _ = jax.lax.scan(one_group, out, (rhs, ends - group_sizes, group_sizes))
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], out[:rows], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _packed_product(lhs, rhs, group_sizes, impl, dtype):
    """[M, N] in dtype. "blocked": each expert is unpacked when its rows are multiplied, so one is dense at a time."""
    if impl == "mosaic":
        return block_scaled_matmul_mosaic.multiply_groups(lhs, rhs, group_sizes, dtype)
    return _scaled(rows_times_blocked(lhs, rhs, group_sizes, "mk,nk->mn"), rhs, group_sizes).astype(dtype)


def _packed_fwd(lhs, rhs, group_sizes, impl, dtype):
    return _packed_product(lhs, rhs, group_sizes, impl, dtype), (rhs, group_sizes, jnp.zeros((), lhs.dtype))


def _packed_bwd(impl, dtype, residuals, d_out):
    rhs, group_sizes, like_lhs = residuals
    d_lhs = rows_times_blocked(d_out.astype(like_lhs.dtype), rhs, group_sizes, "mn,nk->mk")
    return _scaled(d_lhs, rhs, group_sizes).astype(like_lhs.dtype), None, None


_packed_product.defvjp(_packed_fwd, _packed_bwd)


def _scaled(product, rhs, group_sizes):
    """Each row times the scale of its expert."""
    rows = product.shape[0]
    return product * jnp.repeat(rhs.scale, group_sizes, total_repeat_length=rows)[:, None]


def outer_products_blocked(lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """[M, K], [M, N] -> [E, K, N]: the sum over each group's rows of lhs_row^T d_out_row."""
    rows = lhs.shape[0]
    block = _row_block(rows)
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    lhs_padded, d_out_padded = _pad_rows(lhs, block), _pad_rows(d_out, block)

    def one_group(_, group):
        start, size = group

        def one_block(i, total):
            row = start + i * block
            inside = (jnp.arange(block) + i * block < size)[:, None]
            # Both sides are masked: a row past the sum may hold NaN, and 0 * NaN is NaN.
            taken = jnp.where(inside, jax.lax.dynamic_slice_in_dim(lhs_padded, row, block), 0)
            d_taken = jnp.where(inside, jax.lax.dynamic_slice_in_dim(d_out_padded, row, block), 0)
            return total + jnp.einsum(
                "mk,mn->kn", taken, d_taken, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype
            )

        zeros = jnp.zeros((lhs.shape[1], d_out.shape[1]), dtype)
        return None, jax.lax.fori_loop(0, -(-size // block), one_block, zeros)

    return jax.lax.scan(one_group, None, (jnp.cumsum(group_sizes) - group_sizes, group_sizes))[1]


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": grouped_matmul_mosaic.grouped_matmul_mosaic,
    "blocked": _activated(grouped_matmul_blocked),
    "reference": _activated(grouped_matmul_reference),
}


class Case(NamedTuple):
    """Shapes and features of one test or benchmark case; groups = len(group_sizes)."""

    name: str
    rows: int
    inputs: int
    outputs: int
    group_sizes: tuple[int, ...]
    activation: str | None = None


CASES = (
    Case("one_group", 13, 8, 6, (13,)),
    Case("uneven", 200, 12, 10, (3, 130, 1, 66)),
    Case("empty_groups", 150, 12, 10, (0, 70, 0, 0, 80, 0)),
    Case("rows_past_the_sum", 150, 12, 10, (10, 0, 65, 4)),
    Case("all_empty", 9, 5, 4, (0, 0, 0)),
    Case("relu2", 140, 12, 10, (64, 0, 7, 65), activation="relu2"),
    Case("tiles", 300, 128, 192, (5, 0, 130, 165), activation="relu2"),  # sizes that the Hopper kernels take
    Case("tiles_rows_past_the_sum", 203, 192, 64, (64, 129, 0)),
    Case("decode", 22, 16, 24, tuple(1 if i % 3 else 0 for i in range(33)), activation="relu2"),
)


def example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random (args, kwargs) of `grouped_matmul` for a case."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)

    lhs = normal(case.rows, case.inputs)
    rhs = normal(len(case.group_sizes), case.inputs, case.outputs)
    return (lhs, rhs, jnp.array(case.group_sizes, jnp.int32)), {"activation": case.activation}


def random_loads(rows: int, groups: int, *, seed: int = 0, spread: float = 0.36) -> tuple[int, ...]:
    """Sizes of ``groups`` groups of ``rows`` rows in all: log-normal, the largest 2 to 3 times the mean."""
    random = np.random.default_rng(seed)
    share = np.exp(spread * random.standard_normal(groups))
    return tuple(int(size) for size in random.multinomial(rows, share / share.sum()))


# Nano: 16,384 tokens x 6 experts; Super: 8,192 x 22 in the latent width; Ultra: one of 8 devices of an expert axis;
# decoding: each token's 22 experts.
BENCHMARKS = (
    Case("nano_up", 98304, 2688, 1856, random_loads(98304, 128)),
    Case("nano_up_relu2", 98304, 2688, 1856, random_loads(98304, 128), activation="relu2"),
    Case("nano_up_balanced", 98304, 2688, 1856, (768,) * 128),
    Case("nano_down", 98304, 1856, 2688, random_loads(98304, 128)),
    Case("super_up", 180224, 1024, 2688, random_loads(180224, 512)),
    Case("super_up_relu2", 180224, 1024, 2688, random_loads(180224, 512), activation="relu2"),
    Case("super_down", 180224, 2688, 1024, random_loads(180224, 512)),
    Case("ultra_up_relu2", 22528, 2048, 5120, random_loads(22528, 64), activation="relu2"),
    Case("super_decode_1", 22, 1024, 2688, tuple(int(i % 23 == 0 and i < 506) for i in range(512)), "relu2"),
    Case("super_decode_32", 704, 1024, 2688, random_loads(704, 512), "relu2"),
)


def cost(case: Case) -> Cost:
    """One product forward, two backward; weights of empty groups are not read, their gradient (zeros) is written."""
    rows = sum(case.group_sizes)
    weight = case.inputs * case.outputs
    read = sum(size > 0 for size in case.group_sizes) * weight
    lhs, out, written = rows * case.inputs, rows * case.outputs, len(case.group_sizes) * weight
    saved = out if case.activation else 0  # the derivative of relu2 needs the output
    product = 2.0 * rows * weight
    return Cost(product, BF16 * (lhs + read + out), 2 * product, BF16 * (2 * lhs + out + saved + read + written))
