"""Log-probabilities of given tokens, and their weighted sum, without the [B, T, V] logits.

Tokens go through the head in chunks of time; each chunk's float32 logits are made, reduced and dropped. The weighted
sum knows what each token weighs, so it makes the gradients of a chunk while its logits are there, and the backward
pass only scales them; where the weights come later (`token_logprobs`), the logits are made again. The gradient of
the head's weight is summed over the chunks in float32, whatever the dtype of the operands: in bfloat16 the small
contributions of multi-token prediction were lost, which made Ultra's pre-training diverge (Nemotron 3 Ultra report,
2.7).

Shapes: B batch, T time, D model width, V vocabulary, C tokens of a chunk, Z chunks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nemotron_jax.parallel.local import gathered, per_device, scattered
from nemotron_jax.parallel.mesh import mesh_axes
from nemotron_jax.precision.matmul import gemm_precision
from pallas_kernels.zeros import zeros_after

# Float32 logits held at a time: 2^29 (2 GiB) keeps 4096 rows of a 131,072-token vocabulary. Each chunk reads and writes
# the float32 gradient of the head's weight once, so a quarter of it would cost as much traffic as the logits.
MAX_LOGITS = 2**29


def head_logits(hidden: Array, weight: Array) -> Array:
    """hidden [..., D] @ weight [D, V] -> float32 logits; operands in the dtype of the hidden states."""
    return lax.dot_general(
        hidden,
        weight.astype(hidden.dtype),
        (((hidden.ndim - 1,), (0,)), ((), ())),
        precision=gemm_precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def token_logprobs(hidden_BTD: Array, weight: Array, targets_BT: Array, max_logits: int = MAX_LOGITS) -> Array:
    """log p(target) under softmax(hidden @ weight), natural log.

    Args:
      hidden_BTD: [B, T, D] after the final norm.
      weight: [D, V].
      targets_BT: [B, T] int32 in [0, V).
      max_logits: float32 logits that a device holds at a time (at least one chunk of one token a row).

    Returns:
      [B, T] float32.
    """
    of_device = functools.partial(_token_logprobs, max_logits, weight.shape)
    return per_device(of_device, (*_OPERANDS, _TOKENS), _TOKENS)(hidden_BTD, weight, targets_BT)


def weighted_nll(
    hidden_BTD: Array, weight: Array, targets_BT: Array, weights_BT: Array, max_logits: int = MAX_LOGITS
) -> Array:
    """-sum of weights_BT * `token_logprobs`, a float32 scalar: the same function at two thirds of the matmuls.

    Args:
      weights_BT: [B, T] float32, what each token's negative log-likelihood weighs in the loss.
      hidden_BTD, weight, targets_BT, max_logits: as of `token_logprobs`.
    """

    def of_device(*operands: Array) -> Array:
        return _weighted_nll(max_logits, weight.shape, *operands).reshape(1, 1)

    run = per_device(of_device, (*_OPERANDS, _TOKENS, _TOKENS), _TOKENS)
    return run(hidden_BTD, weight, targets_BT, weights_BT).sum()


_TOKENS, _WEIGHT = ("batch", "time"), ("embed", "vocab")
_OPERANDS = ((*_TOKENS, None), _WEIGHT)
_Shape = tuple[int, ...]  # of the whole weight: a device has a part of it


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_logprobs(max_logits: int, shape: _Shape, hidden_BTD: Array, weight: Array, targets_BT: Array) -> Array:
    return _values(hidden_BTD, weight, targets_BT, max_logits, shape)


def _logprobs_fwd(
    max_logits: int, shape: _Shape, hidden_BTD: Array, weight: Array, targets_BT: Array
) -> tuple[Array, Any]:
    return _values(hidden_BTD, weight, targets_BT, max_logits, shape), (hidden_BTD, weight, targets_BT)


def _logprobs_bwd(
    max_logits: int, shape: _Shape, saved: tuple[Array, Array, Array], d_BT: Array
) -> tuple[Array, Array, None]:
    d_BT = _Vocabulary.of(saved[1], shape).cotangent(d_BT)
    _, d_hidden_BTD, d_weight = _values_and_gradients(*saved, d_BT, max_logits, shape)
    return d_hidden_BTD, d_weight, None


_token_logprobs.defvjp(_logprobs_fwd, _logprobs_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_nll(
    max_logits: int, shape: _Shape, hidden_BTD: Array, weight: Array, targets_BT: Array, weights_BT: Array
) -> Array:
    return -(weights_BT * _values(hidden_BTD, weight, targets_BT, max_logits, shape)).sum()


def _nll_fwd(
    max_logits: int, shape: _Shape, hidden_BTD: Array, weight: Array, targets_BT: Array, weights_BT: Array
) -> tuple[Array, tuple[Array, ...]]:
    logprobs_BT, *gradients = _values_and_gradients(hidden_BTD, weight, targets_BT, -weights_BT, max_logits, shape)
    return -(weights_BT * logprobs_BT).sum(), (*gradients, logprobs_BT)


def _nll_bwd(_: int, shape: _Shape, saved: tuple[Array, Array, Array], d: Array) -> tuple[Array, Array, None, Array]:
    d_hidden_BTD, d_weight, logprobs_BT = saved
    # The weights' gradient is summed over the parts of the vocabulary, like that of every operand they have in common.
    d_weights_BT = -d * logprobs_BT
    d = _Vocabulary.of(d_weight, shape).cotangent(d)
    return (d * d_hidden_BTD).astype(d_hidden_BTD.dtype), (d * d_weight).astype(d_weight.dtype), None, d_weights_BT


_weighted_nll.defvjp(_nll_fwd, _nll_bwd)


@dataclass(frozen=True)
class _Vocabulary:
    """The part of the vocabulary of this device: sums over it are finished over the devices of the other parts.

    Attributes:
      size: tokens of the part.
      axes: of the mesh, over which the vocabulary is cut; none: this device has it all.
    """

    size: int
    axes: tuple[str, ...]

    @staticmethod
    def of(weight: Array, shape: _Shape) -> _Vocabulary:
        return _Vocabulary(weight.shape[1], mesh_axes("vocab") if weight.shape[1] < shape[1] else ())

    def cotangent(self, d: Array) -> Array:
        """Of a value that the devices of all parts return: each is given its share."""
        return lax.psum(d, self.axes) if self.axes else d

    def place(self, targets_BC: Array) -> Array:
        """Where the targets are in this part; outside of [0, size): in another one."""
        return targets_BC - lax.axis_index(self.axes) * self.size if self.axes else targets_BC

    def chosen_and_lse(self, logits_BCV: Array, targets_BC: Array) -> tuple[Array, Array]:
        """The targets' logits and the log-sum-exp over the whole vocabulary, [B, C] each."""
        place_BC = self.place(targets_BC)
        if not self.axes:
            return _at(logits_BCV, place_BC), _logsumexp(logits_BCV)
        inside_BC = (place_BC >= 0) & (place_BC < self.size)
        chosen_BC = jnp.where(inside_BC, _at(logits_BCV, jnp.clip(place_BC, 0, self.size - 1)), 0)
        own_BC = _logsumexp(logits_BCV)
        most_BC = lax.pmax(own_BC, self.axes)
        chosen_BC, total_BC = lax.psum((chosen_BC, jnp.exp(own_BC - most_BC)), self.axes)
        return chosen_BC, jnp.log(total_BC) + most_BC


def _at(logits_BCV: Array, place_BC: Array) -> Array:
    return jnp.take_along_axis(logits_BCV, place_BC[..., None], axis=-1)[..., 0]


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


def _values(hidden_BTD: Array, weight: Array, targets_BT: Array, max_logits: int, shape: _Shape) -> Array:
    batch, time, _ = hidden_BTD.shape
    vocabulary = _Vocabulary.of(weight, shape)
    length = _chunk_length(batch, time, vocabulary.size, max_logits)
    weight = gathered(weight, _WEIGHT, shape, hidden_BTD.dtype)

    def chunk(_: None, inputs: tuple[Array, Array]) -> tuple[None, Array]:
        hidden_BCD, targets_BC = inputs
        chosen_BC, lse_BC = vocabulary.chosen_and_lse(head_logits(hidden_BCD, weight), targets_BC)
        return None, chosen_BC - lse_BC

    inputs = (_chunks(hidden_BTD, length), _chunks(targets_BT, length))
    return _join(lax.scan(chunk, None, inputs)[1], time)


def _logsumexp(logits_BCV: Array) -> Array:
    """log sum exp over the vocabulary. XLA:CPU computes it faster in two passes, XLA:GPU in one (0.62 for 1.01 ms)."""
    return lax.platform_dependent(
        logits_BCV, cuda=_one_pass_logsumexp, default=functools.partial(jax.nn.logsumexp, axis=-1)
    )


def _one_pass_logsumexp(logits_BCV: Array) -> Array:
    """A reduction of pairs (largest so far, sum of exponentials relative to it)."""

    def merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp(a[0] - largest) + b[1] * jnp.exp(b[0] - largest)

    # Finite, since the difference of two infinities is no number.
    nothing = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
    largest, total = lax.reduce((logits_BCV, jnp.ones_like(logits_BCV)), nothing, merge, (2,))
    return largest + jnp.log(total)


def _values_and_gradients(
    hidden_BTD: Array, weight: Array, targets_BT: Array, d_BT: Array, max_logits: int, shape: _Shape
) -> tuple[Array, Array, Array]:
    """Log-probabilities [B, T], and the gradients of hidden states and weight for cotangents d_BT of them.

    The gradient of the hidden states is that through this device's part of the vocabulary.
    """
    batch, time, _ = hidden_BTD.shape
    vocabulary = _Vocabulary.of(weight, shape)
    operands = hidden_BTD.dtype
    whole = gathered(weight, _WEIGHT, shape, operands)
    length = _chunk_length(batch, time, vocabulary.size, max_logits)
    gemm = functools.partial(lax.dot_general, precision=gemm_precision(operands), preferred_element_type=jnp.float32)

    def chunk(d_weight: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        hidden_BCD, targets_BC, d_BC = inputs
        logits_BCV = head_logits(hidden_BCD, whole)
        chosen_BC, lse_BC = vocabulary.chosen_and_lse(logits_BCV, targets_BC)
        is_target_BCV = vocabulary.place(targets_BC)[..., None] == jnp.arange(vocabulary.size)
        d_logits_BCV = d_BC[..., None] * (is_target_BCV - jnp.exp(logits_BCV - lse_BC[..., None]))
        d_logits_BCV = d_logits_BCV.astype(operands)
        d_hidden_BCD = gemm(d_logits_BCV, whole, (((2,), (1,)), ((), ())))
        d_weight += gemm(hidden_BCD, d_logits_BCV, (((0, 1), (0, 1)), ((), ())))
        return d_weight, (chosen_BC - lse_BC, d_hidden_BCD.astype(operands))

    inputs = tuple(_chunks(x, length) for x in (hidden_BTD, targets_BT, d_BT))
    d_weight, (logprobs, d_hidden) = lax.scan(chunk, zeros_after(hidden_BTD, whole.shape, jnp.float32), inputs)
    d_weight = scattered(d_weight, _WEIGHT, weight, shape).astype(weight.dtype)
    return _join(logprobs, time), _join(d_hidden, time), d_weight
