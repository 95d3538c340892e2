"""`decode_attention` for Hopper (Pallas Mosaic GPU): a few new tokens a row against a long cache, split over the cache.

Reading the cache once is all there is to it: 1 KiB a token of Nano (2 heads, keys and values, bfloat16) against a
handful of products. The T * R queries that share a key/value head become the rows of a 64-row tile (the rest of the
tile is zero), so each block of the cache is read once; drafts of more tokens take up to TILES of them, side by side, so
that the second reads what is in the L2 cache. A row's cache is cut into up to `splits` spans, one warpgroup
each, enough of them to fill the GPU at batch 1; their partial results are merged by log-sum-exp in a fixed order, so
that the result is the same in every run.

A warpgroup keeps SLOTS blocks of BLOCK keys and values on their way (TMA) while it works on one; two warpgroups fit on
a multiprocessor. Blocks are cut from pages, or are made of several small ones.

Shapes: B batch, T new tokens, H query heads, V key/value heads, R = H / V, X = T * R rows, D head dim, N splits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import LOG2_E, ROW, WGMMA, Interpret, along_rows, kernel_call, load, tiles

ROWS = 64  # of a wgmma tile
TILES = 4
BLOCK = 64  # tokens
SLOTS = 3  # 32 KiB each, with the queries 112 KiB: two warpgroups fit in the 227 KiB of a multiprocessor
HEAD_DIM = 128

# Twice what runs at once (two on each of 132 multiprocessors), so that rows of different lengths even out.
WARPGROUPS = 528
MOST_SPLITS = 66  # at batch 1, 131,072 tokens of 2 heads: 50 us on an H200 with 66, 56 with 132, 62 with 264

# Below every logit, and finite: a row that sees nothing in a span gets finite sums, which the merge weights by zero.
MASKED = -1e30


def unfit(q_BTHD: jax.Array, k_cache: jax.Array, v_cache: jax.Array, *, paged: bool) -> str:
    """Why the kernel cannot take these operands, or ""."""
    dtypes = sorted({str(z.dtype) for z in (q_BTHD, k_cache, v_cache)})
    if dtypes != ["bfloat16"]:
        return f"q and the cache must be bfloat16, got {', '.join(dtypes)}"
    _, time, heads, head_dim = q_BTHD.shape
    page_size, kv_heads = k_cache.shape[1:3]
    if head_dim != HEAD_DIM:
        return f"head_dim must be {HEAD_DIM}, got {head_dim}"
    if time * heads // kv_heads > TILES * ROWS:  # any prompt: a reason without its length is said once
        return f"at most {TILES * ROWS} new tokens times query heads of a key/value head"
    if page_size % 8:  # TMA copies whole rows of 8
        return f"page_size must be a multiple of 8, got {page_size}"
    if paged and page_size % BLOCK and BLOCK % page_size:
        return f"page_size must be 8, 16, 32 or a multiple of {BLOCK}, got {page_size}"
    return ""


def decode_attention(
    q_BTHD: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    page_table: jax.Array | None,
    *,
    scale: float,
    splits: int | None = None,
    interpret: Interpret = None,
) -> jax.Array:
    """As `attention.decode_attention`. splits: most spans of a row, None to choose; `interpret`: run it on the CPU."""
    batch, time, heads, head_dim = q_BTHD.shape
    kv_heads = k_cache.shape[2]
    shared = heads // kv_heads
    rows = time * shared
    pages_of_row = 1 if page_table is None else page_table.shape[1]
    blocks = -(-k_cache.shape[1] * pages_of_row // BLOCK)
    if splits is None:
        splits = min(max(1, WARPGROUPS // (batch * kv_heads)), MOST_SPLITS)
    splits = min(splits, blocks)

    q_BVXD = q_BTHD.reshape(batch, time, kv_heads, shared, head_dim).transpose(0, 2, 1, 3, 4)
    q_BVXD = q_BVXD.reshape(batch, kv_heads, rows, head_dim)
    q_BVXD = jnp.pad(q_BVXD, ((0, 0), (0, 0), (0, -rows % ROWS), (0, 0)))
    kernel = _kernel(
        (batch, time, kv_heads), k_cache.shape, pages_of_row, page_table is not None, splits, shared, scale, interpret
    )
    lengths = lengths.astype(jnp.int32)
    operands = [q_BVXD, k_cache, v_cache, lengths, *([] if page_table is None else [page_table.astype(jnp.int32)])]
    out_BVNXD, top_BVNX, sum_BVNX = kernel(*operands)

    used = _used(lengths, time, splits)[1]
    here_BVNX = (jnp.arange(splits) < used[:, None])[:, None, :, None]
    top_BVNX = jnp.where(here_BVNX, top_BVNX[..., :rows], MASKED)
    weight_BVNX = jnp.where(here_BVNX, jnp.exp2(top_BVNX - top_BVNX.max(2, keepdims=True)), 0)
    total_BVX = jnp.where(here_BVNX, weight_BVNX * sum_BVNX[..., :rows], 0).sum(2)
    out_BVNXD = jnp.where(here_BVNX[..., None], weight_BVNX[..., None] * out_BVNXD[..., :rows, :], 0)
    out_BVXD = out_BVNXD.sum(2) / total_BVX[..., None]
    out_BVTRD = out_BVXD.reshape(batch, kv_heads, time, shared, head_dim)
    return out_BVTRD.transpose(0, 2, 1, 3, 4).reshape(q_BTHD.shape).astype(q_BTHD.dtype)


def _used(length, time, splits):
    """Blocks of each span of a row that holds `length` tokens before the new ones, and how many spans it takes."""
    blocks = (length + time + BLOCK - 1) // BLOCK
    span = (blocks + splits - 1) // splits
    return span, (blocks + span - 1) // span


@functools.lru_cache
def _kernel(sizes, cache_shape, pages_of_row, paged, splits, shared, scale, interpret):
    batch, time, kv_heads = sizes
    page_size = cache_shape[1]
    piece = min(BLOCK, page_size) if paged else BLOCK  # tokens of one copy
    pieces = BLOCK // piece
    rows = time * shared
    row_tiles = -(-rows // ROWS)
    stored = min(rows, ROWS)
    float32, bfloat16, int32 = jnp.float32, jnp.bfloat16, jnp.int32
    tile, square = (ROWS, HEAD_DIM), (ROWS, BLOCK)

    def body(q_g, k_g, v_g, lengths_g, *rest):
        *table_g, out_g, top_g, sum_g, ((q_s, p_s, k_s, v_s), o_s), full, q_full = rest
        x, head, split, b = (lax.axis_index(name) for name in "xvnb")
        tile_rows = pl.ds(x * ROWS, ROWS)
        length = lengths_g[b]
        span, used = _used(length, time, splits)
        first = split * span
        last = jnp.minimum(first + span, (length + time + BLOCK - 1) // BLOCK)

        def fetch(block, slot):
            for i in range(pieces):
                position = block * BLOCK + i * piece
                if paged:
                    page = table_g[0][b, jnp.minimum(lax.div(position, int32(page_size)), pages_of_row - 1)]
                    position = lax.rem(position, int32(page_size))
                else:
                    page = b
                source = (page, pl.ds(position, piece), head)
                to = pl.ds(i * piece, piece)
                plgpu.copy_gmem_to_smem(k_g.at[source], k_s.at[slot, to], full.at[slot])
                plgpu.copy_gmem_to_smem(v_g.at[source], v_s.at[slot, to], full.at[slot])

        def product(shape, left, right):
            def accumulate(acc):
                plgpu.wgmma(acc, left, right)
                plgpu.wgmma_wait(0)
                return acc[...]

            return pl.run_scoped(accumulate, plgpu.ACC(shape, float32))

        def iota(shape, axis):
            return plgpu.broadcasted_iota(int32, shape, axis, layout=WGMMA)

        def step(block, carry):
            out, top, total = carry
            slot = lax.rem(block - first, int32(SLOTS))
            plgpu.barrier_wait(full.at[slot])
            left = length + time - block * BLOCK  # tokens from here on

            @pl.when(left < BLOCK)
            def unwritten():  # may hold anything, and 0 * NaN would spoil the sum
                v = load(v_s.at[slot], WGMMA)
                v = jnp.where(iota((BLOCK, HEAD_DIM), 0) < left, v.astype(float32), 0.0)
                v_s.at[slot][...] = v.astype(bfloat16)
                plgpu.commit_smem()

            logits = product(square, q_s, k_s.at[slot].transpose((1, 0))) * (scale * LOG2_E)
            seen = left - time + lax.div(x * ROWS + iota(square, 0), jnp.full(square, shared, int32))
            logits = jnp.where(iota(square, 1) <= seen, logits, MASKED)
            new_top = jnp.maximum(top, logits.max(axis=1))
            p = jnp.exp2(logits - along_rows(new_top, square))
            kept = jnp.exp2(top - new_top)
            total = total * kept + p.sum(axis=1)
            p = p.astype(bfloat16)
            if interpret is not None:  # which has no wgmma with an operand in registers
                p_s[...] = p
                plgpu.commit_smem()
                p = p_s
            out = out * along_rows(kept, tile) + product(tile, p, v_s.at[slot])

            @pl.when(block + SLOTS < last)
            def refill():
                fetch(block + SLOTS, slot)

            return out, new_top, total

        @pl.when(split < used)
        def _():
            plgpu.copy_gmem_to_smem(q_g.at[b, head, tile_rows], q_s, q_full)
            for i in range(SLOTS):
                pl.when(first + i < last)(functools.partial(fetch, first + i, i))
            plgpu.barrier_wait(q_full)
            start = (
                plgpu.layout_cast(jnp.zeros(tile, float32), WGMMA),
                plgpu.layout_cast(jnp.full((ROWS,), MASKED, float32), ROW),
                plgpu.layout_cast(jnp.zeros((ROWS,), float32), ROW),
            )
            out, top, total = lax.fori_loop(first, last, step, start)
            top_g.at[b, head, split, tile_rows][...] = top
            sum_g.at[b, head, split, tile_rows][...] = total
            o_s[...] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s.at[pl.ds(0, stored)], out_g.at[b, head, split, pl.ds(x * stored, stored)])
            plgpu.wait_smem_to_gmem(0)

    partial = (batch, kv_heads, splits)
    in_use = [
        tiles(*tile),
        tiles(*square) if interpret is not None else None,
        tiles(SLOTS, BLOCK, HEAD_DIM),
        tiles(SLOTS, BLOCK, HEAD_DIM),
    ]
    return kernel_call(
        body,
        warpgroups=1,
        interpret=interpret,
        approx_math=True,
        out_type=[
            jax.ShapeDtypeStruct((*partial, row_tiles * stored, HEAD_DIM), float32),
            jax.ShapeDtypeStruct((*partial, row_tiles * ROWS), float32),
            jax.ShapeDtypeStruct((*partial, row_tiles * ROWS), float32),
        ],
        grid=(row_tiles, kv_heads, splits, batch),
        grid_names=("x", "v", "n", "b"),
        scratch_types=[
            plgpu.RefUnion(in_use, plgpu.SMEM(tile, float32)),  # the result takes the place of its operands
            plgpu.Barrier(num_arrivals=2 * pieces, num_barriers=SLOTS),
            plgpu.Barrier(),
        ],
    )
