"""Float32 products in thirds against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.precision.float32 import float32_matmul


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_values_and_gradients_to_float32_precision(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 33, 300)), dtype)
    w = jnp.asarray(rng.normal(size=(300, 24)) * 10.0 ** rng.integers(-6, 6, (300, 24)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(2, 33, 24)), jnp.float32)
    y, pull = jax.vjp(float32_matmul, x, w)
    dx, dw = pull(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, jnp.float32)

    x64, w64, dy64 = (np.asarray(z, np.float64) for z in (x, w, dy))

    def error(got, want):
        return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)

    assert error(y, x64 @ w64) < 3e-7
    assert error(dw, np.einsum("btk,btn->kn", x64, dy64)) < 3e-7
    assert error(dx, dy64 @ w64.T) < (3e-3 if dtype == jnp.bfloat16 else 3e-7)  # its own rounding


def test_the_router_tells_apart_what_bfloat16_cannot():
    """Two experts whose weights differ by one part in 10^6 get different scores."""
    x = jnp.ones((1, 256), jnp.bfloat16)
    w = jnp.stack([jnp.full(256, 1.0), jnp.full(256, 1.0 + 1e-6)], axis=1).astype(jnp.float32)
    low, high = float32_matmul(x, w)[0]
    assert float(high - low) == pytest.approx(256e-6, rel=0.2)
