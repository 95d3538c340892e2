"""Mamba-2 state-space duality (SSD): a linear recurrence per head, computed in chunks.

Recurrence of head h, group g = h // (H / G); k_t = 1 if token t is in the same document as token t-1, else 0:

    S_t = k_t exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        [P, N]
    y_t = S_t C_t + D x_t                                 [P]

Chunked form (Dao & Gu 2024, "Transformers are SSMs", section 6). In a chunk, a_l = dt_l A, cum_l = a_1 + ... + a_l,
u_s = dt_s x_s, r = run number of a token (`segments.run_ids`), r_before = run of the token before the chunk,
S_in = state before the chunk:

    M[l,s] = [s <= l] [r_l = r_s] exp(cum_l - cum_s)
    y_l    = sum_s (C_l . B_s) M[l,s] u_s  +  [r_l = r_before] exp(cum_l) S_in C_l  +  D x_l
    S_out  = [r_last = r_before] exp(cum_last) S_in  +  sum_s [r_s = r_last] exp(cum_last - cum_s) u_s B_s^T

Exponents are differences taken first, so they are <= 0; exp(cum_l) * exp(-cum_s) would overflow under strong decay.
Resets are zeros that multiply, never -inf in cum, which would give NaN in the gradients.

Shapes: B batch, T time, H heads, G groups, R = H / G heads of a group, P head dim, N state, Z chunks,
C chunk length (einsum letters l and s: two positions of one chunk).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import choose
from pallas_kernels.segments import require_shape, run_ids

# Full float32 products also on GPUs, whose default rounds float32 operands to TF32.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    chunk_size: int = 128,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    return_final_state: bool = False,
    impl: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Run the recurrence of this file over time; differentiable in all float inputs.

    Args:
      x: [B, T, H, P], any T.
      dt: [B, T, H], step sizes after softplus, >= 0 (a token with dt = 0 leaves the state alone: padding).
      A: [H], negative decay rates.
      B, C: [B, T, G, N], shared by the H / G heads of a group.
      D: [H] skip weights, or None for no skip.
      chunk_size: tokens of a chunk; changes speed and rounding, not the result.
      initial_state: [B, H, P, N], state before token 0 of the document of token 0; None is zeros.
      segment_ids: [B, T] integers compared for equality between neighbours only (0 is an ordinary id, an id that
        comes back later is another document); None is one document a row.
      return_final_state: also return the state after the last token, which belongs to the last document.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      y [B, T, H, P] in x's dtype, and with return_final_state the state [B, H, P, N]. Computed in float32, or in
      float64 where an input is float64; the state has that dtype.

    Raises:
      ValueError: shapes do not fit, chunk_size < 1, or `impl` cannot run.
    """
    batch, time, heads, head_dim = _check(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size)
    dtype = jnp.result_type(x, dt, A, B, C, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, B.shape[3]), dtype)
    run = jnp.zeros((batch, time), jnp.int32) if segment_ids is None else run_ids(segment_ids)
    arguments = (z.astype(dtype) for z in (x, dt, A, B, C))
    y_BTHP, state_BHPN = _IMPLEMENTATIONS[choose("ssd", impl)](
        *arguments, initial_state.astype(dtype), run, chunk_size=min(chunk_size, time)
    )
    if D is not None:
        y_BTHP = y_BTHP + D.astype(dtype)[:, None] * x.astype(dtype)
    y_BTHP = y_BTHP.astype(x.dtype)
    return (y_BTHP, state_BHPN) if return_final_state else y_BTHP


def ssd_reference(x_BTHP, dt_BTH, A, B_BTGN, C_BTGN, state_BHPN, run, *, chunk_size):
    """Chunked form: all arguments of one float dtype, run [B, T] -> y without the skip, final state."""
    batch, time, heads, head_dim = x_BTHP.shape
    groups, state_dim = B_BTGN.shape[2:]
    length, chunks = chunk_size, -(-time // chunk_size)

    def split(z_BT, mode="constant"):
        """[B, T, ...] -> [B, Z, C, ...]; the tail chunk is padded with dt = 0, which leaves the state alone."""
        widths = [(0, 0), (0, chunks * length - time)] + [(0, 0)] * (z_BT.ndim - 2)
        return jnp.pad(z_BT, widths, mode=mode).reshape(batch, chunks, length, *z_BT.shape[2:])

    per_group = (groups, heads // groups)
    run_BZC = split(run, mode="edge")
    before_BZ = jnp.pad(run_BZC[:, :-1, -1], ((0, 0), (1, 0)))  # run 0 owns the initial state
    dt_BZCGR = split(dt_BTH).reshape(batch, chunks, length, *per_group)
    u_BZCGRP = split(x_BTHP * dt_BTH[..., None]).reshape(batch, chunks, length, *per_group, head_dim)
    B_BZCGN, C_BZCGN = split(B_BTGN), split(C_BTGN)

    cum_BZGRC = jnp.cumsum(jnp.einsum("bzlgr,gr->bzgrl", dt_BZCGR, A.reshape(per_group)), axis=-1)
    last_BZGR = cum_BZGRC[..., -1]

    # Inside the chunk.
    visible = jnp.tril(jnp.ones((length, length), bool)) & (run_BZC[:, :, :, None] == run_BZC[:, :, None, :])
    visible = visible[:, :, None, None]
    exponent = jnp.where(visible, cum_BZGRC[..., :, None] - cum_BZGRC[..., None, :], 0)
    M_BZGRCC = jnp.where(visible, jnp.exp(exponent), 0)
    CB_BZGCC = _einsum("bzlgn,bzsgn->bzgls", C_BZCGN, B_BZCGN)
    y_BZCGRP = _einsum("bzgrls,bzsgrp->bzlgrp", CB_BZGCC[:, :, :, None] * M_BZGRCC, u_BZCGRP)

    # What each chunk adds to the state, and the recurrence over chunks.
    is_last_BZC = run_BZC == run_BZC[:, :, -1:]
    weight_BZGRC = jnp.where(is_last_BZC[:, :, None, None], jnp.exp(last_BZGR[..., None] - cum_BZGRC), 0)
    added_BZGRPN = _einsum("bzgrs,bzsgrp,bzsgn->bzgrpn", weight_BZGRC, u_BZCGRP, B_BZCGN)
    keep_BZGR = jnp.where((run_BZC[:, :, -1] == before_BZ)[:, :, None, None], jnp.exp(last_BZGR), 0)

    def next_chunk(state, chunk):
        keep, added = chunk
        return keep[..., None, None] * state + added, state

    state = state_BHPN.reshape(batch, *per_group, head_dim, state_dim)
    by_chunk = (jnp.moveaxis(keep_BZGR, 1, 0), jnp.moveaxis(added_BZGRPN, 1, 0))
    state, before_ZBGRPN = jax.lax.scan(next_chunk, state, by_chunk)

    # What each token reads from the state before its chunk.
    reads_BZC = run_BZC == before_BZ[:, :, None]
    decay_BZGRC = jnp.where(reads_BZC[:, :, None, None], jnp.exp(cum_BZGRC), 0)
    read_BZCGRP = _einsum("bzlgn,zbgrpn->bzlgrp", C_BZCGN, before_ZBGRPN)
    y_BZCGRP = y_BZCGRP + jnp.moveaxis(decay_BZGRC, -1, 2)[..., None] * read_BZCGRP

    y_BTHP = y_BZCGRP.reshape(batch, chunks * length, heads, head_dim)[:, :time]
    return y_BTHP, state.reshape(batch, heads, head_dim, state_dim)


def ssd_sequential(x, dt, A, B, C, *, D=None, initial_state=None, segment_ids=None):
    """The recurrence token by token: the truth for tests. Arguments as in `ssd`; returns (y, final state)."""
    batch, time, heads, head_dim = x.shape
    run = jnp.zeros((batch, time), jnp.int32) if segment_ids is None else run_ids(segment_ids)
    starts = jnp.pad(run[:, 1:] != run[:, :-1], ((0, 0), (1, 0)))
    dtype = jnp.result_type(x, dt, A, B, C, jnp.float32)
    state = jnp.zeros((batch, heads, head_dim, B.shape[3]), dtype) if initial_state is None else initial_state

    def token(state_BHPN, inputs):
        x_BHP, dt_BH, B_BGN, C_BGN, start = inputs
        state_BHPN = jnp.where(start[:, None, None, None], 0, state_BHPN)
        y_BHP, state_BHPN = ssd_step(state_BHPN, x_BHP, dt_BH, A, B_BGN, C_BGN, D)
        return state_BHPN, y_BHP

    over_time = tuple(jnp.moveaxis(z, 1, 0) for z in (x, dt, B, C, starts))
    state, y_TBHP = jax.lax.scan(token, state.astype(dtype), over_time)
    return jnp.moveaxis(y_TBHP, 0, 1), state


def ssd_step(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of decoding: state [B,H,P,N], x [B,H,P], dt [B,H], A [H], B and C [B,G,N], D [H] -> (y, new state).

    Computed in float32 (float64 where an input is float64); y [B, H, P] in x's dtype, the state in its own dtype.
    """
    batch, heads, head_dim = x.shape
    groups, state_dim = B.shape[1:]
    dtype = jnp.result_type(state, x, dt, A, B, C, jnp.float32)
    x_BHP, dt_BH, B_BGN, C_BGN = (z.astype(dtype) for z in (x, dt, B, C))
    per_head = (batch, groups, heads // groups, head_dim, state_dim)
    decay_BH = jnp.exp(dt_BH * A.astype(dtype))
    u_BGRP = (x_BHP * dt_BH[..., None]).reshape(per_head[:-1])
    added_BGRPN = u_BGRP[..., None] * B_BGN[:, :, None, None, :]
    new_BHPN = decay_BH[..., None, None] * state.astype(dtype) + added_BGRPN.reshape(state.shape)
    y_BHP = _einsum("bgrpn,bgn->bgrp", new_BHPN.reshape(per_head), C_BGN).reshape(x.shape)
    if D is not None:
        y_BHP = y_BHP + D.astype(dtype)[:, None] * x_BHP
    return y_BHP.astype(x.dtype), new_BHPN.astype(state.dtype)


def _check(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size):
    require_shape("ssd", "x", x, "[B, T, H, P]", (None,) * 4)
    require_shape("ssd", "B", B, "[B, T, G, N]", (*x.shape[:2], None, None))
    batch, time, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    require_shape("ssd", "C", C, "[B, T, G, N]", B.shape)
    require_shape("ssd", "dt", dt, "[B, T, H]", x.shape[:3])
    require_shape("ssd", "A", A, "[H]", (heads,))
    if D is not None:
        require_shape("ssd", "D", D, "[H]", (heads,))
    if initial_state is not None:
        require_shape("ssd", "initial_state", initial_state, "[B, H, P, N]", (batch, heads, head_dim, state_dim))
    if segment_ids is not None:
        require_shape("ssd", "segment_ids", segment_ids, "[B, T]", (batch, time))
    if heads % groups:
        raise ValueError(f"ssd: the heads of x ({heads}) must be a multiple of the groups of B and C ({groups})")
    if chunk_size < 1 or time < 1:
        raise ValueError(f"ssd: chunk_size and T must be at least 1, got chunk_size={chunk_size}, T={time}")
    return x.shape


_IMPLEMENTATIONS = {"reference": ssd_reference}


class Case(NamedTuple):
    """Shapes and features of one test or benchmark case."""

    name: str
    batch: int
    time: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    chunk_size: int
    packed: bool = False
    initial_state: bool = False
    decay: float = 1.0  # scale of -A: 30 lets a chunk decay to nothing


CASES = (
    Case("one_chunk", 1, 16, 4, 8, 2, 4, 16),
    Case("odd_length", 2, 59, 4, 5, 2, 7, 16),
    Case("shorter_than_chunk", 2, 5, 2, 4, 1, 3, 128),
    Case("packed", 2, 59, 4, 5, 2, 7, 16, packed=True),
    Case("packed_state", 2, 59, 4, 5, 4, 7, 16, packed=True, initial_state=True),
    Case("strong_decay", 2, 64, 4, 5, 1, 7, 32, packed=True, initial_state=True, decay=30.0),
    Case("quickstart", 2, 256, 8, 32, 2, 64, 64, packed=True),
)


def example_inputs(case: Case, key: jax.Array, dtype=jnp.float32) -> tuple[tuple[jax.Array, ...], dict]:
    """Random (args, kwargs) of `ssd` for a case; packed cases hold one-token documents and an id that returns."""
    keys = jax.random.split(key, 7)
    batch, time, heads, groups = case.batch, case.time, case.heads, case.groups
    x = jax.random.normal(keys[0], (batch, time, heads, case.head_dim), dtype)
    dt = jax.nn.softplus(jax.random.normal(keys[1], (batch, time, heads), dtype))
    A = -case.decay * jnp.exp(jax.random.normal(keys[2], (heads,), dtype))
    B = jax.random.normal(keys[3], (batch, time, groups, case.state_dim), dtype)
    C = jax.random.normal(keys[4], (batch, time, groups, case.state_dim), dtype)
    kwargs = {"D": jax.random.normal(keys[5], (heads,), dtype), "chunk_size": case.chunk_size}
    if case.packed:
        position = jnp.arange(time)
        # Borders at 5 and 6 (a document of one token), at a chunk border, and a last token alone; id 3 returns.
        row = jnp.select([position < 5, position < 6, position < 32, position < time - 1], [3, 0, 7, 3], 9)
        kwargs["segment_ids"] = jnp.stack([jnp.roll(row, 4 * i) for i in range(batch)])
    if case.initial_state:
        kwargs["initial_state"] = jax.random.normal(keys[6], (batch, heads, case.head_dim, case.state_dim), dtype)
    return (x, dt, A, B, C), kwargs
