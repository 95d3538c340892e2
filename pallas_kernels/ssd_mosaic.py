"""Mamba-2 SSD as fused kernels for Hopper: what stands around ssd_forward_mosaic.py and ssd_backward_mosaic.py.

Saved for the backward pass: the inputs, and the state before each chunk of 128 tokens in bfloat16, which is 2 N P / 128
= 128 bytes a token and head (Nano 8 KiB, Super 16 KiB a token and layer).

Other sizes run on the same kernels: the columns of a head's x are independent of each other, so a head of 80 is two
heads of 64 (zeros at the end) with the same dt, A, B, C; a state of less than 128 rows is padded with zeros.

Shapes: B batch, T time, Z chunks of C = 128 tokens, H heads, G groups, R heads of a group, N state, P head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic import LOG2_E, Interpret
from pallas_kernels.ssd_backward_mosaic import ssd_backward
from pallas_kernels.ssd_forward_mosaic import CHUNK, HEAD_DIM, STATE_DIM, ssd_forward

# exp(-87) is the smallest normal float32: a stronger decay is zero all the same, and would only cost the running sum
# of a chunk its last bits.
LEAST_LOG_DECAY = -87.0
# TMA copies whole rows of 8; a length that is no multiple of it costs a copy.
TMA_ROWS = 8
# dt = 0 (padding) has no logarithm; with this in its place the token adds nothing that float32 could hold.
LEAST_DT = 1e-30


def unfit(x_BTHP: jax.Array, B_BTGN: jax.Array, C_BTGN: jax.Array) -> str:
    """ "" when the kernels take these operands, else the reason why not."""
    if {z.dtype for z in (x_BTHP, B_BTGN, C_BTGN)} != {jnp.dtype(jnp.bfloat16)}:
        return f"x, B and C must be bfloat16, got {x_BTHP.dtype}, {B_BTGN.dtype} and {C_BTGN.dtype}"
    if B_BTGN.shape[3] > STATE_DIM:
        return f"the state may have at most {STATE_DIM} rows, got {B_BTGN.shape[3]}"
    return ""


def ssd_mosaic(
    x_BTHP: jax.Array,
    dt_BTH: jax.Array,
    A: jax.Array,
    B_BTGN: jax.Array,
    C_BTGN: jax.Array,
    D: jax.Array | None,
    state_BHPN: jax.Array | None,
    run: jax.Array | None,
    *,
    chunk_size: int,
    interpret: Interpret = None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as of `ssd.ssd_reference`, x, B and C in bfloat16 -> (y bfloat16, final state float32).

    The chunks are of 128 tokens whatever `chunk_size` says, which is a matter of speed alone.
    """
    del chunk_size
    batch, time, heads, head_dim = x_BTHP.shape
    state_dim = B_BTGN.shape[3]
    parts = -(-head_dim // HEAD_DIM)
    tail, rows, columns = -time % TMA_ROWS, STATE_DIM - state_dim, parts * HEAD_DIM - head_dim

    def split_heads(z, axis):
        """[..., H, ...] -> [..., H * parts, ...]: what belongs to a head belongs to each of its parts."""
        return jnp.repeat(z, parts, axis)

    if D is None:
        D = jnp.zeros(heads, jnp.float32)
    if run is None:
        run = jnp.zeros((batch, time), jnp.int32)
    if state_BHPN is None:
        state_BHPN = jnp.zeros((batch, heads, head_dim, state_dim), jnp.float32)
    x_BTHP = jnp.pad(x_BTHP, ((0, 0), (0, tail), (0, 0), (0, columns)))
    x_BTHP = x_BTHP.reshape(batch, time + tail, heads * parts, HEAD_DIM)
    B_BTGN, C_BTGN = (jnp.pad(z, ((0, 0), (0, tail), (0, 0), (0, rows))) for z in (B_BTGN, C_BTGN))
    dt_BTH = jnp.pad(dt_BTH, ((0, 0), (0, tail), (0, 0)))  # with dt = 0 the state stays as it is
    run = jnp.pad(run, ((0, 0), (0, tail)), mode="edge")
    state_BHPN = jnp.pad(state_BHPN.astype(jnp.float32), ((0, 0), (0, 0), (0, columns), (0, rows)))
    state_BHNP = jnp.swapaxes(state_BHPN.reshape(batch, heads * parts, HEAD_DIM, STATE_DIM), 2, 3)
    dt_BTH, A, D = (split_heads(z.astype(jnp.float32), -1) for z in (dt_BTH, A, D))

    y_BTHP, state_BHNP = _ssd(x_BTHP, dt_BTH, A, B_BTGN, C_BTGN, D, state_BHNP, run, interpret)

    y_BTHP = y_BTHP[:, :time].reshape(batch, time, heads, parts * HEAD_DIM)[..., :head_dim]
    state_BHPN = jnp.swapaxes(state_BHNP, 2, 3).reshape(batch, heads, parts * HEAD_DIM, STATE_DIM)
    return y_BTHP, state_BHPN[:, :, :head_dim, :state_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _ssd(x_BTHP, dt_BTH, A, B_BTGN, C_BTGN, D, state_BHNP, run, interpret):
    cum, cumd, run = _decay(dt_BTH, A, run)
    return ssd_forward(x_BTHP, B_BTGN, C_BTGN, cum, cumd, run, D, state_BHNP, save_states=False, interpret=interpret)


def _ssd_fwd(x_BTHP, dt_BTH, A, B_BTGN, C_BTGN, D, state_BHNP, run, interpret):
    cum, cumd, padded_run = _decay(dt_BTH, A, run)
    y_BTHP, final_BHNP, states_BZHNP = ssd_forward(
        x_BTHP, B_BTGN, C_BTGN, cum, cumd, padded_run, D, state_BHNP, save_states=True, interpret=interpret
    )
    return (y_BTHP, final_BHNP), (x_BTHP, dt_BTH, A, B_BTGN, C_BTGN, D, run, states_BZHNP)


def _ssd_bwd(interpret, saved, cotangents):
    x_BTHP, dt_BTH, A, B_BTGN, C_BTGN, D, run, states_BZHNP = saved
    dy_BTHP, d_final_BHNP = cotangents
    cum, cumd, padded_run = _decay(dt_BTH, A, run)
    dx_BTHP, dB_BTHN, dC_BTHN, x_dx, y_x, q, v, kappa, d_first_BHNP = ssd_backward(
        x_BTHP, B_BTGN, C_BTGN, cum, cumd, padded_run, D, states_BZHNP, dy_BTHP, d_final_BHNP, interpret=interpret
    )
    ddt_BTH, dA, dD = _finish(dt_BTH, A, x_dx, y_x, q, v, kappa)

    def over_heads(z_BTHN, like):
        batch, time, groups, state_dim = like.shape
        return z_BTHN.reshape(batch, time, groups, -1, state_dim).sum(3, dtype=jnp.float32).astype(like.dtype)

    dB, dC = over_heads(dB_BTHN, B_BTGN), over_heads(dC_BTHN, C_BTGN)
    return dx_BTHP, ddt_BTH, dA, dB, dC, dD, d_first_BHNP, np.zeros(run.shape, jax.dtypes.float0)


_ssd.defvjp(_ssd_fwd, _ssd_bwd)


def _by_chunk(z_BTH):
    """[B, T, H] -> [B, H, Z, C], T padded to whole chunks."""
    batch, time, heads = z_BTH.shape
    padded = jnp.pad(z_BTH, ((0, 0), (0, -time % CHUNK), (0, 0)))
    return jnp.swapaxes(padded, 1, 2).reshape(batch, heads, -1, CHUNK)


def _decay(dt_BTH, A, run):
    """cum and cumd [B, H, T padded] float32, run [B, T padded]; see ssd_forward_mosaic.py."""
    dt_BHZC = _by_chunk(dt_BTH)
    log_decay = jnp.maximum(dt_BHZC * A[:, None, None], LEAST_LOG_DECAY)
    cum_BHZC = jnp.cumsum(log_decay, axis=-1) * LOG2_E
    cumd_BHZC = cum_BHZC - jnp.log2(jnp.maximum(dt_BHZC, LEAST_DT))
    batch, heads = dt_BHZC.shape[:2]
    run = jnp.pad(run, ((0, 0), (0, -run.shape[1] % CHUNK)), mode="edge")
    return cum_BHZC.reshape(batch, heads, -1), cumd_BHZC.reshape(batch, heads, -1), run


def _finish(dt_BTH, A, x_dx, y_x, q, v, kappa):
    """The kernel's sums [B, H, T padded], kappa [B, Z, H, N] -> ddt [B, T, H], dA [H], dD [H].

    The decay of token t weighs all that passes from before it to it or later: in the chunk, sum_{l >= t} q_l (which
    holds the v of later tokens, so those of earlier ones are added back), and what crosses the whole chunk.
    """
    batch, time, heads = dt_BTH.shape

    def chunked(z_BHT):
        return z_BHT.reshape(batch, heads, -1, CHUNK)

    dt_BHZC, v_BHZC = _by_chunk(dt_BTH), chunked(v)
    crossing_BHZ = jnp.swapaxes(kappa.sum(-1), 1, 2)
    d_decay = jax.lax.cumsum(chunked(q), axis=3, reverse=True)
    d_decay += jnp.cumsum(v_BHZC, axis=-1) - v_BHZC + crossing_BHZ[..., None]
    ddt_BHZC = chunked(x_dx) / jnp.maximum(dt_BHZC, LEAST_DT) + A[:, None, None] * d_decay
    ddt_BTH = jnp.swapaxes(ddt_BHZC.reshape(batch, heads, -1)[..., :time], 1, 2)
    return ddt_BTH, (dt_BHZC * d_decay).sum((0, 2, 3)), y_x.sum((0, 2))
