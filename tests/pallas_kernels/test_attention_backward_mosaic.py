"""The kernels of attention's gradients, interpreted on the CPU with race detection, against plain jnp in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention_backward_mosaic as mosaic
from pallas_kernels.attention import attention_reference
from pallas_kernels.attention_cudnn import keys_of_a_document
from pallas_kernels.segments import run_ids
from tests.pallas_kernels import attention_gradients


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def log_sum_exp(q, k, first, last, scale):
    logits = scale * jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2))
    seen = attention_gradients.seen_keys(first, last, k.shape[1])[:, None]
    return jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), axis=3)


def compare(got, want, dtype=jnp.bfloat16):
    for name, z, expected in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert z.dtype == dtype and z.shape == expected.shape
        error = jnp.linalg.norm(z.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert error < 4e-3, (name, error)


@pytest.mark.parametrize(
    ("sizes", "border"),
    [
        ((1, 200, 2, 1, 64), 0),  # one document; the last block of either kind is cut
        ((2, 200, 2, 1, 64), 0.02),  # documents that end anywhere
        ((1, 130, 1, 1, 128), 0.3),  # most of them shorter than a block
        ((1, 72, 2, 2, 40), 0),  # a head dim that is no width of the kernel
    ],
)
def test_documents(sizes, border, interpret):
    """Against the derivative of the reference."""
    batch, time, heads, kv_heads, head_dim = sizes
    q, k, v, dout = (normal(i, batch, time, h, head_dim) for i, h in enumerate((heads, kv_heads, kv_heads, heads)))
    run = run_ids(jnp.asarray(np.random.default_rng(5).random((batch, time)) < border).cumsum(1))
    q32, k32, v32 = (z.astype(jnp.float32) for z in (q, k, v))

    @jax.jit
    def truth():
        out, pull = jax.vjp(lambda *z: attention_reference(*z, run, run, causal=True, scale=0.2), q32, k32, v32)
        return out.astype(jnp.bfloat16), pull(dout.astype(jnp.float32))

    out, want = truth()
    seen = keys_of_a_document(run, run.shape)
    lse = log_sum_exp(q32, k32, *seen, 0.2)
    compare(mosaic.gradients(q, k, v, out, dout, lse, *seen, scale=0.2, interpret=interpret), want)


def test_keys_of_another_part(interpret, monkeypatch):
    """Queries of a part of a row and earlier keys: no causal order, some queries see none, heads summed in parts."""
    monkeypatch.setattr(mosaic, "BLOCKS", 4)  # three blocks of keys: two parts
    q, k, v, dout = (normal(i, 1, n, h, 64) for i, (n, h) in enumerate([(150, 4), (300, 1), (300, 1), (150, 4)]))
    q32, k32, v32, dout32 = (z.astype(jnp.float32) for z in (q, k, v, dout))
    reached = jnp.arange(150) < 100
    first, last = (jnp.where(reached, n, m)[None].astype(jnp.int32) for n, m in ((130, 5), (290, 2)))
    lse = log_sum_exp(q32, k32, first, last, 0.1)
    lse = jnp.where(reached, lse, jnp.nan)  # never read
    out = normal(7, 1, 150, 4, 64)
    want = attention_gradients.gradients(q32, k32, v32, out.astype(jnp.float32), dout32, lse, first, last, scale=0.1)
    want = [jnp.nan_to_num(z) for z in want]
    got = mosaic.gradients(q, k, v, out, dout, lse, first, last, scale=0.1, interpret=interpret)
    compare(got, want)
    assert mosaic._parts(3, 4) == 2
    dq, dk, dv = got
    assert not dq[0, 100:].any()
    for z in (dk, dv):
        assert not z[0, :130].any() and not z[0, 290:].any() and z[0, 130:290].any()


def test_float16(interpret):
    """Of 65 tokens, which TMA does not take, and a head dim between the kernel's widths."""
    q, k, v, dout, out = (normal(i, 1, 65, h, 72).astype(jnp.float16) for i, h in enumerate((2, 1, 1, 2, 2)))
    seen = keys_of_a_document(None, (1, 65))
    wide = [z.astype(jnp.float32) for z in (q, k, v, out, dout)]
    lse = log_sum_exp(wide[0], wide[1], *seen, 0.1)
    got = mosaic.gradients(q, k, v, out, dout, lse, *seen, scale=0.1, interpret=interpret)
    compare(got, attention_gradients.gradients(*wide, lse, *seen, scale=0.1), jnp.float16)


@pytest.mark.parametrize("shape", [(0, 8), (1, 0)])
def test_of_nothing_there_is_nothing(shape):
    q, k = jnp.zeros((*shape, 2, 64), jnp.bfloat16), jnp.zeros((*shape, 1, 64), jnp.bfloat16)
    seen = keys_of_a_document(None, shape)
    made = mosaic.gradients(q, k, k, q, q, jnp.zeros((shape[0], 2, shape[1])), *seen, scale=1.0)
    assert [z.shape for z in made] == [q.shape, k.shape, k.shape]


def test_parts_of_the_heads():
    """As few as give every multiprocessor blocks enough, and always a divisor."""
    assert [mosaic._parts(blocks, 16) for blocks in (600, 528, 256, 100, 1)] == [1, 1, 4, 8, 16]
    assert mosaic._parts(200, 6) == 3


def test_no_block_is_walked_over_in_vain():
    first, last = keys_of_a_document(jnp.repeat(jnp.arange(4), 128)[None], (1, 512))
    of_each = [[0, 2], [2, 4], [4, 6], [6, 8]]
    np.testing.assert_array_equal(mosaic._walk_over_keys(first, last - first)[0], of_each)
    np.testing.assert_array_equal(mosaic._walk_over_queries(first, last - first, 5)[0, :4], of_each)
    start, end = mosaic._walk_over_queries(first, last - first, 5)[0, 4]  # keys that no query sees
    assert start == end
