"""Every op, implementation and case on a GPU: bfloat16 against the float32 truth, and the same bits in every run."""

import jax
import pytest

from pallas_kernels import suite
from pallas_kernels.dispatch import OPS
from pallas_kernels.suite import SUITE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

DRAWS = 10
TOLERANCE = 1e-2  # relative Frobenius error
# out1: the final state. d_A is a sum of what d_dt is made of: 1.4e-2 for five tokens, 2.8e-3 at Nano's size.
WIDER = {"ssd": {"out1": 2e-2, "d_dt": 2e-2, "d_initial_state": 2e-2, "d_A": 2e-2}}
# XLA's scatter-add on GPUs, by atomics.
UNORDERED = {("take_rows", "reference")}
# Shapes of the released models, beside all the small ones: those whose float32 truth takes seconds at most.
BENCHMARKS = {
    "ssd": ("nano", "nano_packed", "nano-4b"),
    "causal_conv1d": ("nano", "nano_packed"),
    "grouped_matmul": ("nano_up_relu2", "nano_down", "super_up", "super_decode_1", "super_decode_32"),
    "grouped_mlp": ("nano", "super"),
    "attention": ("nano", "nano_packed"),
    "decode_attention": ("nano_32x8k", "nano_32x8k_paged"),
    "take_rows": ("nano", "nano_skewed"),
    "block_scaled_matmul": ("8192x4096_1", "8192x4096_16", "8192x4096_64", "super_experts_up", "super_experts_down"),
    "nvfp4_matmul": ("super_in_proj", "super_in_proj_dw", "super_shared_up"),
    "quantize": ("activation", "activation_no_rht", "gradient"),
    "quantize_operands": ("activation", "gradient"),
    "quantize_expert_operands": ("nano", "nano_gradient"),
    "quantize_tiles": ("in_proj", "in_proj_float32"),
    "permute": ("nano", "super"),
    "unpermute": ("nano", "super"),
}


SMALL = [(op, case, impl) for op in SUITE for case in SUITE[op].cases for impl in OPS[op]]
LARGE = [
    (op, case, impl)
    for op in SUITE
    for case in SUITE[op].benchmarks
    for impl in OPS[op]
    if case.name in BENCHMARKS[op] and impl not in ("reference", SUITE[op].truth)  # slow, or larger than the memory
]


@pytest.mark.parametrize(
    ("op", "case", "impl"), [pytest.param(*call, id=f"{call[0]}-{call[1].name}-{call[2]}") for call in SMALL + LARGE]
)
def test_values_and_gradients(op: str, case, impl: str):
    reason = suite.implementations(op, suite.inputs(op, case, abstract=True))[impl]
    if reason:
        pytest.skip(reason)
    found = suite.errors(op, case, impl, seeds=range(DRAWS))
    print(op, case.name, impl, {name: f"{error:.1e}" for name, error in found.items()})
    repeat = found.pop("repeat")
    assert repeat == 0 or (op, impl) in UNORDERED, "two runs on the same inputs differ"
    wrong = {name: error for name, error in found.items() if error > WIDER.get(op, {}).get(name, TOLERANCE)}
    assert not wrong


def test_the_chosen_names_exist():
    for op, names in BENCHMARKS.items():
        assert set(names) <= {case.name for case in SUITE[op].benchmarks}
