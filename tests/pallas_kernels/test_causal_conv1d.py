"""The convolution against a loop in numpy, its state, and its gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d
from pallas_kernels.causal_conv1d import CASES, example_inputs, final_state


def loop(x, w, bias, activation, initial_state=None, segment_ids=None):
    """Token by token: a window of the last K - 1 inputs, emptied at each document border."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    batch, time, channels = x.shape
    taps = w.shape[1]
    y = np.zeros_like(x)
    windows = np.zeros((batch, taps - 1, channels))
    for b in range(batch):
        window = np.zeros((taps - 1, channels)) if initial_state is None else np.asarray(initial_state[b], np.float64)
        for t in range(time):
            if t and segment_ids is not None and segment_ids[b, t] != segment_ids[b, t - 1]:
                window = np.zeros_like(window)
            taken = np.concatenate([window, x[b, t : t + 1]])
            y[b, t] = (taken * w.T).sum(0) + (0 if bias is None else np.asarray(bias, np.float64))
            window = taken[1:]
        windows[b] = window
    return (y / (1 + np.exp(-y)) if activation == "silu" else y), windows


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_a_loop(case):
    args, kwargs = example_inputs(case)
    conv = jax.jit(causal_conv1d, static_argnames=("activation", "return_final_state"))
    y, state = conv(*args, **kwargs, return_final_state=True)
    want, want_state = loop(*args, **kwargs)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(state, want_state.astype(np.float32))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_by_finite_differences(case):
    with jax.enable_x64(True):
        args, kwargs = example_inputs(case, 0, jnp.float64)
        ids = kwargs.pop("segment_ids", None)
        activation = kwargs.pop("activation")
        floats = {name: z for name, z in zip(("x", "w", "bias"), args, strict=True) if z is not None} | kwargs

        def loss(floats):
            y, state = causal_conv1d(**floats, segment_ids=ids, activation=activation, return_final_state=True)
            return jnp.sin(y).sum() + (state**3).sum()

        loss_and_grads = jax.jit(jax.value_and_grad(loss))
        _, grads = loss_and_grads(floats)
        random = np.random.default_rng(1)
        for name in floats:
            direction = random.standard_normal(floats[name].shape)
            up, down = (loss_and_grads({**floats, name: floats[name] + h * direction})[0] for h in (1e-5, -1e-5))
            np.testing.assert_allclose((grads[name] * direction).sum(), (up - down) / 2e-5, rtol=1e-6, err_msg=name)


def test_final_state_continues_the_row():
    case = next(case for case in CASES if case.name == "packed_state")
    (x, w, bias), kwargs = example_inputs(case, 1)
    ids, state = kwargs["segment_ids"], kwargs["initial_state"]
    conv = jax.jit(partial(causal_conv1d, return_final_state=True))
    whole, last = conv(x, w, bias, initial_state=state, segment_ids=ids)
    pieces = []
    # The state goes on where the id does; a piece that starts a document starts from zeros.
    for start, stop in ((0, 2), (2, 3), (3, 12), (12, 23)):
        if start:
            same = ids[:, start] == ids[:, start - 1]
            state = jnp.where(same[:, None, None], state, 0)
        y, state = conv(x[:, start:stop], w, bias, initial_state=state, segment_ids=ids[:, start:stop])
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state, last)


@pytest.mark.parametrize("with_state", [False, True])
def test_final_state_at_the_true_length_of_each_prompt(with_state):
    x = jnp.arange(1.0, 19).reshape(3, 6, 1)
    before = -jnp.arange(1.0, 10).reshape(3, 3, 1) if with_state else None
    state = final_state(x, before, jnp.array([0, 2, 6]), 4)
    want = [[-1, -2, -3], [-6, 7, 8], [16, 17, 18]] if with_state else [[0, 0, 0], [0, 7, 8], [16, 17, 18]]
    np.testing.assert_array_equal(state[..., 0], want)


def test_types():
    case = next(case for case in CASES if case.name == "packed_state")
    (x, w, bias), kwargs = example_inputs(case, 2)
    half = x.astype(jnp.bfloat16)
    y, state = causal_conv1d(half, w, bias, **kwargs, return_final_state=True)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    want, _ = loop(half, w, bias, **kwargs)
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-8, atol=1e-5)  # rounded once
    assert causal_conv1d(half, w, return_final_state=True)[1].dtype == jnp.bfloat16


def test_wrong_arguments():
    x, w = jnp.ones((2, 5, 3)), jnp.ones((3, 4))
    with pytest.raises(ValueError, match=r"causal_conv1d: w must have shape \[C, K\] = \[3, any\], got \[4, 3\]"):
        causal_conv1d(x, w.T)
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'gelu'"):
        causal_conv1d(x, w, activation="gelu")
    with pytest.raises(ValueError, match=r"initial_state must have shape \[B, K-1, C\] = \[2, 3, 3\]"):
        causal_conv1d(x, w, initial_state=jnp.ones((2, 4, 3)))
    with pytest.raises(ValueError, match="bias must have shape"):
        causal_conv1d(x, w, jnp.ones(4))
    with pytest.raises(ValueError, match="segment_ids must have shape"):
        causal_conv1d(x, w, segment_ids=jnp.ones((2, 4)))
