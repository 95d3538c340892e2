"""Mamba-2 SSD forward on Hopper: one pass over the sequence, the state stays on the chip.

One CTA per (batch row, head). Its warpgroups 0 and 1 compute, warpgroup 2 issues the TMA loads of the next chunk.
Compute warpgroup w owns tokens [64w, 64w + 64) of a chunk and rows [64w, 64w + 64) of the state [N, P], which it
carries in float32 registers. The [C, C] matrix of a chunk exists in blocks of 64 x 64 in registers only; the block
above the diagonal is skipped.

With cum = log2(e) * (running sum of dt A) and cumd = cum - log2(dt), the weight of token s in token l is
dt_s exp(a_{s+1} + .. + a_l) = exp2(cum_l - cumd_s): one exp2 an element, the difference taken first. Documents are
told apart by run numbers (`segments.run_ids`) compared in registers, after the product, so that nothing infinite is
ever multiplied.

A chunk, for compute warpgroup w:
    publish the state before the chunk and w_s x_s as bf16 (barrier `ready`)
    G = (C B^T) * weights, in blocks, bf16
    y = G x + exp2(cum) (C S) + D x;   S <- exp2(cum_last) S + B^T (w x), all products in flight at once

A sequence need not be a multiple of 128, only of 8: TMA fills what lies past its end with zeros and drops what is
stored there; the small arrays (cum, cumd, run) are padded by the caller.

Shapes: B batch, T time, Z chunks of C = 128 tokens, H heads, G groups, N = 128 state, P = 64 head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import COL, ROW, WGMMA, Interpret, along_columns, along_rows, kernel_call, load, tiles

CHUNK, HALF = 128, 64
STATE_DIM, HEAD_DIM = 128, 64
BLOCK = (HALF, HALF)
STAGES = 2  # chunks in flight; a third does not fit beside them


def products(*sums: list[tuple[Any, Any]]) -> tuple[jax.Array, ...]:
    """Sums of products of [64, k] and [k, 64] tiles, all in flight at once -> one float32 tile each."""

    def run(*accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for left, right in pairs:
                plgpu.wgmma(accumulator, left, right)
        plgpu.wgmma_wait(0)
        return tuple(accumulator[...] for accumulator in accumulators)

    return pl.run_scoped(run, *[plgpu.ACC(BLOCK, jnp.float32) for _ in sums])


def not_before(row: int, column: int) -> jax.Array:
    """[64, 64] bool: index along axis `row` >= index along axis `column`."""

    def index(axis):
        return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, BLOCK, axis), WGMMA)

    return index(row) >= index(column)


def ssd_forward(
    x_BTHP: jax.Array,
    B_BTGN: jax.Array,
    C_BTGN: jax.Array,
    cum_BHT: jax.Array,
    cumd_BHT: jax.Array,
    run: jax.Array,
    D: jax.Array,
    state_BHNP: jax.Array,
    *,
    save_states: bool,
    interpret: Interpret = None,
) -> tuple[jax.Array, ...]:
    """Run the recurrence.

    Args:
      x_BTHP, B_BTGN, C_BTGN: bfloat16, T a multiple of 8.
      cum_BHT, cumd_BHT: float32, T padded to whole chunks (see the top of the file).
      run: [B, T padded] int32, run 0 owns the initial state.
      D: [H] float32.
      state_BHNP: float32, the state before token 0.
      save_states: also return the state before each chunk, for the backward pass.
      interpret: see `mosaic`.

    Returns:
      y_BTHP bfloat16, the final state [B, H, N, P] float32, and with save_states the states [B, Z, H, N, P] bfloat16.
    """
    batch, _, heads, _ = x_BTHP.shape
    groups = B_BTGN.shape[2]
    chunks = cum_BHT.shape[2] // CHUNK
    staged = interpret is not None  # the interpreter has no wgmma with an operand in registers

    def body(C_gmem, B_gmem, x_gmem, cum_gmem, cumd_gmem, run_gmem, D_gmem, first_gmem, y_gmem, final_gmem, *rest):
        states_gmem, *scratch = rest if save_states else (None, *rest)
        C_s, B_s, x_s, cum_s, cumd_s, run_s, state_s, wx_s, y_s, G_s, full, empty, ready, free = scratch
        b, h, warpgroup = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
        g = lax.div(h, jnp.int32(heads // groups))

        def load_chunk(z, slot):
            tokens = pl.ds(z * CHUNK, CHUNK)
            for source, target in (
                (C_gmem.at[b, tokens, g], C_s),
                (B_gmem.at[b, tokens, g], B_s),
                (x_gmem.at[b, tokens, h], x_s),
                (cum_gmem.at[b, h, tokens], cum_s),
                (cumd_gmem.at[b, h, tokens], cumd_s),
                (run_gmem.at[b, tokens], run_s),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        @pl.when(warpgroup == 2)
        def _():
            if not staged:
                plgpu.set_max_registers(24, action="decrease")
            for z in range(min(STAGES, chunks)):
                load_chunk(jnp.int32(z), z)  # not static: the last chunk may reach past the end

            def next_chunk(z, _):
                slot = lax.rem(z, jnp.int32(STAGES))
                plgpu.barrier_wait(empty.at[slot])
                load_chunk(z, slot)

            if chunks > STAGES:
                lax.fori_loop(STAGES, chunks, next_chunk, None)
            for z in range(max(chunks - STAGES, 0), chunks):  # leave no barrier completion unobserved
                plgpu.barrier_wait(empty.at[z % STAGES])

        def compute(w):
            if not staged:
                plgpu.set_max_registers(240, action="increase")
            mine = pl.ds(w * HALF, HALF)

            def one_chunk(z, carry):
                state, run_before = carry
                slot = lax.rem(z, jnp.int32(STAGES))

                @pl.when(z > 0)
                def _():
                    if save_states:
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # this half of state_s has left
                    plgpu.barrier_wait(free)  # both warpgroups are done with state_s and wx_s

                state_s[mine] = state.astype(jnp.bfloat16)
                plgpu.barrier_wait(full.at[slot])
                run_l = load(run_s.at[slot, mine], ROW)
                cum_l = load(cum_s.at[slot, mine], ROW)
                cum_last, run_last = cum_s[slot, CHUNK - 1], run_s[slot, CHUNK - 1]
                weight = jnp.where(run_l == run_last, jnp.exp2(cum_last - load(cumd_s.at[slot, mine], ROW)), 0.0)
                wx_s[mine] = (load(x_s.at[slot, mine], WGMMA).astype(jnp.float32) * along_rows(weight, BLOCK)).astype(
                    jnp.bfloat16
                )
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready)
                if save_states:
                    plgpu.copy_smem_to_gmem(state_s.at[mine], states_gmem.at[b, z, h, mine])

                inside = []
                for j in range(w + 1):
                    columns = pl.ds(j * HALF, HALF)
                    (CB,) = products([(C_s.at[slot, mine], B_s.at[slot, columns].transpose((1, 0)))])
                    exponent = along_rows(cum_l, BLOCK) - along_columns(load(cumd_s.at[slot, columns], COL), BLOCK)
                    seen = along_rows(run_l, BLOCK) == along_columns(load(run_s.at[slot, columns], COL), BLOCK)
                    if j == w:
                        seen &= not_before(0, 1)
                    G = jnp.where(seen, CB * jnp.exp2(exponent), 0.0).astype(jnp.bfloat16)
                    if staged:
                        G_s.at[w, j][...] = G
                        plgpu.commit_smem()
                        G = G_s.at[w, j]
                    inside.append((G, x_s.at[slot, columns]))

                plgpu.barrier_wait(ready)  # state and weighted x of both warpgroups are visible
                y, read, added = products(
                    inside,
                    [(C_s.at[slot, mine], state_s)],
                    [(B_s.at[slot, :, mine].transpose((1, 0)), wx_s)],
                )
                plgpu.barrier_arrive(free)
                state = state * jnp.where(run_last == run_before, jnp.exp2(cum_last), 0.0) + added
                y += read * along_rows(jnp.where(run_l == run_before, jnp.exp2(cum_l), 0.0), BLOCK)
                y += D_gmem[h] * load(x_s.at[slot, mine], WGMMA).astype(jnp.float32)
                # The last chunk's y has left y_s; this chunk's saved state, committed after it, need not have.
                plgpu.wait_smem_to_gmem(1 if save_states else 0, wait_read_only=True)
                y_s[mine] = y.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(empty.at[slot])  # after the fence that also orders the reads of the slot
                plgpu.copy_smem_to_gmem(y_s.at[mine], y_gmem.at[b, pl.ds(z * CHUNK + w * HALF, HALF), h])
                return state, run_last

            first = (load(first_gmem.at[b, h, mine], WGMMA), jnp.int32(0))
            state, _ = lax.fori_loop(0, chunks, one_chunk, first)
            final_gmem.at[b, h, mine][...] = state
            plgpu.barrier_wait(free)
            plgpu.wait_smem_to_gmem(0)

        for w in range(2):
            pl.when(warpgroup == w)(functools.partial(compute, w))

    out = [
        jax.ShapeDtypeStruct(x_BTHP.shape, jnp.bfloat16),
        jax.ShapeDtypeStruct(state_BHNP.shape, jnp.float32),
    ]
    if save_states:
        out.append(jax.ShapeDtypeStruct((batch, chunks, heads, STATE_DIM, HEAD_DIM), jnp.bfloat16))
    call = kernel_call(
        body,
        warpgroups=3,
        interpret=interpret,
        approx_math=True,
        out_type=out,
        grid=(batch, heads),
        grid_names=("b", "h"),
        scratch_types=[
            tiles(STAGES, CHUNK, STATE_DIM),
            tiles(STAGES, CHUNK, STATE_DIM),
            tiles(STAGES, CHUNK, HEAD_DIM),
            plgpu.SMEM((STAGES, CHUNK), jnp.float32),
            plgpu.SMEM((STAGES, CHUNK), jnp.float32),
            plgpu.SMEM((STAGES, CHUNK), jnp.int32),
            tiles(STATE_DIM, HEAD_DIM),
            tiles(CHUNK, HEAD_DIM),
            tiles(CHUNK, HEAD_DIM),
            tiles(2, 2, HALF, HALF) if staged else None,
            plgpu.Barrier(num_arrivals=6, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ],
    )
    return tuple(call(C_BTGN, B_BTGN, x_BTHP, cum_BHT, cumd_BHT, run, D, state_BHNP))
