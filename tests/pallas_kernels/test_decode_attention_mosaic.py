"""The split decode kernel, interpreted on the CPU with race detection, against the reference in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
from pallas_kernels.attention import decode_attention_reference
from pallas_kernels.decode_attention_mosaic import BLOCK, unfit
from pallas_kernels.decode_attention_mosaic import decode_attention as split_decode
from pallas_kernels.dispatch import compiling_for


def operands(time, heads, kv_heads, size, page_size, lengths):
    """A cache of `size` tokens a row whose unwritten positions hold NaN."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)

    batch = len(lengths)
    unwritten = np.arange(size) >= np.asarray(lengths)[:, None] + time
    table, shape = None, (batch, size)
    if page_size is not None:
        pages = batch * size // page_size
        table = random.permutation(pages).reshape(batch, -1)
        shape = (pages, page_size)
        unwritten_pages = np.empty(shape, bool)
        unwritten_pages[table] = unwritten.reshape(batch, -1, page_size)
        unwritten = unwritten_pages
        table = jnp.asarray(table, jnp.int32)
    k, v = (jnp.where(unwritten[..., None, None], jnp.nan, normal(*shape, kv_heads, 128)) for _ in range(2))
    return normal(batch, time, heads, 128), k, v, jnp.asarray(lengths, jnp.int32), table


@pytest.mark.parametrize(
    ("sizes", "splits"),
    [
        ((1, 32, 2, 296, None, (295, 5, 63)), 3),  # the last block is cut; five tokens take one span of three
        ((3, 10, 2, 256, 16, (0, 130, 253)), 2),  # drafted tokens; blocks of four pages; an empty cache
        ((1, 8, 1, 384, 128, (300,)), 2),  # blocks cut from pages
        ((5, 16, 1, 128, None, (60,)), 2),  # a longer draft: 80 rows, two tiles
    ],
)
def test_values(sizes, splits, interpret):
    q, k, v, lengths, table = operands(*sizes)
    got = split_decode(q, k, v, lengths, table, scale=0.09, splits=splits, interpret=interpret)
    assert got.dtype == jnp.bfloat16
    want = decode_attention_reference(*(z.astype(jnp.float32) for z in (q, k, v)), lengths, table, scale=0.09)
    for row, want_row in zip(got.astype(jnp.float32), want, strict=True):
        assert jnp.linalg.norm(row - want_row) < 5e-3 * jnp.linalg.norm(want_row)


def test_large_logits(interpret):
    """One key takes all: sums that were not rescaled when the largest logit rises would show."""
    q, k, v, lengths, table = operands(1, 4, 1, 4 * BLOCK, None, (4 * BLOCK - 1,))
    k = k.at[:, 3 * BLOCK + 5].set(8 * q[:, 0, :1])  # in the last block
    k = k.at[:, 7].set(4 * q[:, 0, :1])
    for splits in (1, 2):
        got = split_decode(q, k, v, lengths, table, scale=1.0, splits=splits, interpret=interpret)
        np.testing.assert_allclose(got[:, 0, 0].astype(jnp.float32), v[:, 3 * BLOCK + 5, 0], atol=1e-6)


def test_operands_that_do_not_fit():
    def reason(time=1, heads=32, kv_heads=2, size=64, head_dim=128, dtype=jnp.bfloat16, paged=False):
        q, cache = jnp.zeros((2, time, heads, head_dim), dtype), jnp.zeros((2, size, kv_heads, head_dim), jnp.bfloat16)
        return unfit(q, cache, cache, paged=paged)

    assert reason() == reason(16) == reason(size=24) == reason(paged=True) == reason(size=8, paged=True) == ""
    assert "at most 256 new tokens times query heads of a key/value head" in reason(17)
    assert "head_dim must be 128, got 64" in reason(head_dim=64)
    assert "must be bfloat16, got bfloat16, float32" in reason(dtype=jnp.float32)
    assert "page_size must be a multiple of 8, got 19" in reason(size=19)
    for size in (24, 96):
        assert f"page_size must be 8, 16, 32 or a multiple of 64, got {size}" in reason(size=size, paged=True)


@pytest.mark.parametrize(("time", "kernel"), [(1, True), (64, False)])
def test_hopper_gets_the_kernel_for_few_tokens(time, kernel):
    q, cache = jnp.zeros((2, time, 32, 128), jnp.bfloat16), jnp.zeros((2, 256, 2, 128), jnp.bfloat16)
    with compiling_for("sm_90a"):
        jaxpr = jax.make_jaxpr(partial(decode_attention))(q, cache, cache, jnp.zeros(2, jnp.int32))
    assert ("mpmd_map" in str(jaxpr)) == kernel
