"""Rows by their numbers on Hopper (Pallas Mosaic GPU): `rows[index]`, each times a weight where there are any.

Nothing but bytes: each row is one TMA copy into shared memory, STEP of them go out as one copy. A block of threads
keeps as many steps on their way as its shared memory holds, which is what XLA's gather does not: its threads wait for
an index, then for eight bytes.

Shapes: M rows to choose from, D width, R rows chosen.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import Interpret, kernel_call

STEP = 8  # rows of a copy out
PIECE = 128  # TMA copies boxes of at most 256 elements along an axis
SHARED_BYTES = 216 * 1024
BLOCKS = 132  # one on each multiprocessor


def unfit(rows: jax.Array) -> str:
    """Why the kernel cannot take rows [M, D], or ""."""
    if rows.dtype != jnp.bfloat16:
        return f"rows must be bfloat16, got {rows.dtype}"
    width = rows.shape[1]
    if not rows.size or width % PIECE or 2 * STEP * 2 * width > SHARED_BYTES:
        return f"the width must be a multiple of {PIECE} and at most {SHARED_BYTES // (4 * STEP)}, got {width}"
    return ""


def gather_rows(
    rows: jax.Array, index: jax.Array, weights: jax.Array | None = None, *, interpret: Interpret = None
) -> jax.Array:
    """rows [M, D] bfloat16, index [R] int32 in 0 .. M - 1, weights [R] float32 or None -> [R, D] bfloat16.

    A product is made in float32 and rounded once.
    """
    count, width = index.shape[0], rows.shape[1]
    index = index.astype(jnp.int32)
    extra = -count % STEP
    operands = [jnp.pad(index, (0, extra)), rows.reshape(-1, width // PIECE, PIECE)]
    if weights is not None:
        operands.append(jnp.pad(weights.astype(jnp.float32), (0, extra)))
    kernel = _kernel(count, width // PIECE, weights is not None, interpret)
    return kernel(*operands).reshape(count, width)


@functools.lru_cache
def _kernel(count, pieces, weighted, interpret):
    slots = min(8, SHARED_BYTES // (STEP * pieces * PIECE * 2))
    steps = pl.cdiv(count, STEP)

    def body(index_g, rows_g, *rest):
        *weights_g, out_g, rows_s, full, free = rest
        block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
        mine = lax.div(steps - block + (BLOCKS - 1), jnp.int32(BLOCKS))

        def first_row(i):
            return (block + i * BLOCKS) * STEP

        def slot_of(i):
            return lax.rem(i, jnp.int32(slots))

        @pl.when(warpgroup == 1)
        def load():
            def numbers(i):  # of the step after, so that nothing waits for them
                return tuple(index_g[jnp.minimum(first_row(i), (steps - 1) * STEP) + r] for r in range(STEP))

            def step(i, these):
                slot = slot_of(i)

                @pl.when(i >= slots)
                def wait():
                    plgpu.barrier_wait(free.at[slot])

                following = numbers(i + 1)
                for r, number in enumerate(these):
                    plgpu.copy_gmem_to_smem(rows_g.at[number], rows_s.at[slot, r], full.at[slot])
                return following

            lax.fori_loop(0, mine, step, numbers(jnp.int32(0)))

            def drain(i, _):  # a barrier's phases must all be waited for
                plgpu.barrier_wait(free.at[slot_of(i)])

            lax.fori_loop(jnp.maximum(mine - slots, 0), mine, drain, None)

        @pl.when(warpgroup == 0)
        def store():
            def step(i, _):
                slot = slot_of(i)
                plgpu.barrier_wait(full.at[slot])
                if weighted:
                    for r in range(STEP):
                        row = rows_s[slot, r].astype(jnp.float32) * weights_g[0][first_row(i) + r]
                        rows_s[slot, r] = row.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(rows_s.at[slot], out_g.at[pl.ds(first_row(i), STEP)])
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)

                @pl.when(i > 0)  # the copy before has left
                def free_slot():
                    plgpu.barrier_arrive(free.at[slot_of(i - 1)])

            lax.fori_loop(0, mine, step, None)
            plgpu.wait_smem_to_gmem(0)

            @pl.when(mine > 0)
            def free_last():
                plgpu.barrier_arrive(free.at[slot_of(mine - 1)])

    return kernel_call(
        body,
        warpgroups=2,
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((count, pieces, PIECE), jnp.bfloat16),
        grid=(BLOCKS,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((slots, STEP, pieces, PIECE), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=STEP, num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
        ],
    )
