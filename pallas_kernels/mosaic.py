"""What the Mosaic GPU kernels share: register layouts, shared-memory tiles, and the call with its semantics stated.

The kernels use Warpgroup lowering semantics: each of the kernel's threads is a warpgroup of 128 lanes, arrays are
values of a whole warpgroup, and layouts are inferred. `interpret` is None on a GPU, or
`plgpu.InterpretGPUParams(detect_races=True)`, which runs TMA copies, barriers and wgmma on the CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

Interpret = Any  # plgpu.InterpretGPUParams, which has no public base to name, or None

WGMMA = plgpu.Layout.WGMMA  # the layout of a wgmma accumulator [64 i, 8 j]
ROW, COL = WGMMA.reduce(1), WGMMA.reduce(0)  # one value per row, per column of such a tile

LOG2_E = 1.4426950408889634  # the GPU has exp2, not exp


def tiles(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory laid out for wgmma and TMA: 8 rows of 128 bytes, swizzled. The last axis: whole 128 bytes."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def along_rows(value: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[R] (layout ROW) -> [R, C]: the same value along each row."""
    return lax.broadcast_in_dim(value, shape, [0])


def along_columns(value: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[C] (layout COL) -> [R, C]: the same value along each column."""
    return lax.broadcast_in_dim(value, shape, [1])


def load(ref: Any, layout: Any) -> jax.Array:
    """Shared memory -> registers; loads of vectors in ROW and COL layouts exist only unoptimised."""
    return plgpu.load(ref, layout=layout, optimized=False)


def kernel_call(
    body: Callable[..., None],
    *,
    warpgroups: int,
    interpret: Interpret,
    approx_math: bool = False,
    auto_barriers: bool = True,
    lanes: bool = False,
    **kwargs: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel` of `warpgroups` named "wg", with Warpgroup semantics; `kwargs` as there.

    auto_barriers: a barrier of the warpgroup around each store; not needed where no memory is both read and written.
    lanes: Lane semantics, for a kernel that states the layout of all that it loads: inferring layouts takes time that
    grows with the square of the operations, seconds for a thousand.
    """
    if interpret is not None:
        kwargs["interpret"] = interpret
    semantics = plgpu.LoweringSemantics
    return plgpu.kernel(
        body,
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=semantics.Lane if lanes else semantics.Warpgroup,
            approx_math=approx_math,
            unsafe_no_auto_barriers=not auto_barriers,
        ),
        **kwargs,
    )
