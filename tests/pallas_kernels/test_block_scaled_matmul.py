"""Products with packed NVFP4 weights: the kernel, interpreted on the CPU, its arithmetic on bits, and the choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_scaled_matmul, block_scaled_matmul_mosaic, floats, grouped_matmul
from pallas_kernels.block_scaled_matmul import CASES, Case, block_scaled_matmul_reference, example_inputs
from pallas_kernels.block_scaled_matmul_mosaic import multiply, multiply_groups
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.packed import Packed


def operands(case, dtype=jnp.bfloat16):
    (x, codes, scales, scale, _), sizes = example_inputs(case, 1, dtype)
    scale = scale * (1 + jnp.arange(scale.size, dtype=jnp.float32).reshape(scale.shape))  # experts with their own
    return x, Packed(codes, floats.as_e4m3(scales), scale), sizes.get("group_sizes")


def distance(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.maximum(jnp.linalg.norm(want), 1e-30))


@pytest.mark.parametrize(
    "case",
    [
        Case("one row", 1, 256, 64),
        Case("a second span that is not full, outputs that are no multiple of 64", 3, 1280, 144),
        Case("rows for a wider tile", 18, 384, 64),
    ],
    ids=lambda case: case.name,
)
def test_values(case, interpret):
    x, w, _ = operands(case)
    got = multiply(x, w, interpret=interpret)
    assert got.shape == (case.rows, case.outputs) and got.dtype == jnp.float32
    assert distance(got, block_scaled_matmul_reference(x.astype(jnp.float32), w)) < 1e-6


@pytest.mark.parametrize("name", ["experts", "no_experts"])
def test_values_of_experts(name, interpret):
    x, w, sizes = operands(next(case for case in CASES if case.name == name))
    unread = np.asarray(sizes) == 0
    w = Packed(w.codes, w.block_scales, jnp.where(unread, jnp.nan, w.scale))
    got = multiply_groups(x, w, sizes, interpret=interpret)
    dense = jnp.where(unread[:, None, None], 0, w.dequantize())
    assert distance(got, grouped_matmul(x.astype(jnp.float32), dense, sizes)) < 1e-6
    assert (got[sizes.sum() :] == 0).all()


def test_scales_that_are_nan_give_nan(interpret):
    x, w, _ = operands(Case("", 2, 256, 64))
    scales = np.asarray(w.block_scales).copy()
    scales.view(np.uint8)[5, 3] = 0x7F
    got = multiply(x, Packed(w.codes, jnp.asarray(scales), w.scale), interpret=interpret)
    assert np.isnan(got[:, 5]).all() and np.isfinite(np.delete(got, 5, axis=1)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_of_x(dtype):
    x, w, _ = operands(Case("", 6, 64, 48), dtype)
    y, pull = jax.vjp(lambda x: block_scaled_matmul(x, w), x.reshape(2, 3, 64))
    dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(dtype)
    (dx,) = pull(dy)
    assert y.dtype == dx.dtype == dtype
    want = dy.astype(jnp.float32) @ w.dequantize().T
    assert distance(dx.astype(jnp.float32), want) < (1e-6 if dtype == jnp.float32 else 4e-3)


def test_hopper_gets_the_kernel_for_few_rows():
    def runs(rows, inputs=256, outputs=64, dtype=jnp.bfloat16):
        x, w, _ = operands(Case("", rows, inputs, outputs), dtype)
        with compiling_for("sm_90a"):
            return "mpmd_map" in str(jax.make_jaxpr(block_scaled_matmul)(x, w))

    assert runs(1) and runs(64)
    assert not (runs(65) or runs(1, inputs=320) or runs(1, outputs=48) or runs(1, dtype=jnp.float32))
    x, w, sizes = operands(next(case for case in CASES if case.name == "experts"))
    with compiling_for("sm_90a"):
        assert "mpmd_map" in str(jax.make_jaxpr(grouped_matmul)(x, w, sizes))


@pytest.mark.parametrize(("rows", "chunks"), [(1, 1), (8, 1), (64, 2)])
def test_only_a_kernel_of_several_chunks_waits_for_the_one_before(monkeypatch, rows, chunks):
    made, products = [], block_scaled_matmul_mosaic.lanes.products
    monkeypatch.setattr(block_scaled_matmul_mosaic.lanes, "products", lambda *z: made.append(z) or products(*z))
    x, w, _ = operands(Case("", rows, 1024, 128))
    plan = block_scaled_matmul_mosaic.plan(rows, 1024, 128, 1)
    assert plan.split * plan.groups * plan.units * chunks == 1024 // block_scaled_matmul_mosaic.UNIT
    jax.make_jaxpr(multiply)(x, w)
    ((units, *_, again),) = made
    assert (units, again) == (plan.units, chunks > 1)


def test_a_sharded_program_keeps_to_what_xla_can_shard():
    x, w, _ = operands(Case("", 8, 256, 64))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    inside = jax.shard_map(
        block_scaled_matmul, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows, check_vma=False
    )
    with compiling_for("sm_90a"), jax.set_mesh(mesh):
        assert "mpmd_map" not in str(jax.make_jaxpr(block_scaled_matmul)(x, w))
        assert "mpmd_map" in str(jax.make_jaxpr(inside)(x, w))


def test_operands_that_do_not_fit():
    x, w, _ = operands(Case("", 4, 256, 64))
    with pytest.raises(ValueError, match=r"w must have shape \[K, N\] = \[128, any\], got \[256, 64\]"):
        block_scaled_matmul(x[:, :128], w)
    reason = block_scaled_matmul_mosaic.unfit
    assert reason(x, w, 64) == "" and reason(x, w, 65) == "1 to 64 rows"
    fp8 = Packed(jnp.zeros((64, 256), jnp.float8_e4m3fn), None, w.scale)
    assert reason(x, fp8, 1) == "FP8 weights"
    assert block_scaled_matmul(x, fp8).shape == (4, 64)
