"""XLA:GPU deletes a cast to a small format and back. Our rounding is still there in programs for an H200 or B200.

Needs the compiler for GPUs, not a GPU; skipped where it is not installed (`make compile-gpu` brings it).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot
from pallas_kernels.fp8 import quantize_fp8, quantize_mxfp8
from pallas_kernels.nvfp4 import hadamard16, quantize_nvfp4
from tests.pallas_kernels.gpu_programs import optimised, run_on_cpu


def compiler():
    try:
        aot.devices("h200")
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not compiler(), reason="no compiler for GPUs is installed")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 64)).astype(np.float32)
BITS = RNG.integers(0, 256, X.shape, dtype=np.uint8)
FORMATS = {
    "nvfp4": lambda x, _: quantize_nvfp4(x).dequantize(),
    "nvfp4 operand": lambda x, _: quantize_nvfp4(x).operand(jnp.bfloat16).astype(jnp.float32),
    "nvfp4 16x16": lambda x, _: quantize_nvfp4(x, block="16x16").dequantize(),
    "nvfp4 stochastic": lambda x, bits: quantize_nvfp4(x, rounding="stochastic", bits=bits).dequantize(),
    "nvfp4 hadamard": lambda x, _: quantize_nvfp4(x.astype(jnp.bfloat16), hadamard=True).dequantize(),
    "nvfp4 four over six": lambda x, _: quantize_nvfp4(x, four_over_six="mae").dequantize(),
    "hadamard in bfloat16": lambda x, _: hadamard16(x.astype(jnp.bfloat16)).astype(jnp.float32),
    "fp8": lambda x, _: quantize_fp8(x).dequantize(),
    "mxfp8": lambda x, _: quantize_mxfp8(x).dequantize(),
}


@pytest.mark.parametrize(("name", "target"), [*((name, "h200") for name in FORMATS), ("nvfp4", "b200")])
def test_the_gpu_program_rounds_as_the_cpu_does(name, target):
    expected = np.asarray(jax.jit(FORMATS[name])(X, BITS))
    found = run_on_cpu(optimised(FORMATS[name], (X, BITS), target), (X, BITS))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected - X).max() > 0.001


def test_this_would_show_it():
    """The same with a pair of casts: the GPU program returns its input."""

    def casts(x):
        return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)

    assert (np.asarray(jax.jit(casts)(X)) != X).any()
    np.testing.assert_array_equal(run_on_cpu(optimised(casts, (X,)), (X,)), X)
