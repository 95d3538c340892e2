"""Operations of Nemotron 3 that deserve a kernel: one op, one file, each with a plain-jnp reference.

The public functions take ``impl=None``: `dispatch.choose` picks the implementation for this platform.
"""

from pallas_kernels.attention import attention, decode_attention
from pallas_kernels.block_scaled_matmul import block_scaled_matmul
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_mlp import grouped_mlp
from pallas_kernels.nvfp4_matmul import nvfp4_matmul
from pallas_kernels.permute import permute, unpermute
from pallas_kernels.quantize import quantize
from pallas_kernels.quantize_expert_operands import quantize_expert_operands
from pallas_kernels.quantize_operands import quantize_operands
from pallas_kernels.quantize_tiles import quantize_tiles
from pallas_kernels.ssd import ssd
from pallas_kernels.take_rows import take_rows

__all__ = [
    "attention",
    "block_scaled_matmul",
    "causal_conv1d",
    "decode_attention",
    "grouped_matmul",
    "grouped_mlp",
    "nvfp4_matmul",
    "permute",
    "quantize",
    "quantize_expert_operands",
    "quantize_operands",
    "quantize_tiles",
    "ssd",
    "take_rows",
    "unpermute",
]
