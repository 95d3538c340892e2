"""Mamba-2 SSD backward on Hopper: one reverse sweep over the chunks, the gradient of the state stays on the chip.

One CTA of two warpgroups per (batch row, head). Notation of ssd_forward_mosaic.py; S0 and S1 are the states before
and after a chunk, dS1 the gradient of S1, e_l = exp2(cum_l) and w_s = exp2(cum_last - cumd_s), both zero where
another document begins in between, dt_s M[l, s] = exp2(cum_l - cumd_s) for s <= l in one document:

    K^T = (x dY^T) * (dt M)^T    G^T = (B C^T) * (dt M)^T                      [C, C] (rows s, columns l), in blocks
    dx  = G^T dY + w (B dS1) + D dY                                            [C, P]
    dB  = K^T C + w (x dS1^T)    dC = K B + e (dY S0^T)                        [C, N]
    dS0 = exp2(cum_last) dS1 + C^T (e dY)                                      [N, P]

and the gradients of dt A need, per token and head, only sums that are in registers anyway (`ssd_mosaic._finish`):

    x . (dx - D dY),   dY . x,   v = x . (w B dS1),   q = C . dC - B . dB + v,   kappa = exp2(cum_last) <dS1, S0>

The diagonal of K, dt_l (x_l . dY_l), decays by nothing: it would cancel in q, and under strong decay what is left
would be rounding errors. So K in shared memory is without it, and dB and dC get it after their dots are taken.

Warpgroup w owns rows s of block w for dx and dB, rows l of block w for dC, and rows n of block w for dS. The block
below the diagonal is skipped. dB and dC leave per head and are summed over the heads of a group outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import COL, ROW, WGMMA, Interpret, along_columns, along_rows, kernel_call, load, tiles
from pallas_kernels.ssd_forward_mosaic import BLOCK, CHUNK, HALF, HEAD_DIM, STATE_DIM, not_before, products


def ssd_backward(
    x_BTHP: jax.Array,
    B_BTGN: jax.Array,
    C_BTGN: jax.Array,
    cum_BHT: jax.Array,
    cumd_BHT: jax.Array,
    run: jax.Array,
    D: jax.Array,
    states_BZHNP: jax.Array,
    dy_BTHP: jax.Array,
    d_final_BHNP: jax.Array,
    *,
    interpret: Interpret = None,
) -> tuple[jax.Array, ...]:
    """Arguments as of `ssd_forward`, its saved states, and the gradients of its two results.

    Returns:
      dx_BTHP bfloat16; dB, dC [B, T, H, N] bfloat16, per head; x_dx, y_x, q, v [B, H, T padded] and kappa
      [B, Z, H, N] float32, see the top of the file; the gradient of the initial state [B, H, N, P] float32.
    """
    batch, time, heads, _ = x_BTHP.shape
    groups = B_BTGN.shape[2]
    padded = cum_BHT.shape[2]
    chunks = padded // CHUNK
    half = [pl.ds(i * HALF, HALF) for i in range(2)]

    def transposed(ref):
        return ref.transpose((1, 0))

    def tile(ref):
        return load(ref, WGMMA).astype(jnp.float32)

    def body(
        C_gmem, B_gmem, x_gmem, dy_gmem, states_gmem, cum_gmem, cumd_gmem, run_gmem, D_gmem, d_final_gmem,
        dx_gmem, dB_gmem, dC_gmem, x_dx_gmem, y_x_gmem, q_gmem, v_gmem, kappa_gmem, d_first_gmem,
        *scratch,
    ):  # fmt: skip
        *buffers, full, ready, free = scratch
        C_0, B_0, x_0, dy_0, state_0, cum_0, cumd_0, run_0 = buffers[:8]
        b, h, warpgroup = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
        g = lax.div(h, jnp.int32(heads // groups))

        def load_chunk(z):
            tokens = pl.ds(z * CHUNK, CHUNK)
            pairs = [
                (x_gmem.at[b, tokens, h], x_0.at[0]),
                (dy_gmem.at[b, tokens, h], dy_0.at[0]),
                (cum_gmem.at[b, h, tokens], cum_0.at[0]),
                (cumd_gmem.at[b, h, tokens], cumd_0.at[0]),
                (run_gmem.at[b, tokens], run_0.at[0]),
            ]
            for n in range(2):
                pairs += [
                    (C_gmem.at[b, tokens, g, half[n]], C_0.at[0, n]),
                    (B_gmem.at[b, tokens, g, half[n]], B_0.at[0, n]),
                    (states_gmem.at[b, z, h, half[n]], state_0.at[0, n]),
                ]
            for source, target in pairs:
                plgpu.copy_gmem_to_smem(source, target, full)

        def compute(w):
            mine = half[w]
            later, sooner = range(w, 2), range(w + 1)  # blocks l >= s of our s; blocks s <= l of our l

            def one_chunk(k, carry):
                dS, zero = carry
                # zero is 0, which the compiler cannot know: otherwise it hoists some 160 shared-memory addresses and
                # wgmma descriptors out of the loop, and spills.
                C_s, B_s, x_s, dy_s, state_s, cum_s, cumd_s, run_s, dS_s, edy_s, K_s, dx_s, out_s = (
                    buffer.at[zero] for buffer in buffers
                )
                z = chunks - 1 - k
                tokens = pl.ds(z * CHUNK + w * HALF, HALF)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_wait(free)  # both warpgroups are done with the last chunk
                    if w == 0:
                        load_chunk(z)

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dx_s and out_s have left
                dS_s.at[w][...] = dS.astype(jnp.bfloat16)
                plgpu.barrier_wait(full)
                run_r = load(run_s.at[mine], ROW)
                cum_last, run_last = cum_0[zero, CHUNK - 1], run_0[zero, CHUNK - 1]
                run_before = jnp.where(z > 0, run_gmem[b, jnp.maximum(z * CHUNK - 1, 0)], 0)
                e = jnp.where(run_r == run_before, jnp.exp2(load(cum_s.at[mine], ROW)), 0.0)
                edy_s.at[mine][...] = (tile(dy_s.at[mine]) * along_rows(e, BLOCK)).astype(jnp.bfloat16)
                cumd_r = load(cumd_s.at[mine], ROW)

                inside = []
                for i in later:
                    CBt, dGt = products(
                        [(B_s.at[n, mine], transposed(C_s.at[n, half[i]])) for n in range(2)],
                        [(x_s.at[mine], transposed(dy_s.at[half[i]]))],
                    )
                    seen = along_rows(run_r, BLOCK) == along_columns(load(run_s.at[half[i]], COL), BLOCK)
                    if i == w:
                        seen &= not_before(1, 0)
                    exponent = along_columns(load(cum_s.at[half[i]], COL), BLOCK) - along_rows(cumd_r, BLOCK)
                    Mt = jnp.where(seen, jnp.exp2(exponent), 0.0)
                    K = dGt * Mt
                    K_s.at[w + i][...] = (jnp.where(not_before(0, 1), 0.0, K) if i == w else K).astype(jnp.bfloat16)
                    Gt = out_s.at[w, i - w]  # free until dB is written there
                    Gt[...] = (CBt * Mt).astype(jnp.bfloat16)
                    inside.append((Gt, dy_s.at[half[i]]))
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready)
                plgpu.barrier_wait(ready)  # dS_s, edy_s, K_s of both warpgroups are visible

                weight = jnp.where(run_r == run_last, jnp.exp2(cum_last - cumd_r), 0.0)
                dx, dx_state = products(inside, [(B_s.at[n, mine], dS_s.at[n]) for n in range(2)])
                x, dy = tile(x_s.at[mine]), tile(dy_s.at[mine])
                dx_state *= along_rows(weight, BLOCK)
                v = (x * dx_state).sum(axis=1)
                v_gmem.at[b, h, tokens][...] = v
                dx += dx_state
                x_dx_gmem.at[b, h, tokens][...] = (x * dx).sum(axis=1)
                y_x = (x * dy).sum(axis=1)
                y_x_gmem.at[b, h, tokens][...] = y_x
                diagonal = y_x * jnp.exp2(load(cum_s.at[mine], ROW) - cumd_r)
                dx_s.at[mine][...] = (dx + D_gmem[h] * dy).astype(jnp.bfloat16)

                def dB_half(n, q):
                    dB, dB_state = products(
                        [(K_s.at[w + i], C_s.at[n, half[i]]) for i in later],
                        [(x_s.at[mine], transposed(dS_s.at[n]))],
                    )
                    dB += dB_state * along_rows(weight, BLOCK)
                    q -= (dB * tile(B_s.at[n, mine])).sum(axis=1)
                    dB += tile(C_s.at[n, mine]) * along_rows(diagonal, BLOCK)
                    out_s.at[w, n][...] = dB.astype(jnp.bfloat16)
                    return q

                q = lax.fori_loop(0, 2, dB_half, v)  # a loop, not unrolled: fewer live registers
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dx_s.at[mine], dx_gmem.at[b, tokens, h])
                for n in range(2):
                    plgpu.copy_smem_to_gmem(out_s.at[w, n], dB_gmem.at[b, tokens, h, half[n]])

                (dS_added,) = products([(transposed(C_s.at[w]), edy_s)])
                keep = jnp.where(run_last == run_before, jnp.exp2(cum_last), 0.0)
                kappa_gmem.at[b, z, h, mine][...] = (dS * tile(state_s.at[w])).sum(axis=1) * keep
                dS = dS * keep + dS_added

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def dC_half(n, q):
                    dC, dC_state = products(
                        [(transposed(K_s.at[j + w]), B_s.at[n, half[j]]) for j in sooner],
                        [(dy_s.at[mine], transposed(state_s.at[n]))],
                    )
                    dC += dC_state * along_rows(e, BLOCK)
                    q += (dC * tile(C_s.at[n, mine])).sum(axis=1)
                    dC += tile(B_s.at[n, mine]) * along_rows(diagonal, BLOCK)
                    out_s.at[w, n][...] = dC.astype(jnp.bfloat16)
                    return q

                q = lax.fori_loop(0, 2, dC_half, q)
                plgpu.commit_smem()
                plgpu.barrier_arrive(free)
                for n in range(2):
                    plgpu.copy_smem_to_gmem(out_s.at[w, n], dC_gmem.at[b, tokens, h, half[n]])
                q_gmem.at[b, h, tokens][...] = q
                return dS, jnp.minimum(run_last, 0)

            if w == 0:
                load_chunk(jnp.int32(chunks - 1))
            dS, _ = lax.fori_loop(0, chunks, one_chunk, (load(d_final_gmem.at[b, h, mine], WGMMA), jnp.int32(0)))
            d_first_gmem.at[b, h, mine][...] = dS
            plgpu.barrier_wait(free)
            plgpu.wait_smem_to_gmem(0)

        for w in range(2):
            pl.when(warpgroup == w)(functools.partial(compute, w))

    per_token = jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32)
    per_head = jax.ShapeDtypeStruct((batch, time, heads, STATE_DIM), jnp.bfloat16)
    call = kernel_call(
        body,
        warpgroups=2,
        interpret=interpret,
        approx_math=True,
        out_type=[
            jax.ShapeDtypeStruct(x_BTHP.shape, jnp.bfloat16),
            per_head,
            per_head,
            per_token,
            per_token,
            per_token,
            per_token,
            jax.ShapeDtypeStruct((batch, chunks, heads, STATE_DIM), jnp.float32),
            jax.ShapeDtypeStruct(d_final_BHNP.shape, jnp.float32),
        ],
        grid=(batch, heads),
        grid_names=("b", "h"),
        scratch_types=[
            tiles(1, 2, CHUNK, HALF),  # C
            tiles(1, 2, CHUNK, HALF),  # B
            tiles(1, CHUNK, HEAD_DIM),  # x
            tiles(1, CHUNK, HEAD_DIM),  # dY
            tiles(1, 2, HALF, HEAD_DIM),  # S0
            plgpu.SMEM((1, CHUNK), jnp.float32),
            plgpu.SMEM((1, CHUNK), jnp.float32),
            plgpu.SMEM((1, CHUNK), jnp.int32),
            tiles(1, 2, HALF, HEAD_DIM),  # dS1
            tiles(1, CHUNK, HEAD_DIM),  # e dY
            tiles(1, 3, HALF, HALF),  # K^T
            tiles(1, CHUNK, HEAD_DIM),  # dx
            tiles(1, 2, 2, HALF, HALF),  # G^T, then dB, then dC
            plgpu.Barrier(num_arrivals=11),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ],
    )
    return tuple(call(C_BTGN, B_BTGN, x_BTHP, dy_BTHP, states_BZHNP, cum_BHT, cumd_BHT, run, D, d_final_BHNP))
