"""NVIDIA's own code on a few tensors (make_nvfp4.py): the same bytes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nemotron_jax.precision import modelopt
from nemotron_jax.precision.formats import quantize_nvfp4

GOLDEN = np.load(Path(__file__).parent / "nvfp4.npz")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
OPTIONS = {
    "1x16": {},
    "16x16": {"block": "16x16"},
    "rows": {},
    "mae256": {"four_over_six": "mae"},
    "mse448 16x16": {"block": "16x16", "four_over_six": ("mse", 448)},
    "hadamard": {"hadamard": True},
}


@functools.cache
def compiled(option):
    return jax.jit(lambda x, amax: quantize_nvfp4(x, amax=amax, **OPTIONS[option]))


def joined(*parts):
    return np.concatenate([np.ascontiguousarray(part).ravel().view(np.uint8) for part in parts])


@pytest.mark.parametrize("option", OPTIONS)
def test_transformer_engine(option):
    keys = [key for key in GOLDEN if "/te/" in key and key.endswith(f"/{option}")]
    assert len(keys) == (6 if option == "hadamard" else 18)
    for key in keys:
        name, _, dtype, _ = key.split("/")
        with np.errstate(over="ignore"):
            x = GOLDEN[f"{name}/x"].astype(DTYPES[dtype])
        x = np.ascontiguousarray(x.T) if option == "hadamard" else x
        amax = np.abs(x).max(-1).astype(np.float32) if option == "rows" else None
        found = compiled(option)(jnp.asarray(x), amax)
        np.testing.assert_array_equal(joined(found.codes, found.scales, found.amax), GOLDEN[key], err_msg=key)


def test_modelopt():
    keys = [key for key in GOLDEN if "/modelopt/" in key and key != "huge/modelopt/bfloat16"]  # which is infinite
    assert len(keys) == 15
    for key in keys:
        name, _, dtype = key.split("/")
        with np.errstate(over="ignore"):
            x = GOLDEN[f"{name}/x"].astype(DTYPES[dtype])
        np.testing.assert_array_equal(joined(*modelopt.quantize_nvfp4(x)), GOLDEN[key], err_msg=key)
