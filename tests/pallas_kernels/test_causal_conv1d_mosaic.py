"""The kernels of the convolution, interpreted on the CPU with race detection, against the reference in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import causal_conv1d, causal_conv1d_mosaic
from pallas_kernels.causal_conv1d import causal_conv1d_reference, convolve_channels
from pallas_kernels.causal_conv1d_mosaic import backward, forward, unfit
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.segments import run_ids


def operands(batch, time, channels, taps, *, bias, state, packed):
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    x, dy = (normal(batch, time, channels).astype(jnp.bfloat16) for _ in range(2))
    w = normal(channels, taps)
    b = normal(channels) if bias else None
    s = normal(batch, taps - 1, channels) if state else None
    changed = np.concatenate([random.random((batch, time - 8)) < 0.4, np.zeros((batch, 8), bool)], axis=1)
    run = run_ids(jnp.asarray(np.cumsum(changed, axis=1) % 2)) if packed else None  # many of one token, ids come back
    return x, w, b, s, run, dy


@pytest.mark.parametrize(
    ("shape", "taps", "silu", "given"),
    [
        ((2, 37, 256), 4, True, {"bias": True, "state": True, "packed": True}),  # three chunks, the last one cut
        ((1, 16, 512), 4, True, {"bias": True, "state": False, "packed": False}),
        ((1, 24, 256), 3, False, {"bias": False, "state": True, "packed": False}),
    ],
)
def test_values_and_gradients(shape, taps, silu, given, interpret):
    x, w, bias, state, run, dy = operands(*shape, taps, **given)

    def reference(x, w, bias, state):
        return causal_conv1d_reference(x, w, bias, state, run, activation="silu" if silu else None)

    y, pull = jax.vjp(reference, x.astype(jnp.float32), w, bias, state)
    want = pull(dy.astype(jnp.float32))
    settings = {"silu": silu, "chunk": 16, "interpret": interpret}
    got = forward(x, w, bias, state, run, **settings)
    np.testing.assert_allclose(got.astype(jnp.float32), y, rtol=2**-8, atol=1e-5)  # rounded once
    dx, *rest = backward(x, w, bias, state, run, dy, **settings)
    if state is None:  # among other channels, which are not read
        wide = jnp.pad(x, ((0, 0), (0, 0), (20, 4)), constant_values=jnp.nan)
        np.testing.assert_array_equal(forward(wide, w, bias, state, run, first=20, **settings), got)
        for same, z in zip(backward(wide, w, bias, state, run, dy, first=20, **settings), (dx, *rest), strict=True):
            np.testing.assert_array_equal(same, z)
    np.testing.assert_allclose(dx.astype(jnp.float32), want[0], rtol=2**-8, atol=1e-5)
    for dz, want_dz in zip(rest, want[1:], strict=True):
        if want_dz is not None:
            np.testing.assert_allclose(dz, want_dz, rtol=1e-4, atol=1e-4)


def test_operands_that_do_not_fit():
    x, w = jnp.ones((1, 8, 256), jnp.bfloat16), jnp.ones((256, 4))
    assert unfit(x, w) == ""
    assert "bfloat16, got float32" in unfit(x.astype(jnp.float32), w)
    assert "a multiple of 256, got 255" in unfit(x, w[1:])
    assert "2 to 8 taps, got 1" in unfit(x, w[:, :1])
    assert "2 to 8 taps, got 9" in unfit(x, jnp.ones((256, 9)))


@pytest.mark.parametrize("given", [{"bias": True, "state": True}, {"bias": False, "state": False}])
def test_what_surrounds_the_kernels(given, monkeypatch):
    """Which gradient belongs to which input, in its dtype, and none for what is absent."""
    x, w, bias, state, run, dy = operands(1, 16, 256, 4, packed=True, **given)
    w = w.astype(jnp.bfloat16)

    for name in ("forward", "backward"):
        kernel = partial(getattr(causal_conv1d_mosaic, name), interpret=plgpu.InterpretGPUParams())
        monkeypatch.setattr(causal_conv1d_mosaic, name, kernel)

    def grads(x, impl):
        def call(x, w, bias, state):
            with compiling_for("sm_90a"):
                return causal_conv1d(x, w, bias, initial_state=state, segment_ids=run, impl=impl)

        y, pull = jax.vjp(call, x, w, bias, state)
        return y, *pull(dy.astype(y.dtype))

    for got, want in zip(grads(x, None), grads(x.astype(jnp.float32), "reference"), strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert got.dtype == (jnp.float32 if want.shape in ((256,), (1, 3, 256)) else jnp.bfloat16)
            np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-7, atol=2e-2)


def test_some_channels_of_several(monkeypatch):
    """As if they were cut out first: values, and zeros for the gradients of the others."""
    _, w, bias, _, run, dy = operands(1, 16, 256, 4, bias=True, state=False, packed=True)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 16, 300)), jnp.bfloat16)
    for name in ("forward", "backward"):
        kernel = partial(getattr(causal_conv1d_mosaic, name), interpret=plgpu.InterpretGPUParams())
        monkeypatch.setattr(causal_conv1d_mosaic, name, kernel)

    def grads(call):
        y, pull = jax.vjp(call, x, w, bias)
        return y, *pull(dy)

    want = grads(lambda x, w, bias: causal_conv1d(x[:, :, 30:286], w, bias, segment_ids=run, impl="reference"))

    def call(x, w, bias):
        return convolve_channels(x, 30, w, bias, segment_ids=run)

    portable = grads(call)
    with compiling_for("sm_90a"):
        kernels = grads(call)
    for results in (portable, kernels):
        for got, wanted in zip(results, want, strict=True):
            got, wanted = (z.astype(jnp.float32) for z in (got, wanted))
            np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=2e-2)
    assert not kernels[1][:, :, :30].any() and not kernels[1][:, :, 286:].any()
