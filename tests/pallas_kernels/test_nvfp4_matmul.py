"""Products by codes and scales: what XLA makes of scaled_matmul on the CPU has the values of the reference.

Compiled for a B200 it is cuDNN's call (tests that need the compiler for GPUs, not a GPU).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.run_config import ParallelConfig
from pallas_kernels import aot, block_scaled_matmul, dispatch, floats, nvfp4_matmul
from pallas_kernels.nvfp4 import NVFP4, quantize_nvfp4
from pallas_kernels.nvfp4_matmul import CASES
from pallas_kernels.packed import Packed
from tests.pallas_kernels.test_rounding_survives import compiler

needs_compiler = pytest.mark.skipif(not compiler(), reason="no compiler for GPUs is installed")


def tensor(*shape, seed=0, **options):
    rows = 10.0 ** -(np.arange(shape[-2]) % 3)[:, None]
    z = np.random.default_rng(seed).normal(size=shape) * rows
    return quantized(z, **options)


def quantized(z, **options):
    return jax.jit(lambda z: quantize_nvfp4(z, **options))(jnp.asarray(z, jnp.float32))


reference = jax.jit(nvfp4_matmul)
restored = jax.jit(NVFP4.dequantize)


def native(a, b):
    """As on a B200, but on this CPU."""
    with dispatch.compiling_for("sm_100a"):
        return jax.jit(lambda a, b: nvfp4_matmul(a, b, impl="cudnn"))(a, b)


def check(found, a, b):
    """Products of codes and block scales are exact in float32: what is rounded is K - 1 sums and the global scales."""
    a, b = (np.asarray(restored(z), np.float64) for z in (a, b))
    bound = (a.shape[-1] + 5) * 2.0**-24 * (np.abs(a) @ np.abs(b).T)
    assert found.dtype == jnp.float32 and (bound > 0).any()
    assert (np.abs(np.asarray(found, np.float64) - a @ b.T) <= bound).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_sum_the_same_products(case):
    a, b = tensor(case.rows, case.inner), tensor(case.outputs, case.inner, seed=1)
    check(native(a, b), a, b)
    check(reference(a, b), a, b)


def test_square_blocks_leading_axes_and_an_amax_of_each_row():
    b = tensor(32, 48, seed=1, block="16x16")
    a = tensor(2, 3, 48)
    check(native(a, b), a, b)
    x = restored(a)
    a = quantized(x, amax=floats.absolute_max(x, axis=2))
    check(native(a, b), a, b)
    check(reference(a, b), a, b)


def test_zeros_blocks_that_underflow_and_nan():
    x = np.zeros((3, 48), np.float32)
    x[1, 0], x[1, 16:32] = 1.0, 1e-7  # the scale of the second block is zero, its codes are the largest
    a, b = quantized(x), tensor(16, 48, seed=1)
    assert a.codes[1, 8:16].min() == 0x77 and float(a.scales[1, 1]) == 0
    for run in (native, reference):
        check(run(a, b), a, b)
        assert (np.asarray(run(a, b))[[0, 2]] == 0).all()
    x[2, 3] = np.nan
    for run in (native, reference):
        assert not np.isfinite(run(quantized(x), b)).any()


@pytest.mark.parametrize("a_spec", [P("data"), P(None, "tensor"), P("data", "tensor")])
@pytest.mark.parametrize("b_spec", [P("tensor"), P("data", "tensor")])
def test_on_a_mesh(a_spec, b_spec):
    """Rows and whole blocks cut over devices, the same way in both operands or not."""
    a, b = tensor(64, 256), tensor(64, 256, seed=1)
    mesh = make_mesh(ParallelConfig(data=2, tensor=4))

    def place(tensor, spec):
        here, everywhere = NamedSharding(mesh, spec), NamedSharding(mesh, P())
        return jax.device_put(tensor, NVFP4(here, here, everywhere))

    with jax.set_mesh(mesh), dispatch.compiling_for("sm_100a"):
        program = jax.jit(lambda a, b: nvfp4_matmul(a, b)).lower(place(a, a_spec), place(b, b_spec))
        assert "CustomSPMDPartitioning" in program.as_text()
        found = program.compile()(place(a, a_spec), place(b, b_spec))
    check(found, a, b)


def test_parts_of_blocks_are_emulated_and_said(caplog):
    with jax.set_mesh(make_mesh(ParallelConfig(data=2, tensor=4))), dispatch.compiling_for("sm_100a"):
        jax.eval_shape(nvfp4_matmul, tensor(64, 96), tensor(64, 96, seed=1))
        with pytest.raises(ValueError, match="cut over 4 devices, K = 96 is not whole blocks of 16"):
            nvfp4_matmul(tensor(64, 96), tensor(64, 96, seed=1), impl="cudnn")
    assert "'reference' runs in place of 'cudnn', which cannot take these operands: cut over 4" in caplog.text


def test_as_block_scaled_matmul():
    a, b = tensor(7, 48), tensor(32, 48, seed=1)
    np.testing.assert_array_equal(jax.jit(block_scaled_matmul)(a, b), reference(a, b))
    with pytest.raises(ValueError, match="got NVFP4 and Packed: quantise both"):
        block_scaled_matmul(a, Packed(b.codes, b.scales, b.global_scale()))


def test_refused():
    a, b = tensor(7, 48), tensor(32, 64)
    with pytest.raises(ValueError, match=r"along the same K, got a \[7, 48\] and b \[32, 64\]"):
        nvfp4_matmul(a, b)
    with pytest.raises(ValueError, match=r"cannot run on cpu: needs an NVIDIA GPU of compute capability 10\.x"):
        nvfp4_matmul(a, a, impl="cudnn")


def test_where_it_runs():
    for target, wanted in (
        ("sm_90a", "reference"),
        ("sm_100a", "cudnn"),
        ("sm_103a", "cudnn"),
        ("sm_120a", "reference"),
    ):
        with dispatch.compiling_for(target):
            assert dispatch.describe()["nvfp4_matmul"] == wanted


def compiled_for(target, function, *shapes):
    """The text of the program that XLA makes for a GPU that is not there."""
    here = jax.sharding.SingleDeviceSharding(aot.devices(target)[0])
    arguments = jax.tree.map(lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=here), shapes)
    with aot.compiling_for(target):
        return jax.jit(lambda *z: function(*z)).lower(*arguments).compile().as_text()


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_call_in_the_program_for_a_b200(case):
    a, b = tensor(case.rows, case.inner), tensor(case.outputs, case.inner, seed=1)
    text = compiled_for("b200", nvfp4_matmul, a, b)
    (call,) = re.findall(r"\(f32\[1,(\d+),(\d+)\][^\n]*custom_call_target=\"__cudnn\$blockScaledDot\"", text)
    assert tuple(map(int, call)) == tuple(-(-n // 128) * 128 for n in (case.rows, case.outputs))
    kinds = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", text))
    operands = re.search(r"custom-call\(([^)]*)\), custom_call_target=\"__cudnn", text)[1].split(", ")
    assert [kinds[name] for name in operands] == ["f4e2m1fn", "f4e2m1fn", "f8e4m3fn", "f8e4m3fn"]
    assert not re.search(r" dot\(|__cublas", text)
    assert "__cudnn" not in compiled_for("h200", nvfp4_matmul, a, b)
