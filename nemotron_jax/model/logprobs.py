"""Log-probabilities of given tokens, without the [B, T, V] logits.

Tokens go through the head in chunks of time; each chunk's float32 logits are made, reduced and dropped, and made
again in the backward pass. The gradient of the head's weight is summed over the chunks in float32, whatever the
dtype of the operands: in bfloat16 the small contributions of multi-token prediction were lost, which made
Ultra's pre-training diverge (Nemotron 3 Ultra report, 2.7).

Shapes: B batch, T time, D model width, V vocabulary, C tokens of a chunk, Z chunks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from nemotron_jax.precision.matmul import gemm_precision

# Float32 logits held at a time: 2^27 (512 MiB) keeps 1024 rows of a 131,072-token vocabulary, enough for full speed.
MAX_LOGITS = 2**27


def head_logits(hidden: Array, weight: Array) -> Array:
    """hidden [..., D] @ weight [D, V] -> float32 logits; operands in the dtype of the hidden states."""
    return lax.dot_general(
        hidden,
        weight.astype(hidden.dtype),
        (((hidden.ndim - 1,), (0,)), ((), ())),
        precision=gemm_precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logprobs(hidden_BTD: Array, weight: Array, targets_BT: Array, max_logits: int = MAX_LOGITS) -> Array:
    """log p(target) under softmax(hidden @ weight), natural log.

    Args:
      hidden_BTD: [B, T, D] after the final norm.
      weight: [D, V].
      targets_BT: [B, T] int32 in [0, V).
      max_logits: float32 logits held at a time (at least one chunk of one token a row).

    Returns:
      [B, T] float32.
    """
    return _forward(hidden_BTD, weight, targets_BT, max_logits)[0]


def _chunks(x_BT: Array, length: int) -> Array:
    """[B, T, ...] -> [Z, B, C, ...], zeros behind the end."""
    batch, time = x_BT.shape[:2]
    padded = jnp.pad(x_BT, [(0, 0), (0, -time % length)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(padded.reshape(batch, -1, length, *x_BT.shape[2:]), 1, 0)


def _join(x_ZBC: Array, time: int) -> Array:
    joined = jnp.moveaxis(x_ZBC, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :time]


def _chunk_length(batch: int, time: int, vocab: int, max_logits: int) -> int:
    """Equal chunks, as long as the limit allows."""
    most = max(1, max_logits // (batch * vocab))
    return -(-time // -(-time // most))


def _forward(hidden_BTD: Array, weight: Array, targets_BT: Array, max_logits: int) -> tuple[Array, Array]:
    batch, time, _ = hidden_BTD.shape
    length = _chunk_length(batch, time, weight.shape[1], max_logits)

    def chunk(_: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        hidden_BCD, targets_BC = inputs
        logits_BCV = head_logits(hidden_BCD, weight)
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return None, (chosen_BC - lse_BC, lse_BC)

    _, (logprobs, lse) = lax.scan(chunk, None, (_chunks(hidden_BTD, length), _chunks(targets_BT, length)))
    return _join(logprobs, time), _join(lse, time)


def _fwd(hidden_BTD: Array, weight: Array, targets_BT: Array, max_logits: int) -> tuple[Array, tuple[Array, ...]]:
    logprobs_BT, lse_BT = _forward(hidden_BTD, weight, targets_BT, max_logits)
    return logprobs_BT, (hidden_BTD, weight, targets_BT, lse_BT)


def _bwd(max_logits: int, saved: tuple[Array, ...], d_BT: Array) -> tuple[Array, Array, None]:
    hidden_BTD, weight, targets_BT, lse_BT = saved
    batch, time, _ = hidden_BTD.shape
    vocab = weight.shape[1]
    dtype = hidden_BTD.dtype
    length = _chunk_length(batch, time, vocab, max_logits)

    def chunk(d_weight: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden_BCD, targets_BC, lse_BC, d_BC = inputs
        probabilities_BCV = jnp.exp(head_logits(hidden_BCD, weight) - lse_BC[..., None])
        chosen_BCV = targets_BC[..., None] == jnp.arange(vocab)
        d_logits_BCV = (d_BC[..., None] * (chosen_BCV - probabilities_BCV)).astype(dtype)
        gemm = functools.partial(lax.dot_general, precision=gemm_precision(dtype), preferred_element_type=jnp.float32)
        d_hidden_BCD = gemm(d_logits_BCV, weight.astype(dtype), (((2,), (1,)), ((), ())))
        d_weight += gemm(hidden_BCD, d_logits_BCV, (((0, 1), (0, 1)), ((), ())))
        return d_weight, d_hidden_BCD.astype(dtype)

    inputs = tuple(_chunks(x, length) for x in (hidden_BTD, targets_BT, lse_BT, d_BT))
    d_weight, d_hidden = lax.scan(chunk, jnp.zeros(weight.shape, jnp.float32), inputs)
    return _join(d_hidden, time), d_weight.astype(weight.dtype), None


token_logprobs.defvjp(_fwd, _bwd)
