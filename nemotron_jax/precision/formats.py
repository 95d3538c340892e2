"""The number formats: quantise, pack, dequantise. The arithmetic lives in pallas_kernels and is re-exported here.

What ModelOpt writes into checkpoints differs from it in places and is nemotron_jax/precision/modelopt.py.
"""

from pallas_kernels.fp8 import FP8, MXFP8, quantize_fp8, quantize_mxfp8
from pallas_kernels.nvfp4 import NVFP4, hadamard16, quantize_nvfp4, round_e2m1_stochastic

__all__ = [
    "FP8",
    "MXFP8",
    "NVFP4",
    "hadamard16",
    "quantize_fp8",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "round_e2m1_stochastic",
]
