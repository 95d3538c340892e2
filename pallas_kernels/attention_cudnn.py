"""Causal attention for Hopper, packed documents included: forward through cuDNN, gradients by our own kernels.

Packed documents are given to cuDNN as offsets and lengths, never as a mask: it then skips what lies between
documents. The public `jax.nn.dot_product_attention` has no such argument, so the primitive beneath it is bound here
(jax 0.11.2, jax/_src/cudnn/fused_attention_stablehlo.py).

The number of documents of a call is static, that of the data is not. A call takes so many documents of each row; when
a row holds more, further calls take the rest, in a loop that otherwise runs zero times. So any number is exact. More
documents a call cost time, even where the rows have fewer.

cuDNN returns the log-sum-exp of each query as [documents, heads, T]: kept for the backward pass, that would be as
many times what it has to be. It is kept as [B, H, T].

cuDNN's own backward pass adds dq up in any order (its other way, XLA's choice under a flag for the whole program, has
a workspace of all documents times all of q), so the backward pass is attention_backward_mosaic.py.

Shapes: B batch, T time, H query heads, V key/value heads, D head dim, M documents of a row in one call.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from pallas_kernels import attention_backward_mosaic

DOCUMENTS = 32  # of a row in one call


def unfit(
    q_BTHD: jax.Array,
    k_BSVD: jax.Array | jax.ShapeDtypeStruct,
    v_BSVD: jax.Array | jax.ShapeDtypeStruct,
    *,
    causal: bool,
    packed: bool,
    own_key_segments: bool,
) -> str:
    """Why cuDNN or the kernels of the gradients cannot take these operands, or "".

    own_key_segments: kv_segment_ids were given.
    """
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
    if head_dim > attention_backward_mosaic.MOST_HEAD_DIM or head_dim % 8:
        return f"head_dim must be a multiple of 8 and at most {attention_backward_mosaic.MOST_HEAD_DIM}, got {head_dim}"
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
    documents: int = DOCUMENTS,
) -> jax.Array:
    """Causal attention within documents: run [B, T] from `run_ids`, or None where each row is one.

    documents: how many of a row one call of cuDNN takes, at least 2.
    """
    if run is None or q_BTHD.shape[1] == 1:
        return _whole_rows(scale, q_BTHD, k_BTVD, v_BTVD)
    return _packed(scale, min(documents, q_BTHD.shape[1]), q_BTHD, k_BTVD, v_BTVD, run)


def forward(
    scale: float,
    q_BTHD: jax.Array,
    k_BSVD: jax.Array,
    v_BSVD: jax.Array,
    layout: tuple[jax.Array, ...] | None = None,
    causal: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Out [B, T, H, D] and log-sum-exp [B * documents, H, T] float32.

    layout: (query lengths, key lengths, query offsets, key offsets) or None; only where there is one may causal be
    False.
    """
    out, lse = _call(scale, q_BTHD, k_BSVD, v_BSVD, layout, causal, for_gradients=True)
    return out, lse


def _call(scale, q_BTHD, k_BSVD, v_BSVD, layout, causal, for_gradients):
    nothing = jnp.zeros(0, q_BTHD.dtype)
    of_documents = cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING
    return cudnn._dot_product_attention_fwd_p_wrapper.bind(
        *(q_BTHD, k_BSVD, v_BSVD, nothing),
        *((nothing,) * 4 if layout is None else layout),
        *(nothing, nothing),  # page tables
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),  # neither a bias nor its gradient
        mask_type=cudnn.MaskType.CAUSAL if layout is None else of_documents,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=None,
        is_training=for_gradients,
    )


def keys_of_a_document(run: jax.Array | None, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """First of the keys that each query sees, and the last one plus 1, int32 of shape [B, T]; run as in `attention`."""
    token = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if run is None:
        return jnp.zeros_like(token), token + 1
    begins = run[:, 1:] != run[:, :-1]
    return lax.cummax(jnp.where(jnp.pad(begins, ((0, 0), (1, 0))), token, 0), axis=1), token + 1


def gradients(
    scale: float, residuals: Sequence[jax.Array], dout_BTHD: jax.Array, run: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Residuals q, k, v, out, lse [B, H, T] -> dq, dk, dv."""
    q_BTHD, k_BTVD, v_BTVD, out_BTHD, lse_BHT = residuals
    seen = keys_of_a_document(run, q_BTHD.shape[:2])
    return attention_backward_mosaic.gradients(q_BTHD, k_BTVD, v_BTVD, out_BTHD, dout_BTHD, lse_BHT, *seen, scale=scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole_rows(scale, q, k, v):
    return _call(scale, q, k, v, None, True, for_gradients=False)[0]


def _whole_rows_forward(scale, q, k, v):
    out, lse = forward(scale, q, k, v)
    return out, (q, k, v, out, lse)


def _whole_rows_backward(scale, residuals, dout):
    return gradients(scale, residuals, dout, None)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _packed(scale, count, q, k, v, run):
    return packed_forward(scale, count, q, k, v, run)[0]


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


def packed_forward(
    scale: float, count: int, q_BTHD: jax.Array, k_BTVD: jax.Array, v_BTVD: jax.Array, run: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Out [B, T, H, D] and log-sum-exp [B, H, T], `count` documents of a row in one call."""

    def some(first):
        starts, lengths = documents_from(run, first, count)
        out, lse = forward(scale, q_BTHD, k_BTVD, v_BTVD, _layout(starts, lengths))
        lse, here = _by_token(lse, run, first, starts)
        return [(out, (0, 1)), (lse, (0, 2))], here

    out, lse = _over_documents(run, count, some)
    return out, lse


def _packed_forward(scale, count, q, k, v, run):
    out, lse = packed_forward(scale, count, q, k, v, run)
    return out, (q, k, v, out, lse, run)


def _packed_backward(scale, count, residuals, dout):
    *residuals, run = residuals
    return *gradients(scale, residuals, dout, run), None


_packed.defvjp(_packed_forward, _packed_backward)
