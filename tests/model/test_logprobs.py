"""Chunked log-probabilities against the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.model.logprobs import _one_pass_logsumexp, head_logits, token_logprobs, weighted_nll


def plain(hidden, weight, targets):
    logprobs = jax.nn.log_softmax(head_logits(hidden, weight), axis=-1)
    return jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("max_logits", [1, 2 * 50 * 3, 2 * 50 * 5, 10**9])
def test_values_and_gradients(max_logits, rng):
    """Any chunk length, also one that does not divide the row, with weights that differ by token."""
    hidden = jnp.asarray(rng.normal(size=(2, 11, 8)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(8, 50)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (2, 11)), jnp.int32)
    scale = jnp.asarray(rng.normal(size=(2, 11)), jnp.float32)

    def through(function):
        return jax.value_and_grad(lambda *a: 3 * function(*a), argnums=(0, 1, 2))(hidden, weight, scale)

    expected, expected_gradients = through(lambda h, w, s: (s * plain(h, w, targets)).sum())
    for function in (
        lambda h, w, s: (s * token_logprobs(h, w, targets, max_logits)).sum(),
        lambda h, w, s: -weighted_nll(h, w, targets, s, max_logits),
    ):
        value, gradients = through(function)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=2e-5)


def test_head_gradient_is_summed_in_float32(rng):
    """With bfloat16 operands, many small equal contributions add up; a bfloat16 sum would stall at 256 of them."""
    hidden = jnp.ones((1, 2048, 1), jnp.bfloat16)
    weight = jnp.zeros((1, 2), jnp.float32)
    targets = jnp.zeros((1, 2048), jnp.int32)
    for function in (
        lambda w: token_logprobs(hidden, w, targets, 2 * 8).sum(),
        lambda w: -weighted_nll(hidden, w, targets, jnp.ones((1, 2048)), 2 * 8),
    ):
        gradient = jax.grad(function)(weight)
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(gradient, [[1024, -1024]], rtol=1e-6)


def test_full_logits_are_never_held(rng):
    """No float32 array of batch x time x vocabulary elements in the compiled gradient."""
    hidden = jnp.zeros((2, 64, 8), jnp.bfloat16)
    weight = jnp.zeros((8, 1000), jnp.float32)
    targets = jnp.zeros((2, 64), jnp.int32)
    for function in (
        lambda h, w: token_logprobs(h, w, targets, 2 * 1000 * 4).sum(),
        lambda h, w: weighted_nll(h, w, targets, jnp.ones((2, 64)), 2 * 1000 * 4),
    ):
        text = jax.jit(jax.grad(function, argnums=(0, 1))).lower(hidden, weight).compile().as_text()
        assert "2,4,1000]" in text and "2,64,1000]" not in text and "128,1000]" not in text


def test_the_one_pass_sum_that_gpus_run(rng):
    logits = jnp.asarray(rng.normal(size=(2, 3, 1000)) * 100, jnp.float32).at[0, 0].set(-3e38).at[1, 1].set(90)
    np.testing.assert_allclose(_one_pass_logsumexp(logits), jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)
