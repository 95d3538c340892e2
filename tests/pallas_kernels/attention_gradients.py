"""Gradients of attention in plain jnp, from the log-sum-exp, as `attention_backward_mosaic.gradients` takes it."""

import jax.numpy as jnp


def seen_keys(first, last, keys):
    """[B, T, S] bool."""
    key = jnp.arange(keys)
    return (key >= first[..., None]) & (key < last[..., None])


def gradients(q, k, v, out, dout, lse, first, last, *, scale):
    group = q.shape[2] // k.shape[2]
    k_of_q, v_of_q = (jnp.repeat(z, group, axis=2) for z in (k, v))
    seen = seen_keys(first, last, k.shape[1])[:, None]
    p = jnp.where(seen, jnp.exp(scale * jnp.einsum("bthd,bshd->bhts", q, k_of_q) - lse[..., None]), 0)
    dp = jnp.einsum("bthd,bshd->bhts", dout, v_of_q)
    ds = scale * p * (dp - (dout * out).sum(3).swapaxes(1, 2)[..., None])
    dk, dv = jnp.einsum("bhts,bthd->bshd", ds, q), jnp.einsum("bhts,bthd->bshd", p, dout)
    dk, dv = (z.reshape(*k.shape[:3], group, -1).sum(3) for z in (dk, dv))
    return jnp.einsum("bhts,bshd->bthd", ds, k_of_q), dk, dv
