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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.cost import BF16, FLOAT32, Cost
from pallas_kernels.dispatch import choose, require_shape
from pallas_kernels.segments import run_ids
from pallas_kernels.ssd_mosaic import ssd_mosaic, unfit

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
    time = _check(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size)
    run = None if segment_ids is None else run_ids(segment_ids)
    implementation = _IMPLEMENTATIONS[choose("ssd", impl, unfit={"mosaic": unfit(x, B, C)})]
    y_BTHP, state_BHPN = implementation(x, dt, A, B, C, D, initial_state, run, chunk_size=min(chunk_size, time))
    return (y_BTHP, state_BHPN) if return_final_state else y_BTHP


def ssd_reference(
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
) -> tuple[jax.Array, jax.Array]:
    """Chunked form in float32 (or float64): arguments as of `ssd`, run [B, T] from `run_ids` -> y, final state.

    Everything is transposed once to [B, Z, G, (R,) C, ...], so that each product below is a plain batched matmul:
    with time before the heads, XLA:CPU transposes around every product and the backward pass takes twice as long.
    """
    out_dtype = x_BTHP.dtype
    dtype = jnp.result_type(x_BTHP, dt_BTH, A, B_BTGN, C_BTGN, jnp.float32)
    x_BTHP, dt_BTH, A, B_BTGN, C_BTGN = (z.astype(dtype) for z in (x_BTHP, dt_BTH, A, B_BTGN, C_BTGN))
    batch, time, heads, head_dim = x_BTHP.shape
    groups, state_dim = B_BTGN.shape[2:]
    if state_BHPN is None:
        state_BHPN = jnp.zeros((batch, heads, head_dim, state_dim), dtype)
    if run is None:
        run = jnp.zeros((batch, time), jnp.int32)
    length, chunks = chunk_size, -(-time // chunk_size)
    per_group = (groups, heads // groups)

    def split(z_BT, mode="constant"):
        """[B, T, ...] -> [B, Z, C, ...]; the tail chunk is padded with dt = 0, which leaves the state alone."""
        widths = [(0, 0), (0, chunks * length - time)] + [(0, 0)] * (z_BT.ndim - 2)
        return jnp.pad(z_BT, widths, mode=mode).reshape(batch, chunks, length, *z_BT.shape[2:])

    run_BZC = split(run, mode="edge")
    before_BZ = jnp.pad(run_BZC[:, :-1, -1], ((0, 0), (1, 0)))  # run 0 owns the initial state
    dt_BZGRC = split(dt_BTH).reshape(batch, chunks, length, *per_group).transpose(0, 1, 3, 4, 2)
    u_BZCGRP = split(x_BTHP * dt_BTH[..., None]).reshape(batch, chunks, length, *per_group, head_dim)
    u_BZGRCP = u_BZCGRP.transpose(0, 1, 3, 4, 2, 5)
    B_BZGCN, C_BZGCN = (split(z).transpose(0, 1, 3, 2, 4) for z in (B_BTGN, C_BTGN))

    # The running sum as a product with a triangle of ones: jnp.cumsum is log2(C) passes.
    ones_CC = jnp.triu(jnp.ones((length, length), dt_BTH.dtype))
    cum_BZGRC = _einsum("bzgrs,sl->bzgrl", dt_BZGRC * A.reshape(*per_group, 1), ones_CC)
    last_BZGR = cum_BZGRC[..., -1]

    def where_run(mask, z):
        """Zero z [B, Z, G, R, ...] where mask [B, Z, ...] is false."""
        return jnp.where(mask[:, :, None, None], z, 0)

    # Inside the chunk.
    visible_BZCC = jnp.tril(jnp.ones((length, length), bool)) & (run_BZC[:, :, :, None] == run_BZC[:, :, None, :])
    exponent = where_run(visible_BZCC, cum_BZGRC[..., :, None] - cum_BZGRC[..., None, :])
    M_BZGRCC = where_run(visible_BZCC, jnp.exp(exponent))
    CB_BZGCC = _einsum("bzgln,bzgsn->bzgls", C_BZGCN, B_BZGCN)
    y_BZGRCP = _einsum("bzgrls,bzgrsp->bzgrlp", CB_BZGCC[:, :, :, None] * M_BZGRCC, u_BZGRCP)

    # What each chunk adds to the state, and the recurrence over chunks.
    weight_BZGRC = where_run(run_BZC == run_BZC[:, :, -1:], jnp.exp(last_BZGR[..., None] - cum_BZGRC))
    added_BZGRPN = _einsum("bzgrsp,bzgsn->bzgrpn", weight_BZGRC[..., None] * u_BZGRCP, B_BZGCN)
    keep_BZGR = where_run(run_BZC[:, :, -1] == before_BZ, jnp.exp(last_BZGR))

    def next_chunk(state_BGRPN, chunk):
        keep_BGR, added_BGRPN = chunk
        return keep_BGR[..., None, None] * state_BGRPN + added_BGRPN, state_BGRPN

    state_BGRPN = state_BHPN.astype(dtype).reshape(batch, *per_group, head_dim, state_dim)
    by_chunk = (jnp.moveaxis(keep_BZGR, 1, 0), jnp.moveaxis(added_BZGRPN, 1, 0))
    state_BGRPN, state_ZBGRPN = jax.lax.scan(next_chunk, state_BGRPN, by_chunk, unroll=4)

    # What each token reads from the state before its chunk.
    decay_BZGRC = where_run(run_BZC == before_BZ[:, :, None], jnp.exp(cum_BZGRC))
    read_BZGRCP = _einsum("bzgln,bzgrpn->bzgrlp", C_BZGCN, jnp.moveaxis(state_ZBGRPN, 0, 1))
    y_BZGRCP = y_BZGRCP + decay_BZGRC[..., None] * read_BZGRCP

    y_BTHP = y_BZGRCP.transpose(0, 1, 4, 2, 3, 5).reshape(batch, chunks * length, heads, head_dim)[:, :time]
    if D is not None:
        y_BTHP = y_BTHP + D.astype(dtype)[:, None] * x_BTHP
    return y_BTHP.astype(out_dtype), state_BGRPN.reshape(batch, heads, head_dim, state_dim)


def ssd_sequential(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
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
    return time


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "mosaic": ssd_mosaic,
    "reference": ssd_reference,
}


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


def example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random (args, kwargs) of `ssd` for a case; packed cases hold one-token documents and an id that returns."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)

    batch, time, heads, groups = case.batch, case.time, case.heads, case.groups
    x = normal(batch, time, heads, case.head_dim)
    dt = jax.nn.softplus(normal(batch, time, heads))
    A = -case.decay * jnp.exp(normal(heads))
    B, C = normal(batch, time, groups, case.state_dim), normal(batch, time, groups, case.state_dim)
    kwargs: dict[str, Any] = {"D": normal(heads), "chunk_size": case.chunk_size}
    if case.packed:
        # Borders at 5 and 6 (a document of one token), at a chunk border, and a last token alone; id 3 returns.
        position = np.arange(time)
        row = np.select([position < 5, position < 6, position < 32, position < time - 1], [3, 0, 7, 3], 9)
        kwargs["segment_ids"] = jnp.asarray(np.stack([np.roll(row, 4 * i) for i in range(batch)]), jnp.int32)
    if case.initial_state:
        kwargs["initial_state"] = normal(batch, heads, case.head_dim, case.state_dim)
    return (x, dt, A, B, C), kwargs


# The released models; a batch of Ultra is one row, since 256 heads of the reference do not fit otherwise.
BENCHMARKS = (
    Case("nano", 2, 8192, 64, 64, 8, 128, 128),
    Case("nano_packed", 2, 8192, 64, 64, 8, 128, 128, packed=True),
    Case("nano_64k", 1, 65536, 64, 64, 8, 128, 128, initial_state=True),
    Case("super", 2, 8192, 128, 64, 8, 128, 128),
    Case("ultra", 1, 8192, 256, 64, 8, 128, 128),
    Case("nano-4b", 2, 8192, 96, 80, 8, 128, 256),
)


def cost(case: Case) -> Cost:
    """C B^T, its product with u, the states and their reading; backward also C B^T and the states again.

    dt is float32. Chunk states between the passes are not counted: a fused kernel need not store them.
    """
    tokens = case.batch * case.time
    length = min(case.chunk_size, case.time)
    inner, shared = case.heads * case.head_dim, case.groups * case.state_dim
    scores, mixed, states = 2 * length * shared, 2 * length * inner, 2 * inner * case.state_dim
    x_or_y, B_and_C, dt = BF16 * inner, 2 * BF16 * shared, FLOAT32 * case.heads
    return Cost(
        flops=tokens * (scores + mixed + 2 * states),
        bytes=tokens * (2 * x_or_y + B_and_C + dt),
        backward_flops=tokens * (3 * scores + 2 * mixed + 5 * states),
        backward_bytes=tokens * (3 * x_or_y + 2 * B_and_C + 2 * dt),
    )
