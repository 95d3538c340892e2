"""The one matmul and the recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.errors import ConfigError
from nemotron_jax.precision.matmul import matmul
from nemotron_jax.precision.recipe import RECIPES, Precision, Recipe, recipe


@pytest.mark.parametrize(("operands", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_values_and_gradients(operands, tolerance, rng=np.random.default_rng(0)):  # noqa: B008
    x = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    y, pull = jax.vjp(lambda x, w: matmul(x, w, Precision(operands)), x, w)
    expected, expected_pull = jax.vjp(lambda x, w: jnp.einsum("btk,kn->btn", x, w), x, w)
    for a, b in zip((y, *pull(dy)), (expected, *expected_pull(dy)), strict=True):
        assert a.dtype == jnp.float32
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        assert error < tolerance and (error > 1e-4 or operands == "float32")


def test_weight_gradient_is_not_rounded_to_bfloat16():
    """1 + 2^-12 a thousand times over: the sum leaves the GEMM in float32, the dtype of the master weight."""
    x = jnp.ones((4097, 1), jnp.bfloat16)
    _, pull = jax.vjp(lambda w: matmul(x, w, Precision("bfloat16")), jnp.ones((1, 1), jnp.float32))
    (dw,) = pull(jnp.ones((4097, 1), jnp.bfloat16))
    assert dw.dtype == jnp.float32 and float(dw[0, 0]) == 4097.0  # bfloat16 would say 4096


def test_activations_keep_their_dtype():
    x, w = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((4, 2), jnp.float32)
    assert matmul(x, w, Precision("bfloat16")).dtype == jnp.bfloat16


def test_recipes():
    first = Recipe("float32", (("layers/1/*", Precision("float32")), ("*", Precision("bfloat16"))))
    assert first.resolve("layers/1/mixer/out_proj").operands == "float32"
    assert first.resolve("layers/10/mixer/out_proj").operands == "bfloat16"
    with pytest.raises(ConfigError, match="no rule of the precision recipe matches mtp"):
        Recipe("float32", (("layers/*", Precision()),)).resolve("mtp/eh_proj")
    assert recipe("auto") is RECIPES["float32"]  # tests run on the CPU
    with pytest.raises(ConfigError, match="Did you mean 'bfloat16'"):
        recipe("bfloat1")
