"""What surrounds cuDNN: documents found from ids, offsets, calls for more documents than one takes, log-sum-exp moved.

cuDNN itself is played by numpy, as strictly as it behaves: tokens outside the documents of a call hold NaN.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, attention_cudnn
from pallas_kernels.attention import attention_reference
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.segments import run_ids


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


def backward(q, k, v, lse, out, dout, lengths, kv_lengths, offsets, kv_offsets, scale):
    shapes = [z.shape for z in (q, k, v)]
    time, group = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v, out, dout = (z.reshape(-1, *z.shape[2:]) for z in (q, k, v, out, dout))
    dq, dk, dv = (np.full(z.shape, np.nan, np.float32) for z in (q, k, v))
    for i, (start, length) in enumerate(documents(lengths, offsets, time)):
        rows = slice(start, start + length)
        dk[rows] = dv[rows] = 0
        for h in range(q.shape[1] if length else 0):
            p = np.exp(scale * q[rows, h] @ k[rows, h // group].T - lse[i, h, :length, None])
            p = np.where(np.tri(length, dtype=bool), p, 0)
            dp = dout[rows, h] @ v[rows, h // group].T - (dout[rows, h] * out[rows, h]).sum(1, keepdims=True)
            dq[rows, h] = scale * (p * dp) @ k[rows, h // group]
            dk[rows, h // group] += scale * (p * dp).T @ q[rows, h]
            dv[rows, h // group] += p.T @ dout[rows, h]
    return tuple(z.reshape(shape) for z, shape in zip((dq, dk, dv), shapes, strict=True))


@pytest.fixture
def played(monkeypatch):
    """How often cuDNN was called, forward and backward."""
    calls = {"forward": 0, "backward": 0}

    def call(name, function, results, scale, *operands):
        def counted(*args):
            calls[name] += 1
            return function(*map(np.asarray, args), scale=scale)

        return jax.pure_callback(counted, results, *operands)

    def play_forward(scale, q, k, v, layout):
        lse = jax.ShapeDtypeStruct((layout[0].size, q.shape[2], q.shape[1]), jnp.float32)
        return call("forward", forward, (jax.ShapeDtypeStruct(q.shape, q.dtype), lse), scale, q, k, v, *layout)

    def play_backward(scale, q, k, v, lse, out, dout, layout):
        results = tuple(jax.ShapeDtypeStruct(z.shape, z.dtype) for z in (q, k, v))
        return call("backward", backward, results, scale, q, k, v, lse, out, dout, *layout)

    monkeypatch.setattr(attention_cudnn, "_forward", play_forward)
    monkeypatch.setattr(attention_cudnn, "_backward", play_backward)
    return calls


IDS = {
    "ids_come_back_one_token_documents": [[0, 1, 0, 0, 1, 1, 1, 2, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]],
    "every_token_a_document": [list(range(10)), [1, 0] * 5],
    "one_document": [[3] * 10, [0] * 10],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("counts", [(3, 2), (64, 3), (2, 64)])
def test_values_and_gradients(played, ids, counts):
    random = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(random.standard_normal((2, 10, h, 4)), jnp.float32) for h in (4, 2, 2, 4))
    run = run_ids(jnp.asarray(ids))

    def vjp(function):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    got = jax.jit(lambda: vjp(lambda *z: attention_cudnn.attention(*z, run, scale=0.3, documents=counts)))()
    want = vjp(lambda *z: attention_reference(*z, run, run, causal=True, scale=0.3))
    for z, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(z, expected, atol=1e-5)
    forward, backward = (-(-(int(run.max()) + 1) // min(count, 10)) for count in counts)
    assert played == {"forward": forward, "backward": backward}  # one call where the documents fit


def test_the_backward_pass_takes_as_many_documents_as_its_memory_holds(monkeypatch):
    taken = []
    monkeypatch.setattr(attention_cudnn, "_packed", lambda scale, counts, q, k, v, run: taken.append(counts))
    for batch, time in ((2, 8192), (1, 2048), (8, 32768), (1, 7)):
        q = jax.ShapeDtypeStruct((batch, time, 32, 128), jnp.bfloat16)
        attention_cudnn.attention(q, q, q, jnp.zeros((batch, time), jnp.int32), scale=1.0)
    assert taken == [(32, 8), (32, 64), (32, 2), (7, 7)]


def operands(dtype=jnp.bfloat16, time=16, keys=16, head_dim=128):
    return [jnp.zeros((1, n, h, head_dim), dtype) for n, h in ((time, 4), (keys, 2), (keys, 2))]


def test_operands_that_do_not_fit():
    unfit = partial(attention_cudnn.unfit, causal=True, packed=True, own_key_segments=False)
    assert unfit(*operands()) == unfit(*operands(jnp.float16)) == ""
    assert "must all be bfloat16 or all float16, got float32" in unfit(*operands(jnp.float32))
    assert "got bfloat16, float16" in unfit(*operands()[:2], operands(jnp.float16)[2])
    assert "as many keys as queries, got 17 and 16" in unfit(*operands(keys=17))
    assert "a multiple of 8 and at most 256, got 260" in unfit(*operands(head_dim=260))
    assert "a multiple of 8 and at most 256, got 20" in unfit(*operands(head_dim=20))
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
    assert "dot_product_attention_fwd" in jaxpr and "dot_product_attention_bwd" in jaxpr
    assert "variadic_args=(False, False)" in jaxpr and "variadic_args=(True" not in jaxpr
    with compiling_for("sm_90a"):
        assert "dot_product" not in str(jax.make_jaxpr(partial(attention, causal=False))(*operands()))
