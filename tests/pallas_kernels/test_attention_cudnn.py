"""What surrounds cuDNN: documents found from ids, offsets, calls for more documents than one takes, log-sum-exp moved.

cuDNN itself is played by numpy, as strictly as it behaves: tokens outside the documents of a call hold NaN.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, attention_backward_mosaic, attention_cudnn
from pallas_kernels.attention import attention_reference
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.segments import run_ids
from tests.pallas_kernels import attention_gradients


def documents(lengths, offsets, time):
    """(first token of all rows, length) by index, as jax hands them to cuDNN: negatives dropped, the ranks closed."""
    lengths = [int(n) for n in lengths.reshape(-1) if n >= 0]
    offsets = [int(n) + b * time for b, row in enumerate(offsets) for n in row if n >= 0]
    return list(zip(offsets[: len(lengths)], lengths, strict=True))


def forward(q, k, v, lengths, kv_lengths, offsets, kv_offsets, scale):
    (batch, time, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    out = np.full((batch * time, *q.shape[2:]), np.nan, np.float32)
    lse = np.full((lengths.size, heads, time), np.nan, np.float32)
    q, k, v = (z.reshape(batch * time, *z.shape[2:]) for z in (q, k, v))
    for i, (start, length) in enumerate(documents(lengths, offsets, time)):
        rows = slice(start, start + length)
        for h in range(heads if length else 0):
            logits = np.where(np.tri(length, dtype=bool), scale * q[rows, h] @ k[rows, h // group].T, -np.inf)
            lse[i, h, :length] = np.log(np.exp(logits).sum(1))
            out[rows, h] = np.exp(logits - lse[i, h, :length, None]) @ v[rows, h // group]
    return out.reshape(batch, time, heads, -1), lse


@pytest.fixture
def played(monkeypatch):
    """How often cuDNN was called."""
    calls = [0]

    def play(scale, q, k, v, layout):
        def counted(*args):
            calls[0] += 1
            return forward(*map(np.asarray, args), scale=scale)

        lse = jax.ShapeDtypeStruct((layout[0].size, q.shape[2], q.shape[1]), jnp.float32)
        return jax.pure_callback(counted, (jax.ShapeDtypeStruct(q.shape, q.dtype), lse), q, k, v, *layout)

    monkeypatch.setattr(attention_cudnn, "forward", play)
    monkeypatch.setattr(attention_backward_mosaic, "gradients", attention_gradients.gradients)
    return calls


IDS = {
    "ids_come_back_one_token_documents": [[0, 1, 0, 0, 1, 1, 1, 2, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]],
    "every_token_a_document": [list(range(10)), [1, 0] * 5],
    "one_document": [[3] * 10, [0] * 10],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("count", [2, 3, 64])
def test_values_and_gradients(played, ids, count):
    random = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(random.standard_normal((2, 10, h, 4)), jnp.float32) for h in (4, 2, 2, 4))
    run = run_ids(jnp.asarray(ids))

    def vjp(function):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    got = jax.jit(lambda: vjp(lambda *z: attention_cudnn.attention(*z, run, scale=0.3, documents=count)))()
    want = vjp(lambda *z: attention_reference(*z, run, run, causal=True, scale=0.3))
    for z, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(z, expected, atol=1e-5)
    assert played == [-(-(int(run.max()) + 1) // min(count, 10))]  # one call where the documents fit


def operands(dtype=jnp.bfloat16, time=16, keys=16, head_dim=128):
    return [jnp.zeros((1, n, h, head_dim), dtype) for n, h in ((time, 4), (keys, 2), (keys, 2))]


def test_operands_that_do_not_fit():
    unfit = partial(attention_cudnn.unfit, causal=True, packed=True, own_key_segments=False)
    assert unfit(*operands()) == unfit(*operands(jnp.float16)) == ""
    assert "must all be bfloat16 or all float16, got float32" in unfit(*operands(jnp.float32))
    assert "got bfloat16, float16" in unfit(*operands()[:2], operands(jnp.float16)[2])
    assert "as many keys as queries, got 17 and 16" in unfit(*operands(keys=17))
    assert "a multiple of 8 and at most 128, got 136" in unfit(*operands(head_dim=136))
    assert "a multiple of 8 and at most 128, got 20" in unfit(*operands(head_dim=20))
    assert unfit(*operands(), causal=False) == "attention must be causal"
    assert unfit(*operands(), own_key_segments=True) == "kv_segment_ids must be None"
    long = [jax.ShapeDtypeStruct((1, 2**19, h, 128), jnp.bfloat16) for h in (32, 2, 2)]
    assert "2^31" in unfit(*long)
    assert unfit(*long, packed=False) == ""


@pytest.mark.parametrize("packed", [False, True])
def test_hopper_gets_cudnn_and_never_a_mask(packed):
    ids = jnp.zeros((1, 16), jnp.int32) if packed else None

    def grads(q, k, v):
        with compiling_for("sm_90a"):
            return jax.grad(lambda *z: attention(*z, segment_ids=ids).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    jaxpr = str(jax.make_jaxpr(grads)(*operands()))
    assert "dot_product_attention_fwd" in jaxpr and "dot_product_attention_bwd" not in jaxpr
    assert jaxpr.count("mpmd_map[") == 2  # the kernels of the gradients
    assert "variadic_args=(False, False)" in jaxpr and "variadic_args=(True" not in jaxpr
    with compiling_for("sm_90a"):
        assert "dot_product" not in str(jax.make_jaxpr(partial(attention, causal=False))(*operands()))
