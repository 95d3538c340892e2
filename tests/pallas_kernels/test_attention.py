"""Attention against a loop over queries, query blocks against all at once, and decoding against the full pass."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, decode_attention
from pallas_kernels.attention import (
    CASES,
    DECODE_CASES,
    PLAIN_PAIRS,
    QUERY_BLOCK,
    DecodeCase,
    attention_reference,
    decode_example_inputs,
    example_inputs,
)
from pallas_kernels.dispatch import compiling_for


def loop(q, k, v, causal=True, segment_ids=None, kv_segment_ids=None, scale=None):
    q, k, v = (np.asarray(z, np.float64) for z in (q, k, v))
    (batch, time, heads, head_dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros_like(q)
    for b in range(batch):
        for i in range(time):
            last = i + keys - time if causal else keys - 1
            visible = [j for j in range(keys) if j <= last]
            if segment_ids is not None and kv_segment_ids is not None:
                visible = [j for j in visible if segment_ids[b, i] == kv_segment_ids[b, j]]
            elif segment_ids is not None:  # the whole way between the two tokens has one id
                visible = [j for j in visible if len(set(np.asarray(segment_ids)[b, min(i, j) : max(i, j) + 1])) == 1]
            for h in range(heads if visible else 0):
                group = h // (heads // kv_heads)
                logits = scale * k[b, visible, group] @ q[b, i, h]
                p = np.exp(logits - logits.max())
                out[b, i, h] = p / p.sum() @ v[b, visible, group]
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_a_loop(case):
    args, kwargs = example_inputs(case)
    np.testing.assert_allclose(jax.jit(lambda *a: attention(*a, **kwargs))(*args), loop(*args, **kwargs), atol=1e-5)


def test_scale_and_key_segments():
    case = next(case for case in CASES if case.name == "not_causal")
    args, _ = example_inputs(case)
    kwargs = {
        "segment_ids": jnp.array([[0, 1, 0, 2, 2, 5]] * 2),
        "kv_segment_ids": jnp.array([[0, 0, 1, 1, 0, 2, 2, 2, 0, 1, 1]] * 2),
        "scale": 0.7,
    }
    for causal in (False, True):
        got = jax.jit(partial(attention, causal=causal, **kwargs))(*args)
        np.testing.assert_allclose(got, loop(*args, causal=causal, **kwargs), atol=1e-5)
    assert not got[:, 5].any()  # id 5 sees no key: zeros, not NaN
    grads = jax.jit(jax.grad(lambda args: attention(*args, **kwargs).sum()))(args)
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_by_finite_differences(case):
    with jax.enable_x64(True):
        args, kwargs = example_inputs(case, 0, jnp.float64)

        def loss(args):
            return jnp.sin(attention(*args, **kwargs)).sum()

        loss_and_grads = jax.jit(jax.value_and_grad(loss))
        _, grads = loss_and_grads(args)
        random = np.random.default_rng(1)
        for i, name in enumerate("qkv"):
            direction = random.standard_normal(args[i].shape)
            shifted = ((*args[:i], args[i] + h * direction, *args[i + 1 :]) for h in (1e-5, -1e-5))
            up, down = (loss_and_grads(z)[0] for z in shifted)
            want = (up - down) / 2e-5
            np.testing.assert_allclose((grads[i] * direction).sum(), want, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("name", ["packed", "last_queries", "more_queries_than_keys"])
def test_query_blocks_change_nothing(name):
    case = next(case for case in CASES if case.name == name)
    (q, k, v), kwargs = example_inputs(case)
    ids = kwargs.get("segment_ids")

    def run(args, block):
        return attention_reference(*args, ids, ids, causal=case.causal, scale=0.3, query_block=block)

    def out_and_grads(block):
        def loss(args):
            out = run(args, block)
            return jnp.sin(3 * out).sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))((q, k, v))
        return out, *grads

    for got, want in zip(out_and_grads(4), out_and_grads(case.time), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_long_rows_never_hold_all_probabilities():
    time = int(PLAIN_PAIRS**0.5) * 2
    q = jax.ShapeDtypeStruct((1, time, 4, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, time, 1, 8), jnp.float32)
    grad = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v).sum(), argnums=(0, 1, 2)))
    memory = grad.lower(q, k, k).compile().memory_analysis().temp_size_in_bytes
    assert memory < 4 * (4 * QUERY_BLOCK * time * 4) < 4 * time * time * 4


def test_bfloat16_is_computed_in_float32():
    case = next(case for case in CASES if case.name == "grouped")
    args, _ = example_inputs(case, 0, jnp.bfloat16)
    out = jax.jit(attention)(*args)
    assert out.dtype == jnp.bfloat16
    want = loop(*(z.astype(jnp.float32) for z in args))
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=2**-8, atol=1e-5)  # rounded once, at the end


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_decoding_is_attention_over_what_the_cache_holds(case):
    (q, k_cache, v_cache, lengths), kwargs = decode_example_inputs(case)
    got = jax.jit(lambda *args: decode_attention(*args, **kwargs))(q, k_cache, v_cache, lengths)
    table = kwargs.get("page_table", np.arange(case.batch)[:, None])
    for b in range(case.batch):
        keys = int(lengths[b]) + case.time
        k, v = (cache[table[b]].reshape(1, -1, *cache.shape[2:])[:, :keys] for cache in (k_cache, v_cache))
        np.testing.assert_allclose(got[b : b + 1], loop(q[b : b + 1], k, v), atol=1e-5)


def test_paged_is_contiguous():
    case = next(case for case in DECODE_CASES if case.paged)
    (q, k_cache, v_cache, lengths), kwargs = decode_example_inputs(case)
    paged = decode_attention(q, k_cache, v_cache, lengths, **kwargs, scale=0.2)
    rows = [c[kwargs["page_table"]].reshape(case.batch, -1, *c.shape[2:]) for c in (k_cache, v_cache)]
    np.testing.assert_array_equal(decode_attention(q, *rows, lengths, scale=0.2), paged)


def test_unwritten_cache_may_hold_anything():
    case = DECODE_CASES[0]
    (q, k_cache, v_cache, lengths), _ = decode_example_inputs(case)
    unwritten = (jnp.arange(case.page_size) >= lengths[:, None] + case.time)[..., None, None]
    dirty = (jnp.where(unwritten, jnp.nan, cache) for cache in (k_cache, v_cache))
    np.testing.assert_array_equal(decode_attention(q, *dirty, lengths), decode_attention(q, k_cache, v_cache, lengths))


@pytest.mark.parametrize("paged", [False, True])
def test_prompts_in_blocks_and_by_attention_over_themselves(paged, monkeypatch):
    """Long calls: the reference takes queries in blocks; a prompt into an empty cache attends to itself (cuDNN)."""
    case = DecodeCase("prompt", 2, 11, 4 if paged else 1, 5 if paged else 20, 4, 2, 8, paged)
    (q, k_cache, v_cache, _), kwargs = decode_example_inputs(case)
    module = importlib.import_module("pallas_kernels.attention")

    def own(q, k, v, run, *, scale):
        assert run is None and k.shape == v.shape == (2, 11, 2, 8)
        return attention_reference(q, k, v, None, None, causal=True, scale=scale)

    monkeypatch.setattr(module.attention_cudnn, "attention", own)
    table = kwargs.get("page_table")
    for lengths in (jnp.zeros(2, jnp.int32), jnp.array([0, 7])):
        want = decode_attention(q, k_cache, v_cache, lengths, page_table=table, scale=0.3)
        prompt = module._decode_cudnn(q, k_cache, v_cache, lengths, table, scale=0.3)
        np.testing.assert_allclose(prompt, want, atol=1e-6)
        monkeypatch.setattr(module, "PLAIN_PAIRS", 0)
        monkeypatch.setattr(module, "QUERY_BLOCK", 4)
        blocks = decode_attention(q, k_cache, v_cache, lengths, page_table=table, scale=0.3)
        np.testing.assert_allclose(blocks, want, atol=1e-6)


def test_hopper_gives_prompts_to_cudnn():
    q, cache = jnp.zeros((2, 64, 32, 128), jnp.bfloat16), jnp.zeros((2, 256, 2, 128), jnp.bfloat16)

    def primitives(q, cache):
        with compiling_for("sm_90a"):
            return str(jax.make_jaxpr(decode_attention)(q, cache, cache, jnp.zeros(2, jnp.int32)))

    assert "dot_product_attention_fwd" in primitives(q, cache)
    assert "dot_product_attention" not in primitives(q, cache[:, :63])  # longer than the cache
    assert "dot_product_attention" not in primitives(q[:, :1], cache)


def test_wrong_arguments():
    q, k = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 7, 2, 8))
    with pytest.raises(ValueError, match=r"attention: k must have shape \[B, S, V, D\] = \[2, any, any, 8\]"):
        attention(q, k[..., :4], k[..., :4])
    with pytest.raises(ValueError, match=r"query heads \(4\) must be a multiple of the key/value heads \(3\)"):
        attention(q, jnp.ones((2, 7, 3, 8)), jnp.ones((2, 7, 3, 8)))
    with pytest.raises(ValueError, match="got 5 queries and 7 keys; pass kv_segment_ids too"):
        attention(q, k, k, segment_ids=jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="kv_segment_ids came without segment_ids"):
        attention(q, k, k, kv_segment_ids=jnp.ones((2, 7)))
    with pytest.raises(ValueError, match=r"k_cache must have shape .* = \[2, any, any, 8\], got \[3, 7, 2, 8\]"):
        decode_attention(q, jnp.ones((3, 7, 2, 8)), jnp.ones((3, 7, 2, 8)), jnp.zeros(2, jnp.int32))
