"""Parts of a sequence on 8 devices: each function equals that of the whole sequence, and so do its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.parallel import context
from nemotron_jax.parallel.local import per_device
from pallas_kernels import attention, attention_backward_mosaic, attention_cudnn, causal_conv1d, ssd
from tests.pallas_kernels import attention_gradients

T = 32  # four tokens a device
# A document over several devices, one that begins at a device's border, single tokens, an id that comes back, and one
# that comes back exactly where it left off on the device before but for one token between.
PACKED = np.array([[1] * 14 + [2] * 2 + [3] * 8 + [1, 4, 1, 1] + [5] * 3 + [6], [7] * 3 + [8] + [7] * 28], np.int32)
IDS = [None, jnp.asarray(PACKED)]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def compare(mesh, whole, parts, operands, axes, result, ids):
    """Values and gradients of sum(f * noise) for two functions of (operands, ids)."""

    def loss(f):
        def of(*operands):
            y = f(*operands, ids)
            return (y * normal(99, *y.shape)).sum(), y

        return jax.jit(jax.value_and_grad(of, argnums=tuple(range(len(operands))), has_aux=True))

    (_, expected), expected_grads = loss(whole)(*operands)
    with jax.set_mesh(mesh):
        (_, y), grads = loss(per_device(parts, (*axes, ("batch", "time")), result))(*operands)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)  # strong decays cancel in the gradient of A


@pytest.mark.parametrize("ids", IDS, ids=["one_document", "packed"])
def test_convolution(ids, eight):
    def parts(x, w, ids):
        before = context.conv_inputs_before([x[..., :3], x[..., 3:]], ids, 4)
        return causal_conv1d(x, w, initial_state=jnp.concatenate(before, -1), segment_ids=ids)

    axes = [("batch", "time", None), (None, None)]
    operands = (normal(0, 2, T, 5), normal(1, 5, 4))
    compare(
        eight(context=8),
        lambda x, w, ids: causal_conv1d(x, w, segment_ids=ids),
        parts,
        operands,
        axes,
        axes[0],
        ids,
    )


@pytest.mark.parametrize("ids", IDS, ids=["one_document", "packed"])
@pytest.mark.parametrize("decay", [0.05, 8.0])
def test_ssd(ids, decay, eight):
    def parts(x, dt, A, B, C, ids):
        state = context.state_before(x, dt, A, B, ids)
        return ssd(x, dt, A, B, C, initial_state=state, segment_ids=ids, chunk_size=2)

    x, dt = normal(0, 2, T, 4, 3), jax.nn.softplus(normal(1, 2, T, 4))
    operands = (x, dt, -decay * jnp.exp(normal(2, 4)), normal(3, 2, T, 2, 5), normal(4, 2, T, 2, 5))
    over_time = ("batch", "time", None, None)
    axes = [over_time, over_time[:3], (None,), over_time, over_time]
    compare(
        eight(context=8),
        lambda x, dt, A, B, C, ids: ssd(x, dt, A, B, C, segment_ids=ids, chunk_size=8),
        parts,
        operands,
        axes,
        over_time,
        ids,
    )


def compare_attention(mesh, ids):
    axes = ("batch", "time", None, None)
    compare(
        mesh,
        lambda q, k, v, ids: attention(q, k, v, segment_ids=ids),
        context.attention_over_parts,
        (normal(0, 2, T, 4, 8), normal(1, 2, T, 2, 8), normal(2, 2, T, 2, 8)),
        [axes] * 3,
        axes,
        ids,
    )


@pytest.mark.parametrize("ids", IDS, ids=["one_document", "packed"])
def test_attention(ids, eight):
    compare_attention(eight(context=8), ids)


def play_cudnn(monkeypatch):
    """cuDNN in jnp, of one document a row or whole rows, as strictly as it behaves: what it skips is NaN."""

    def softmax(q, k, v, z):
        lse = jax.nn.logsumexp(z, axis=3)
        p = jnp.exp(z - lse[..., None])
        return jnp.einsum("bhts,bshd->bthd", p, jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)), lse

    def logits(scale, q, k):
        return scale * jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2))

    def forward(scale, q, k, v, layout=None, causal=True):
        rows, columns = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
        if layout is None:
            return softmax(q, k, v, jnp.where(rows >= columns, logits(scale, q, k), -jnp.inf))
        assert not causal and layout[0].shape[1] == 1
        q_length, k_length, q_start, k_start = (a[:, :1, None] for a in layout)
        here = (columns >= k_start) & (columns < k_start + k_length) & (rows >= q_start) & (rows < q_start + q_length)
        out, lse = softmax(q, k, v, jnp.where(here[:, None], logits(scale, q, k), -jnp.inf))
        return out, jnp.where(here.any(2)[:, None], lse, jnp.nan)

    def packed_forward(scale, count, q, k, v, run):
        visible = jnp.tri(q.shape[1], dtype=bool) & (run[:, :, None] == run[:, None, :])
        return softmax(q, k, v, jnp.where(visible[:, None], logits(scale, q, k), -jnp.inf))

    monkeypatch.setattr(attention_cudnn, "forward", forward)
    # A part's own documents: cuDNN's calls for them are tested in tests/pallas_kernels/test_attention_cudnn.py.
    monkeypatch.setattr(attention_cudnn, "packed_forward", packed_forward)
    monkeypatch.setattr(attention_backward_mosaic, "gradients", attention_gradients.gradients)
    monkeypatch.setattr(context, "choose", lambda *_, **__: "cudnn")


@pytest.mark.parametrize("ids", IDS, ids=["one_document", "packed"])
def test_attention_by_cudnn(ids, eight, monkeypatch):
    play_cudnn(monkeypatch)
    compare_attention(eight(context=8), ids)


def test_rows_that_cannot_be_cut(eight):
    assert not context.in_parts(5)
    with jax.set_mesh(eight(context=8)):
        assert context.in_parts(16)
        with pytest.raises(ValueError, match="5 tokens of a row do not divide over 8 devices"):
            context.in_parts(5)


def test_parts_shorter_than_the_convolution(eight):
    def parts(x):
        return context.conv_inputs_before([x], None, 4)[0]

    with jax.set_mesh(eight(context=8)), pytest.raises(ValueError, match="at least 3 tokens, got 2"):
        jax.jit(per_device(parts, [("batch", "time", None)], ("batch", "time", None)))(jnp.zeros((1, 16, 2)))
