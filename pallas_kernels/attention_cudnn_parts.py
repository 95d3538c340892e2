"""Attention of a part of a row (cuDNN, our gradients): to its own keys, and to those of earlier parts.

A part's queries see its own keys causally, and those of its first document also see that document's earlier keys, all
of them. Two calls, put together by their log-sum-exps:

    lse = log(exp(lse_own) + exp(lse_earlier))        out = sum over both of exp(lse_i - lse) out_i

The backward pass of each call is given the lse and the out of both together, which makes its gradients those of the
whole (the softmax of a call then runs over all keys).

Shapes: B batch, T queries of the part, S keys of earlier and other parts, H query heads, V key/value heads, D head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import attention_backward_mosaic
from pallas_kernels import attention_cudnn as cudnn


class Reach(NamedTuple):
    """Which earlier keys the part sees, [B] int32 each: queries 0 .. queries - 1 see keys start .. start + keys - 1."""

    queries: jax.Array
    start: jax.Array
    keys: jax.Array


def forward(
    scale: float,
    q_BTHD: jax.Array,
    own: tuple[jax.Array, jax.Array],
    earlier: tuple[jax.Array, jax.Array],
    run: jax.Array | None,
    reach: Reach,
) -> tuple[jax.Array, jax.Array]:
    """own: keys and values [B, T, V, D]; earlier: [B, S, V, D]; run [B, T] of the part -> out, lse [B, H, T]."""
    if run is None:
        out_BTHD, lse_BHT = cudnn.forward(scale, q_BTHD, *own)
    else:
        count = min(cudnn.DOCUMENTS, q_BTHD.shape[1])
        out_BTHD, lse_BHT = cudnn.packed_forward(scale, count, q_BTHD, *own, run)
    more_BTHD, more_lse = cudnn.forward(scale, q_BTHD, *earlier, _layout(reach), causal=False)
    reached_BT = _reached(q_BTHD, reach)
    more_lse = jnp.where(reached_BT[:, None], more_lse, -jnp.inf)
    both_BHT = jnp.logaddexp(lse_BHT, more_lse)

    def weighed(z_BTHD: jax.Array, lse: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.exp(lse - both_BHT), 1, 2)[..., None] * z_BTHD

    more_BTHD = jnp.where(reached_BT[..., None, None], more_BTHD, 0)
    out = weighed(out_BTHD, lse_BHT) + weighed(more_BTHD, more_lse)
    return out.astype(q_BTHD.dtype), both_BHT


def backward(
    scale: float,
    q_BTHD: jax.Array,
    own: tuple[jax.Array, jax.Array],
    earlier: tuple[jax.Array, jax.Array],
    run: jax.Array | None,
    reach: Reach,
    results: tuple[jax.Array, jax.Array],
    dout_BTHD: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """results: what `forward` returned -> dq, gradients of own, gradients of earlier (zeros where nothing is seen)."""
    out_BTHD, lse_BHT = results
    dq, *d_own = cudnn.gradients(scale, (q_BTHD, *own, out_BTHD, lse_BHT), dout_BTHD, run)
    reached_BT = _reached(q_BTHD, reach)
    first_BT, last_BT = (jnp.where(reached_BT, z[:, None], 0) for z in (reach.start, reach.start + reach.keys))
    more_dq, *d_earlier = attention_backward_mosaic.gradients(
        q_BTHD, *earlier, out_BTHD, dout_BTHD, lse_BHT, first_BT, last_BT, scale=scale
    )
    return dq + more_dq, (d_own[0], d_own[1]), (d_earlier[0], d_earlier[1])


def _reached(q_BTHD, reach):
    """[B, T] queries that see earlier keys."""
    return (jnp.arange(q_BTHD.shape[1]) < reach.queries[:, None]) & (reach.keys > 0)[:, None]


def _layout(reach):
    """One document a row; where there are no keys there are no queries either."""
    queries = jnp.where(reach.keys > 0, reach.queries, 0)

    def offsets(start):
        return jnp.stack([start, jnp.full_like(start, -1)], axis=1)

    return queries[:, None], reach.keys[:, None], offsets(jnp.zeros_like(queries)), offsets(reach.start)
