"""The gated norm's hand-written gradient."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.model.mamba2 import _gated_norm
from tests.pallas_kernels import gpu_programs

GROUPS, EPS = 4, 1e-5


def plain(y, z, weight):
    gated = (y * jax.nn.silu(z)).reshape(*y.shape[:-1], GROUPS, -1)
    normed = gated / jnp.sqrt((gated**2).mean(-1, keepdims=True) + EPS)
    return weight * normed.reshape(y.shape)


def drawn(rng, dtype):
    y, z, d = (jnp.asarray(rng.normal(size=(2, 50, 32)), dtype) for _ in range(3))
    return y.at[0, 0].set(0), z.at[0, 1].set(-90), jnp.asarray(rng.normal(size=32), jnp.float32), d


def value_and_gradients(function, y, z, weight, d):
    out, vjp = jax.vjp(function, y, z, weight)
    return out, *vjp(d.astype(out.dtype))


def test_values_and_gradients(rng):
    """Rows of zeros and a closed gate included."""
    operands = drawn(rng, jnp.float32)
    got = value_and_gradients(jax.jit(lambda *a: _gated_norm(GROUPS, EPS, *a)), *operands)
    for result, want in zip(got, value_and_gradients(plain, *operands), strict=True):
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, want, rtol=2e-5, atol=2e-5)


def test_bfloat16_is_rounded_at_the_ends_alone(rng):
    """Every gradient is as near to the float32 one as its own rounding allows; the weight's is summed in float32."""
    y, z, weight, d = drawn(rng, jnp.bfloat16)
    got = value_and_gradients(lambda *a: _gated_norm(GROUPS, EPS, *a), y, z, weight, d)
    # The weight is used in the dtype of the activations.
    exact = [x.astype(jnp.float32) for x in (y, z, weight.astype(jnp.bfloat16), d)]
    wanted = value_and_gradients(plain, *exact)
    for result, want, error in zip(got, wanted, (4e-3, 2e-3, 2e-3, 1e-6), strict=True):
        result = np.asarray(result, np.float64)
        assert np.linalg.norm(result - want) <= error * np.linalg.norm(want)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the GPU compiler is not installed")
def test_no_float32_copy_of_the_rows_is_stored():
    """In the program for a GPU float32 is what a group has one number of, and the sums for the weight's gradient."""
    rows = jax.ShapeDtypeStruct((2, 8192, 4096), jnp.bfloat16)
    arguments = rows, rows, jax.ShapeDtypeStruct((4096,), jnp.float32), rows
    text = gpu_programs.optimised(lambda *a: value_and_gradients(lambda *b: _gated_norm(8, EPS, *b), *a), arguments)
    entry = text[text.index("ENTRY") :]
    assert "bf16[2,8192,4096]" in entry
    assert not [line for line in entry.splitlines() if "f32[2,8192,4096]" in line or "f32[2,8192,8,512]" in line]
