"""Gradients of attention for Hopper (Pallas Mosaic GPU), the same bit for bit in every run.

cuDNN adds up dq with atomics, in any order, and its workspace for packed documents grows with their number. Here each
gradient is summed in a fixed order, and from the log-sum-exp that cuDNN's forward pass returned:

    p_ij = exp(scale q_i . k_j - lse_i)      ds_ij = p_ij (dout_i . v_j - delta_i),  delta_i = dout_i . out_i
    dq_i = scale sum_j ds_ij k_j             dk_j = scale sum_i ds_ij q_i            dv_j = sum_i p_ij dout_i

Query i sees the keys first_i .. last_i - 1: from the start of its document to itself. Both kernels walk over the
blocks in which something is seen alone, and mask in each.

`_dq`: a block is 128 queries of a head (two warpgroups, 64 rows each) and walks over blocks of 64 keys. `_dkv`: a block
is 128 keys of a key/value head and walks over blocks of 64 queries, of some of the heads that share it; their sums are
added afterwards. A third warpgroup loads (TMA), STAGES blocks ahead.

Shapes: B batch, T queries, S keys, H query heads, V key/value heads, D head dim, N parts of the heads of a key/value
head, X blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import (
    COL,
    LOG2_E,
    ROW,
    WGMMA,
    Interpret,
    along_columns,
    along_rows,
    kernel_call,
    load,
    tiles,
)

BLOCK, HALF = 128, 64  # rows of a block, and of one of its warpgroups; the other side comes HALF at a time
STAGES = 3
SQUARE = (HALF, HALF)
MOST_HEAD_DIM = 128  # the sums of more do not fit in registers
BLOCKS = 4 * 132  # of `_dkv`: enough to even out their lengths on as many multiprocessors


def gradients(
    q_BTHD: jax.Array,
    k_BSVD: jax.Array,
    v_BSVD: jax.Array,
    out_BTHD: jax.Array,
    dout_BTHD: jax.Array,
    lse_BHT: jax.Array,
    first_BT: jax.Array,
    last_BT: jax.Array,
    *,
    scale: float,
    interpret: Interpret = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv of attention whose query i of row b sees the keys first[b, i] .. last[b, i] - 1.

    Args:
      q_BTHD, k_BSVD, v_BSVD, out_BTHD, dout_BTHD: bfloat16 or float16.
      lse_BHT: float32 log-sum-exp of scale q . k over all keys of a query, those of other calls included; what a query
        that sees nothing has does not matter, while its out and dout must be finite.
      first_BT, last_BT: int32; a query that sees nothing has first >= last. Neither decreases along the queries that
        see something.
      interpret: see `mosaic`.
    """
    keys, head_dim = k_BSVD.shape[1], q_BTHD.shape[3]
    if not q_BTHD.size:
        return jnp.zeros_like(q_BTHD), jnp.zeros_like(k_BSVD), jnp.zeros_like(v_BSVD)
    delta_BHT = jnp.swapaxes((out_BTHD.astype(jnp.float32) * dout_BTHD.astype(jnp.float32)).sum(-1), 1, 2)
    extra = -q_BTHD.shape[1] % BLOCK
    lse, delta = (jnp.pad(z, ((0, 0), (0, 0), (0, extra))) for z in (lse_BHT * LOG2_E, delta_BHT))
    seen = (first_BT, jnp.maximum(last_BT - first_BT, 0))
    first, count = (jnp.pad(z, ((0, 0), (0, extra))) for z in seen)
    wider = (HALF if head_dim <= HALF else MOST_HEAD_DIM) - head_dim

    def padded(z: jax.Array) -> jax.Array:  # TMA copies whole rows of 8
        return jnp.pad(z, ((0, 0), (0, -z.shape[1] % 8), (0, 0), (0, wider)))

    operands = [*(padded(z) for z in (q_BTHD, dout_BTHD, k_BSVD, v_BSVD)), lse, delta, first, count]
    dq = _dq(*operands, scale=scale, interpret=interpret)
    dk, dv = _dkv(*operands, scale=scale, interpret=interpret)
    return dq[:, : q_BTHD.shape[1], :, :head_dim], dk[:, :keys, :, :head_dim], dv[:, :keys, :, :head_dim]


def _spans(first, count, rows):
    """Of each block of `rows` queries: first and last + 1 of the keys that any of them sees."""
    first, count = (z.reshape(z.shape[0], -1, rows) for z in (first, count))
    some = count > 0
    return jnp.where(some, first, jnp.iinfo(jnp.int32).max).min(2), jnp.where(some, first + count, 0).max(2)


def _walk_over_keys(first, count):
    """[B, blocks of BLOCK queries, 2]: from and to which block of HALF keys something is seen, int32."""
    any_first, any_last = _spans(first, count, BLOCK)
    end = -(-any_last // HALF)
    return jnp.stack([jnp.minimum(any_first // HALF, end), end], 2)


def _walk_over_queries(first, count, key_blocks):
    """[B, key_blocks, 2]: from and to which block of HALF queries something of a block of BLOCK keys is seen, int32."""
    any_first, any_last = (z[:, None] for z in _spans(first, count, HALF))
    key = jnp.arange(key_blocks)[:, None] * BLOCK
    some = (any_first < key + BLOCK) & (any_last > key)
    block = jnp.arange(some.shape[2], dtype=jnp.int32)
    end = jnp.where(some, block + 1, 0).max(2)
    return jnp.stack([jnp.where(some, block, end[..., None]).min(2), end], 2)


def _slot(n):
    return lax.rem(n, jnp.int32(STAGES))


def _fill(steps, load, full, free):
    """The loading warpgroup: load(n, slot, barrier) of each step n in turn."""

    def step(n, _):
        slot = _slot(n)

        @pl.when(n >= STAGES)
        def wait_until_free():
            plgpu.barrier_wait(free.at[slot])

        load(n, slot, full.at[slot])

    lax.fori_loop(0, steps, step, None)

    def drain(n, _):  # a barrier's phases must all be waited for
        plgpu.barrier_wait(free.at[_slot(n)])

    lax.fori_loop(jnp.maximum(steps - STAGES, 0), steps, drain, None)


def _seen(key, count):
    """Whether 0 <= key < count, by one comparison."""
    return key.astype(jnp.uint32) < count.astype(jnp.uint32)


def _two_products(first, second, then):
    """then(a, b) of two products [HALF, D] x [D, HALF]: a function of a read before b is there, and one of both."""

    def run(first_acc, second_acc):
        plgpu.wgmma(first_acc, *first)
        plgpu.wgmma(second_acc, *second)
        early = then[0](plgpu.wgmma_accumulator_load(first_acc, wait_n=1))
        return then[1](early, plgpu.wgmma_accumulator_load(second_acc, wait_n=0))

    return pl.run_scoped(run, plgpu.ACC(SQUARE, jnp.float32), plgpu.ACC(SQUARE, jnp.float32))


def _index(axis):
    return plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=WGMMA)


def _operand(value, staged, *at):
    """The left operand of a product: registers, or shared memory for the interpreter, which has no such wgmma."""
    if staged is None:
        return value
    staged.at[at][...] = value
    plgpu.commit_smem()
    return staged.at[at]


def _dq(q_BTHD, dout_BTHD, k_BSVD, v_BSVD, lse_BHT, delta_BHT, first_BT, count_BT, *, scale, interpret):
    batch, _, heads, head_dim = q_BTHD.shape
    shared = heads // k_BSVD.shape[2]
    walk_BX2 = _walk_over_keys(first_BT, count_BT)
    blocks = walk_BX2.shape[1]
    dtype = q_BTHD.dtype

    def body(walk_g, q_g, dout_g, k_g, v_g, lse_g, delta_g, first_g, count_g, dq_g, *scratch):
        q_s, dout_s, k_s, v_s, ds_s, q_full, full, free = scratch
        # The longest walks first: those of the last queries.
        x, b, h, warpgroup = blocks - 1 - lax.axis_index("x"), *(lax.axis_index(name) for name in ("b", "h", "wg"))
        start, end = walk_g[b, x, 0], walk_g[b, x, 1]

        @pl.when(warpgroup == 2)
        def _():
            if interpret is None:
                plgpu.set_max_registers(24, action="decrease")
            rows, head = pl.ds(x * BLOCK, BLOCK), lax.div(h, jnp.int32(shared))
            plgpu.copy_gmem_to_smem(q_g.at[b, rows, h], q_s, q_full)
            plgpu.copy_gmem_to_smem(dout_g.at[b, rows, h], dout_s, q_full)

            def load_step(n, slot, barrier):
                keys = pl.ds((start + n) * HALF, HALF)
                plgpu.copy_gmem_to_smem(k_g.at[b, keys, head], k_s.at[slot], barrier)
                plgpu.copy_gmem_to_smem(v_g.at[b, keys, head], v_s.at[slot], barrier)

            _fill(end - start, load_step, full, free)

        def compute(w):
            if interpret is None:
                plgpu.set_max_registers(240, action="increase")
            mine, rows = pl.ds(w * HALF, HALF), pl.ds(x * BLOCK + w * HALF, HALF)
            lse, delta = (load(z.at[b, h, rows], ROW) for z in (lse_g, delta_g))
            first, count = (load(z.at[b, rows], ROW) for z in (first_g, count_g))
            plgpu.barrier_wait(q_full)

            def walk(dq):
                def step(j, _):
                    slot = _slot(j - start)
                    plgpu.barrier_wait(full.at[slot])

                    def softmax(logits):
                        p = jnp.exp2(logits * (scale * LOG2_E) - along_rows(lse, SQUARE))
                        key = j * HALF + _index(1)
                        return jnp.where(_seen(key - along_rows(first, SQUARE), along_rows(count, SQUARE)), p, 0.0)

                    ds = _two_products(
                        (q_s.at[mine], k_s.at[slot].transpose((1, 0))),
                        (dout_s.at[mine], v_s.at[slot].transpose((1, 0))),
                        (softmax, lambda p, dp: p * (dp - along_rows(delta, SQUARE))),
                    )

                    @pl.when(j > start)  # all products of the step before are done
                    def free_slot():
                        plgpu.barrier_arrive(free.at[_slot(j - start - 1)])

                    plgpu.wgmma(dq, _operand(ds.astype(dtype), ds_s, w), k_s.at[slot])

                lax.fori_loop(start, end, step, None)
                plgpu.wgmma_wait(0)

                @pl.when(end > start)
                def _():
                    plgpu.barrier_arrive(free.at[_slot(end - start - 1)])

                return dq[...]

            dq = pl.run_scoped(walk, plgpu.ACC((HALF, head_dim), jnp.float32))
            q_s[mine] = (dq * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[mine], dq_g.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0)

        for w in range(2):
            pl.when(warpgroup == w)(functools.partial(compute, w))

    call = kernel_call(
        body,
        warpgroups=3,
        interpret=interpret,
        approx_math=True,
        out_type=jax.ShapeDtypeStruct(q_BTHD.shape, dtype),
        grid=(blocks, batch, heads),
        grid_names=("x", "b", "h"),
        scratch_types=[
            tiles(BLOCK, head_dim, dtype=dtype),
            tiles(BLOCK, head_dim, dtype=dtype),
            tiles(STAGES, HALF, head_dim, dtype=dtype),
            tiles(STAGES, HALF, head_dim, dtype=dtype),
            None if interpret is None else tiles(2, *SQUARE, dtype=dtype),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
    )
    return call(walk_BX2, q_BTHD, dout_BTHD, k_BSVD, v_BSVD, lse_BHT, delta_BHT, first_BT, count_BT)


def _parts(blocks, shared):
    """Into how many parts the heads of a key/value head go: the fewest that make BLOCKS blocks, a divisor."""
    return next(n for n in range(1, shared + 1) if shared % n == 0 and (blocks * n >= BLOCKS or n == shared))


def _dkv(q_BTHD, dout_BTHD, k_BSVD, v_BSVD, lse_BHT, delta_BHT, first_BT, count_BT, *, scale, interpret):
    batch, _, heads, head_dim = q_BTHD.shape
    keys, kv_heads = k_BSVD.shape[1:3]
    blocks = pl.cdiv(keys, BLOCK)
    parts = _parts(batch * blocks * kv_heads, heads // kv_heads)
    heads_of_part = heads // kv_heads // parts
    walk_BX2 = _walk_over_queries(first_BT, count_BT, blocks)
    dtype = q_BTHD.dtype

    def body(walk_g, q_g, dout_g, k_g, v_g, lse_g, delta_g, first_g, count_g, dk_g, dv_g, *scratch):
        k_s, v_s, q_s, dout_s, lse_s, delta_s, first_s, count_s, p_s, k_full, full, free = scratch
        x, b, part, warpgroup = (lax.axis_index(name) for name in ("x", "b", "part", "wg"))
        start, end = walk_g[b, x, 0], walk_g[b, x, 1]
        blocks_of_head = end - start
        first_head = part * heads_of_part  # parts of a key/value head lie side by side

        @pl.when(warpgroup == 2)
        def _():
            if interpret is None:
                plgpu.set_max_registers(24, action="decrease")
            mine, head = pl.ds(x * BLOCK, BLOCK), lax.div(part, jnp.int32(parts))
            plgpu.copy_gmem_to_smem(k_g.at[b, mine, head], k_s, k_full)
            plgpu.copy_gmem_to_smem(v_g.at[b, mine, head], v_s, k_full)

            def load_step(n, slot, barrier):
                h, rows = (
                    first_head + lax.div(n, blocks_of_head),
                    pl.ds((start + lax.rem(n, blocks_of_head)) * HALF, HALF),
                )
                for source, target in (
                    (q_g.at[b, rows, h], q_s),
                    (dout_g.at[b, rows, h], dout_s),
                    (lse_g.at[b, h, rows], lse_s),
                    (delta_g.at[b, h, rows], delta_s),
                    (first_g.at[b, rows], first_s),
                    (count_g.at[b, rows], count_s),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], barrier)

            _fill(blocks_of_head * heads_of_part, load_step, full, free)

        def compute(w):
            if interpret is None:
                plgpu.set_max_registers(240, action="increase")
            mine = pl.ds(w * HALF, HALF)
            plgpu.barrier_wait(k_full)

            def walk(dk, dv):
                def step(h, i, _):
                    n = h * blocks_of_head + i - start
                    slot = _slot(n)
                    plgpu.barrier_wait(full.at[slot])

                    def softmax(logits):
                        p = jnp.exp2(logits * (scale * LOG2_E) - along_columns(load(lse_s.at[slot], COL), SQUARE))
                        key = x * BLOCK + w * HALF + _index(0)
                        first, count = (along_columns(load(z.at[slot], COL), SQUARE) for z in (first_s, count_s))
                        return jnp.where(_seen(key - first, count), p, 0.0)

                    def both(p, dp):
                        ds = p * (dp - along_columns(load(delta_s.at[slot], COL), SQUARE))
                        return p.astype(dtype), ds.astype(dtype)

                    p, ds = _two_products(
                        (k_s.at[mine], q_s.at[slot].transpose((1, 0))),
                        (v_s.at[mine], dout_s.at[slot].transpose((1, 0))),
                        (softmax, both),
                    )

                    plgpu.wgmma(dv, _operand(p, p_s, w, 0), dout_s.at[slot])
                    plgpu.wgmma(dk, _operand(ds, p_s, w, 1), q_s.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])

                def head(h, _):
                    lax.fori_loop(start, end, functools.partial(step, h), None)

                lax.fori_loop(0, heads_of_part, head, None)
                return dk[...], dv[...]

            accumulator = plgpu.ACC((HALF, head_dim), jnp.float32)
            dk, dv = pl.run_scoped(walk, accumulator, accumulator)
            rows = pl.ds(x * BLOCK + w * HALF, HALF)
            dk_g.at[b, part, rows][...] = dk * scale
            dv_g.at[b, part, rows][...] = dv

        for w in range(2):
            pl.when(warpgroup == w)(functools.partial(compute, w))

    partial_sums = jax.ShapeDtypeStruct((batch, kv_heads * parts, blocks * BLOCK, head_dim), jnp.float32)
    call = kernel_call(
        body,
        warpgroups=3,
        interpret=interpret,
        approx_math=True,
        out_type=[partial_sums, partial_sums],
        grid=(blocks, batch, kv_heads * parts),
        grid_names=("x", "b", "part"),
        scratch_types=[
            tiles(BLOCK, head_dim, dtype=dtype),
            tiles(BLOCK, head_dim, dtype=dtype),
            tiles(STAGES, HALF, head_dim, dtype=dtype),
            tiles(STAGES, HALF, head_dim, dtype=dtype),
            plgpu.SMEM((STAGES, HALF), jnp.float32),
            plgpu.SMEM((STAGES, HALF), jnp.float32),
            plgpu.SMEM((STAGES, HALF), jnp.int32),
            plgpu.SMEM((STAGES, HALF), jnp.int32),
            None if interpret is None else tiles(2, 2, *SQUARE, dtype=dtype),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=6, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
    )
    sums = call(walk_BX2, q_BTHD, dout_BTHD, k_BSVD, v_BSVD, lse_BHT, delta_BHT, first_BT, count_BT)

    def over_parts(z_BPSD: jax.Array) -> jax.Array:
        z_BVNSD = z_BPSD.reshape(batch, kv_heads, parts, -1, head_dim)[:, :, :, :keys]
        return jnp.swapaxes(z_BVNSD.sum(2), 1, 2).astype(dtype)

    return tuple(over_parts(z) for z in sums)
