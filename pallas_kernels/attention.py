"""Softmax attention with shared key/value heads, over packed documents and over a paged cache.

    out_i = sum_j p_ij v_j        p_ij = softmax over the visible j of (scale q_i . k_j)

Query head h reads key/value head h // (H / KV). No positions are encoded (Nemotron 3 uses none). A query that sees
no key gives zeros.

Shapes: B batch, T queries, S keys, H query heads, V key/value heads, R = H / V query heads of a key/value head,
X = R * T rows of one product, D head dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import attention_cudnn, decode_attention_mosaic
from pallas_kernels.cost import BF16, Cost
from pallas_kernels.dispatch import choose, require_shape
from pallas_kernels.segments import run_ids

# Above this many query-key pairs a row, queries go block by block, each block recomputed in the backward pass, so
# that the [T, S] probabilities never exist at once.
PLAIN_PAIRS = 2048 * 2048
QUERY_BLOCK = 512

# Full float32 products also on GPUs, whose default rounds float32 operands to TF32.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Attend from each query to the keys of its document; differentiable in q, k and v.

    Args:
      q: [B, T, H, D].
      k, v: [B, S, V, D], H a multiple of V.
      causal: query i sees key j only if j <= i + (S - T): the queries are the last T of the S positions.
      scale: factor of q . k; None is D ** -0.5.
      segment_ids: [B, T] integers; None is one document a row. Alone (S must equal T) they are compared between
        neighbours, as in `ssd`: an id that comes back later in the row is another document.
      kv_segment_ids: [B, S], only together with segment_ids: query i sees key j only if the two ids are equal. Ids
        that come back are the same document here; `segments.run_ids` makes them distinct.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      [B, T, H, D] in q's dtype; logits, softmax and sums in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes do not fit, kv_segment_ids is missing or alone, or `impl` cannot run.
    """
    require_shape("attention", "q", q, "[B, T, H, D]", (None,) * 4)
    batch, time, heads, head_dim = q.shape
    require_shape("attention", "k", k, "[B, S, V, D]", (batch, None, None, head_dim))
    require_shape("attention", "v", v, "[B, S, V, D]", k.shape)
    _check_heads("attention", heads, k.shape[2])
    unfit = attention_cudnn.unfit(
        q, k, v, causal=causal, packed=segment_ids is not None, own_key_segments=kv_segment_ids is not None
    )
    if segment_ids is not None:
        require_shape("attention", "segment_ids", segment_ids, "[B, T]", (batch, time))
        if kv_segment_ids is not None:
            require_shape("attention", "kv_segment_ids", kv_segment_ids, "[B, S]", k.shape[:2])
        elif time != k.shape[1]:
            raise ValueError(
                f"attention: segment_ids alone need as many keys as queries, got {time} queries and {k.shape[1]} "
                "keys; pass kv_segment_ids too"
            )
        else:
            segment_ids = kv_segment_ids = run_ids(segment_ids)
    elif kv_segment_ids is not None:
        raise ValueError("attention: kv_segment_ids came without segment_ids; pass both")
    implementation = _IMPLEMENTATIONS[choose("attention", impl, unfit={"cudnn": unfit})]
    scale = head_dim**-0.5 if scale is None else scale
    return implementation(q, k, v, segment_ids, kv_segment_ids, causal=causal, scale=scale)


def attention_reference(
    q_BTHD: jax.Array,
    k_BSVD: jax.Array,
    v_BSVD: jax.Array,
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    *,
    causal: bool,
    scale: float,
    query_block: int | None = None,
) -> jax.Array:
    """All queries at once, or `query_block` at a time (None: where T * S is large)."""
    time, keys = q_BTHD.shape[1], k_BSVD.shape[1]
    query_position = (jnp.arange(time) + (keys - time))[None]

    def attend(q_BQHD, position, segment):
        visible = jnp.ones((1, position.shape[1], keys), bool)
        if causal:
            visible = jnp.arange(keys) <= position[..., None]
        if segment is not None and kv_segment_ids is not None:
            visible = visible & (segment[:, :, None] == kv_segment_ids[:, None, :])
        return _attend(q_BQHD, k_BSVD, v_BSVD, visible, scale)

    if query_block is None:
        query_block = QUERY_BLOCK if time * keys > PLAIN_PAIRS else time
    return _in_blocks(attend, query_block, q_BTHD, query_position, segment_ids)


def _in_blocks(attend, query_block, q_BTHD, *of_queries):
    """attend(q, *of_queries) for `query_block` queries at a time; each of `of_queries` is [B or 1, T] or None."""
    batch, time = q_BTHD.shape[:2]
    if query_block >= time:
        return attend(q_BTHD, *of_queries)
    blocks = -(-time // query_block)

    def split(z):
        widths = [(0, 0)] * z.ndim
        widths[1] = (0, blocks * query_block - time)
        return jnp.moveaxis(jnp.pad(z, widths).reshape(z.shape[0], blocks, query_block, *z.shape[2:]), 1, 0)

    inputs = [None if z is None else split(z) for z in (q_BTHD, *of_queries)]
    _, out = jax.lax.scan(jax.checkpoint(lambda _, block: (None, attend(*block))), None, inputs)
    return jnp.moveaxis(out, 0, 1).reshape(batch, blocks * query_block, *q_BTHD.shape[2:])[:, :time]


def _cudnn(q_BTHD, k_BSVD, v_BSVD, run, kv_run, *, causal, scale):
    return attention_cudnn.attention(q_BTHD, k_BSVD, v_BSVD, run, scale=scale)


def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    *,
    page_table: jax.Array | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Attend from new tokens to a cache that already holds their own keys and values.

    Args:
      q: [B, T, H, D], the new queries of row b, at positions lengths[b] .. lengths[b] + T - 1.
      k_cache, v_cache: [pages, page_size, V, D].
      lengths: [B] int, tokens of each row before the new ones.
      page_table: [B, pages of a row] int32: position p of row b lies in page page_table[b, p // page_size], at
        p % page_size. Entries past the row's end may be any valid page. None: row b is page b (contiguous cache).
      scale: factor of q . k; None is D ** -0.5.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      [B, T, H, D] in q's dtype; query at position i has seen positions 0 .. i. Computed in float32.

    Raises:
      ValueError: shapes do not fit, or `impl` cannot run.
    """
    require_shape("decode_attention", "q", q, "[B, T, H, D]", (None,) * 4)
    batch, _, heads, head_dim = q.shape
    pages = batch if page_table is None else None
    require_shape("decode_attention", "k_cache", k_cache, "[pages, page_size, V, D]", (pages, None, None, head_dim))
    require_shape("decode_attention", "v_cache", v_cache, "[pages, page_size, V, D]", k_cache.shape)
    require_shape("decode_attention", "lengths", lengths, "[B]", (batch,))
    if page_table is not None:
        require_shape("decode_attention", "page_table", page_table, "[B, pages of a row]", (batch, None))
    _check_heads("decode_attention", heads, k_cache.shape[2])
    unfit = _decode_unfit(q, k_cache, v_cache, page_table)
    implementation = _IMPLEMENTATIONS_DECODE[choose("decode_attention", impl, unfit=unfit)]
    scale = head_dim**-0.5 if scale is None else scale
    return implementation(q, k_cache, v_cache, lengths, page_table, scale=scale)


def decode_attention_reference(
    q_BTHD: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    page_table: jax.Array | None,
    *,
    scale: float,
) -> jax.Array:
    """Gather the pages of each row, then attention with a mask by position; queries in blocks where they are many."""
    time = q_BTHD.shape[1]
    k_BSVD, v_BSVD = (_rows_of_cache(cache, page_table) for cache in (k_cache, v_cache))
    key_position = jnp.arange(k_BSVD.shape[1])
    # Unwritten positions may hold anything, NaN included, and 0 * NaN would spoil the sum.
    written = key_position < lengths[:, None] + time
    v_BSVD = jnp.where(written[..., None, None], v_BSVD, 0)

    def attend(q_BQHD, query_position):
        return _attend(q_BQHD, k_BSVD, v_BSVD, key_position <= query_position[..., None], scale)

    query_block = QUERY_BLOCK if time * k_BSVD.shape[1] > PLAIN_PAIRS else time
    return _in_blocks(attend, query_block, q_BTHD, lengths[:, None] + jnp.arange(time))


def _rows_of_cache(cache, page_table):
    """[pages, page_size, V, D] -> [B, S, V, D]."""
    return cache if page_table is None else cache[page_table].reshape(page_table.shape[0], -1, *cache.shape[2:])


def _decode_cudnn(q_BTHD, k_cache, v_cache, lengths, page_table, *, scale):
    """A prompt into an empty cache is causal attention over itself; anything else goes to the reference."""
    time = q_BTHD.shape[1]

    def prompt():
        pages = None if page_table is None else page_table[:, : -(-time // k_cache.shape[1])]
        k_BTVD, v_BTVD = (_rows_of_cache(cache, pages)[:, :time] for cache in (k_cache, v_cache))
        return attention_cudnn.attention(q_BTHD, k_BTVD, v_BTVD, None, scale=scale)

    def onto_a_cache():
        return decode_attention_reference(q_BTHD, k_cache, v_cache, lengths, page_table, scale=scale)

    return jax.lax.cond((lengths == 0).all(), prompt, onto_a_cache)


def _decode_unfit(q, k_cache, v_cache, page_table):
    """Why the implementations of `decode_attention` cannot take these operands."""
    # A prompt may be longer than the cache: what does not fit was never written.
    size = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    prompt = jax.ShapeDtypeStruct((*q.shape[:2], *k_cache.shape[2:]), k_cache.dtype)
    cudnn = attention_cudnn.unfit(q, prompt, prompt, causal=True, packed=False, own_key_segments=False)
    if not 1 < q.shape[1] <= size:
        cudnn = f"there must be more than one new token and at most as many as the cache holds, got {q.shape[1]}"
    return {"mosaic": decode_attention_mosaic.unfit(q, k_cache, v_cache, paged=page_table is not None), "cudnn": cudnn}


def _attend(q_BTHD, k_BSVD, v_BSVD, visible, scale):
    """visible: bool [B or 1, T, S].

    The heads go before time and the R query heads of a key/value head become rows of one product: twice to three
    times as fast on XLA:CPU as leaving the transposes to einsum.
    """
    dtype = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    batch, time, heads, head_dim = q_BTHD.shape
    keys, kv_heads = k_BSVD.shape[1:3]
    per_head = (batch, kv_heads, heads // kv_heads, time)
    rows = (batch, kv_heads, heads // kv_heads * time)
    q_BTVRD = (q_BTHD.astype(dtype) * scale).reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    q_BVXD = q_BTVRD.transpose(0, 2, 3, 1, 4).reshape(*rows, head_dim)
    k_BVSD, v_BVSD = (z.astype(dtype).transpose(0, 2, 1, 3) for z in (k_BSVD, v_BSVD))
    logits_BVRTS = _einsum("bvxd,bvsd->bvxs", q_BVXD, k_BVSD).reshape(*per_head, keys)
    visible = visible[:, None, None]
    p_BVRTS = jax.nn.softmax(jnp.where(visible, logits_BVRTS, jnp.finfo(dtype).min), axis=-1)
    out_BVRTD = _einsum("bvxs,bvsd->bvxd", p_BVRTS.reshape(*rows, keys), v_BVSD).reshape(*per_head, head_dim)
    # A query that sees no key has equal weights so far.
    out_BVRTD = jnp.where(visible.any(axis=-1, keepdims=True), out_BVRTD, 0)
    return out_BVRTD.transpose(0, 3, 1, 2, 4).reshape(q_BTHD.shape).astype(q_BTHD.dtype)


def _check_heads(op, heads, kv_heads):
    if heads % kv_heads:
        raise ValueError(f"{op}: the query heads ({heads}) must be a multiple of the key/value heads ({kv_heads})")


_IMPLEMENTATIONS = {"cudnn": _cudnn, "reference": attention_reference}
_IMPLEMENTATIONS_DECODE = {
    "mosaic": decode_attention_mosaic.decode_attention,
    "cudnn": _decode_cudnn,
    "reference": decode_attention_reference,
}


class Case(NamedTuple):
    """Shapes and features of one test or benchmark case of `attention`."""

    name: str
    batch: int
    time: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    packed: bool = False
    border: float = 0.2  # of packed cases: how likely a token begins a document


CASES = (
    Case("one_head", 1, 9, 9, 1, 1, 4),
    Case("grouped", 2, 17, 17, 6, 2, 8),
    Case("packed", 2, 33, 33, 4, 2, 8, packed=True),
    Case("last_queries", 2, 5, 21, 4, 2, 8),
    Case("more_queries_than_keys", 1, 7, 4, 2, 1, 4),
    Case("not_causal", 2, 6, 11, 4, 4, 8, causal=False),
)


def example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random (args, kwargs) of `attention` for a case; packed cases hold ids that come back."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)

    q = normal(case.batch, case.time, case.heads, case.head_dim)
    k = normal(case.batch, case.keys, case.kv_heads, case.head_dim)
    v = normal(case.batch, case.keys, case.kv_heads, case.head_dim)
    kwargs: dict[str, Any] = {"causal": case.causal}
    if case.packed:
        kwargs["segment_ids"] = jnp.asarray(_runs(case, seed) % 2, jnp.int32)
    return (q, k, v), kwargs


def _runs(case, seed):
    """[B, T] document numbers of a packed case."""
    return np.cumsum(np.random.default_rng(seed).random((case.batch, case.time)) < case.border, axis=1)


# Nano and Super have the same heads. Packed: documents of 1,024 tokens on average.
BENCHMARKS = (
    Case("nano", 2, 8192, 8192, 32, 2, 128),
    Case("nano_packed", 2, 8192, 8192, 32, 2, 128, packed=True, border=1 / 1024),
    Case("nano_64k", 1, 65536, 65536, 32, 2, 128),
    Case("ultra", 1, 8192, 8192, 64, 2, 128),
    Case("nano-4b", 2, 8192, 8192, 40, 8, 128),
)


def cost(case: Case) -> Cost:
    """Products of visible pairs only: two forward, five backward (the logits again), as FlashAttention counts."""
    position = np.arange(case.time) + case.keys - case.time
    first = np.zeros((case.batch, case.time), int)
    if case.packed:
        runs = _runs(case, 0)
        first = np.stack([np.searchsorted(row, row) for row in runs])
    last = position if case.causal else np.full(case.time, case.keys - 1)
    pairs = float(np.clip(last - first + 1, 0, case.keys).sum())
    product = 2 * pairs * case.heads * case.head_dim
    q_or_out = BF16 * case.batch * case.time * case.heads * case.head_dim
    k_or_v = BF16 * case.batch * case.keys * case.kv_heads * case.head_dim
    return Cost(2 * product, 2 * q_or_out + 2 * k_or_v, 5 * product, 4 * q_or_out + 4 * k_or_v)


class DecodeCase(NamedTuple):
    """Shapes and features of one test or benchmark case of `decode_attention`."""

    name: str
    batch: int
    time: int
    pages_of_row: int
    page_size: int
    heads: int
    kv_heads: int
    head_dim: int
    paged: bool


DECODE_CASES = (
    DecodeCase("contiguous", 3, 1, 1, 24, 4, 2, 8, paged=False),
    DecodeCase("draft_window", 2, 4, 1, 19, 4, 2, 8, paged=False),
    DecodeCase("paged", 3, 2, 4, 5, 4, 2, 8, paged=True),
)


def decode_example_inputs(
    case: DecodeCase, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Random (args, kwargs) of `decode_attention` for a case, lengths from as long as the cache allows down to 0."""
    random = np.random.default_rng(seed)
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)

    pages = case.batch * case.pages_of_row
    q = normal(case.batch, case.time, case.heads, case.head_dim)
    k_cache = normal(pages, case.page_size, case.kv_heads, case.head_dim)
    v_cache = normal(pages, case.page_size, case.kv_heads, case.head_dim)
    lengths = jnp.asarray(_lengths(case))
    kwargs: dict[str, Any] = {}
    if case.paged:
        kwargs["page_table"] = jnp.asarray(random.permutation(pages).reshape(case.batch, -1), jnp.int32)
    return (q, k_cache, v_cache, lengths), kwargs


def _lengths(case):
    return np.linspace(case.pages_of_row * case.page_size - case.time, 0, case.batch).astype(np.int32)


# Nano's heads: a full batch, one long sequence, and pages as a serving engine keeps them.
DECODE_BENCHMARKS = (
    DecodeCase("nano_32x8k", 32, 1, 1, 8192, 32, 2, 128, paged=False),
    DecodeCase("nano_1x128k", 1, 1, 1, 131072, 32, 2, 128, paged=False),
    DecodeCase("nano_32x8k_paged", 32, 1, 128, 64, 32, 2, 128, paged=True),
)


def decode_cost(case: DecodeCase) -> Cost:
    """Reads the filled part of the cache once; two products. Inference only: no backward pass."""
    filled = float((_lengths(case) + case.time).sum())
    product = 2 * filled * case.time * case.heads * case.head_dim
    new = 2 * case.batch * case.time * case.heads * case.head_dim
    return Cost(2 * product, BF16 * (new + 2 * filled * case.kv_heads * case.head_dim))
