"""Causal attention through cuDNN (Hopper), packed documents included.

Packed documents are given to cuDNN as offsets and lengths, never as a mask: it then skips what lies between
documents, and computes no gradient of a mask. The public `jax.nn.dot_product_attention` has no such argument, so the
primitives beneath it are bound here (jax 0.11.2, jax/_src/cudnn/fused_attention_stablehlo.py).

The number of documents of a call is static, that of the data is not. A call takes so many documents of each row; when
a row holds more, further calls take the rest, in a loop that otherwise runs zero times. So any number is exact.

More documents a call cost memory and time, even where the rows have fewer. The workspace of cuDNN's backward pass is 8
bytes for each element of q and each document ([2, 8192, 32, 128]: 129 GiB for 256 documents a row); on an H200, rows of
16 documents took 1.7 ms with 16 a call and 3.8 ms with 64. So the backward pass takes fewer than the forward pass.

cuDNN returns the log-sum-exp of each query as [documents, heads, T]: kept for the backward pass, that would be as
many times what it has to be. It is kept as [B, H, T] and spread out again.

Shapes: B batch, T time, H query heads, V key/value heads, D head dim, M documents of a row in one call.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo as cudnn

FORWARD_DOCUMENTS = 32
BACKWARD_BYTES = 2**32  # of workspace; exceeded where it holds no two documents a row, the fewest of a packed call

_NO_BIAS = (False, False)  # neither a bias nor its gradient


def unfit(
    q_BTHD: jax.Array,
    k_BSVD: jax.Array | jax.ShapeDtypeStruct,
    v_BSVD: jax.Array | jax.ShapeDtypeStruct,
    *,
    causal: bool,
    packed: bool,
    own_key_segments: bool,
) -> str:
    """Why cuDNN cannot take these operands, or "". own_key_segments: kv_segment_ids were given."""
    dtypes = {z.dtype for z in (q_BTHD, k_BSVD, v_BSVD)}
    if dtypes not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        return f"q, k and v must all be bfloat16 or all float16, got {', '.join(sorted(map(str, dtypes)))}"
    if not causal:
        return "attention must be causal"
    if own_key_segments:
        return "kv_segment_ids must be None"
    batch, time, heads, head_dim = q_BTHD.shape
    if time != k_BSVD.shape[1]:
        return f"there must be as many keys as queries, got {k_BSVD.shape[1]} and {time}"
    if head_dim > 256 or head_dim % 8:
        return f"head_dim must be a multiple of 8 and at most 256, got {head_dim}"
    if packed and batch * time * heads * head_dim >= 2**31:
        return "packed q must have less than 2^31 elements (cuDNN counts offsets in int32)"
    return ""


def attention(
    q_BTHD: jax.Array,
    k_BTVD: jax.Array,
    v_BTVD: jax.Array,
    run: jax.Array | None,
    *,
    scale: float,
    documents: tuple[int, int] | None = None,
) -> jax.Array:
    """Causal attention within documents: run [B, T] from `run_ids`, or None where each row is one.

    documents: how many of a row one call takes, forward and backward, at least 2; None to choose.
    """
    if run is None or q_BTHD.shape[1] == 1:
        return _whole_rows(scale, q_BTHD, k_BTVD, v_BTVD)
    return _packed(scale, documents_of_a_call(q_BTHD, documents), q_BTHD, k_BTVD, v_BTVD, run)


def documents_of_a_call(q_BTHD: jax.Array, documents: tuple[int, int] | None = None) -> tuple[int, int]:
    """How many documents of a row one call takes, forward and backward; `documents` if given."""
    forward, backward = documents or (FORWARD_DOCUMENTS, max(2, BACKWARD_BYTES // (8 * q_BTHD.size)))
    return min(forward, q_BTHD.shape[1]), min(backward, q_BTHD.shape[1])


def _bind(primitive, q_BTHD, operands, layout, scale, causal=True, **params):
    """operands: what follows the bias; layout: (query lengths, key lengths, query offsets, key offsets) or None.

    causal: only where there is a layout may it be False.
    """
    nothing = jnp.zeros(0, q_BTHD.dtype)
    of_documents = cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING
    mask = cudnn.MaskType.CAUSAL if layout is None else of_documents
    q, k, v, *after = operands
    return primitive.bind(
        *(q, k, v, nothing),
        *((nothing,) * 4 if layout is None else layout),
        *(nothing, nothing),  # page tables
        *after,
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=_NO_BIAS,
        mask_type=mask,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=None,
        **params,
    )


def _forward(scale, q, k, v, layout=None, causal=True):
    """-> out [B, T, H, D], log-sum-exp [B * documents, H, T] float32."""
    return _bind(cudnn._dot_product_attention_fwd_p_wrapper, q, (q, k, v), layout, scale, causal, is_training=True)


def _backward(scale, q, k, v, lse, out, dout, layout=None, causal=True):
    return _bind(cudnn._dot_product_attention_bwd_p_wrapper, q, (q, k, v, lse, out, dout), layout, scale, causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole_rows(scale, q, k, v):
    return _bind(cudnn._dot_product_attention_fwd_p_wrapper, q, (q, k, v), None, scale, is_training=False)[0]


def _whole_rows_forward(scale, q, k, v):
    out, lse = _forward(scale, q, k, v)
    return out, (q, k, v, lse, out)


def _whole_rows_backward(scale, residuals, dout):
    q, k, v, lse, out = residuals
    return tuple(_backward(scale, q, k, v, lse, out, dout))


_whole_rows.defvjp(_whole_rows_forward, _whole_rows_backward)


def documents_from(run: jax.Array, first: jax.Array | int, count: int) -> tuple[jax.Array, jax.Array]:
    """Where the documents first, first + 1, … of each row begin, and how long they are.

    Args:
      run: [B, T] from `run_ids`: 0, 1, … along the row.
      first: number of the first document wanted.
      count: M, how many.

    Returns:
      int32 (starts, lengths), each [B, M]; documents that a row does not have start at T and have length 0.
    """
    # run never decreases, so a document begins where the number of tokens in earlier ones says.
    borders = (run[:, None, :] < first + jnp.arange(count + 1)[:, None]).sum(-1, dtype=jnp.int32)
    return borders[:, :-1], borders[:, 1:] - borders[:, :-1]


def _layout(starts, lengths):
    """cuDNN's operands: lengths [B, M] and offsets [B, M+1].

    Negative entries are dropped and the ranks closed over all rows of a device; the one that each row of the offsets
    must have comes last, so document m of row b stays at index b * M + m.
    """
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return lengths, lengths, offsets, offsets


def _by_token(lse_XHT, run, first, starts):
    """Log-sum-exp by document [B * M, H, T] -> by token [B, H, T]; and which tokens are in these documents [B, T]."""
    batch, documents = starts.shape
    time = run.shape[1]
    here = (run >= first) & (run < first + documents)
    document = jnp.clip(run - first, 0, documents - 1)
    position = jnp.where(here, jnp.arange(time) - jnp.take_along_axis(starts, document, axis=1), 0)
    lse_BMTH = lse_XHT.reshape(batch, documents, -1, time).swapaxes(2, 3)
    lse_BTH = lse_BMTH[jnp.arange(batch)[:, None], document, position]
    return lse_BTH.swapaxes(1, 2), here


def _by_document(lse_BHT, starts):
    """The inverse, with anything after the end of a document."""
    batch, heads, time = lse_BHT.shape
    token_BMT = jnp.minimum(starts[..., None] + jnp.arange(time), time - 1)
    lse_BMHT = lse_BHT[jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[:, None], token_BMT[:, :, None, :]]
    return lse_BMHT.reshape(-1, heads, time)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _packed(scale, counts, q, k, v, run):
    return _packed_forward(scale, counts, q, k, v, run)[0]


def _over_documents(run, count, some):
    """Values of all tokens from `some(first)` = ([(values, their axes of rows and of tokens)], [B, T] which tokens)."""

    def more(state):
        first, values = state
        new, here = some(first)

        def merge(old, z, axes):
            return jnp.where(jnp.expand_dims(here, [a for a in range(z.ndim) if a not in axes]), z, old)

        return first + count, [merge(old, *z) for old, z in zip(values, new, strict=True)]

    first_values = [z for z, _ in some(0)[0]]
    most = run[:, -1].max() + 1
    return lax.while_loop(lambda state: state[0] < most, more, (jnp.int32(count), first_values))[1]


def _packed_forward(scale, counts, q, k, v, run):
    count = counts[0]

    def some(first):
        starts, lengths = documents_from(run, first, count)
        out, lse = _forward(scale, q, k, v, _layout(starts, lengths))
        lse, here = _by_token(lse, run, first, starts)
        return [(out, (0, 1)), (lse, (0, 2))], here

    out, lse = _over_documents(run, count, some)
    return out, (q, k, v, lse, out, run)


def _packed_backward(scale, counts, residuals, dout):
    count = counts[1]
    q, k, v, lse, out, run = residuals

    def some(first):
        starts, lengths = documents_from(run, first, count)
        grads = _backward(scale, q, k, v, _by_document(lse, starts), out, dout, _layout(starts, lengths))
        return [(grad, (0, 1)) for grad in grads], (run >= first) & (run < first + count)

    return *_over_documents(run, count, some), None


_packed.defvjp(_packed_forward, _packed_backward)
