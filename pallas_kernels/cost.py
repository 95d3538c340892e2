"""What a case of an op costs at least: the two numbers behind every roofline in `python -m pallas_kernels`."""

from typing import NamedTuple

BF16, FLOAT32, INT32 = 2, 4, 4  # bytes of an element


class Cost(NamedTuple):
    """Fewest floating-point operations and fewest bytes to and from device memory.

    Bytes: each input read once, each output written once, with the dtypes of training (bfloat16 activations and
    weights; float32 where the model has it). Operations: those of the matrix products, two a multiply-add; of the
    elementwise work where an op has nothing else. The backward pass starts from the inputs and the output's gradient:
    what the forward pass computed on the way and a kernel would not store is counted again.
    """

    flops: float
    bytes: float
    backward_flops: float = 0.0
    backward_bytes: float = 0.0
