"""What lanes do in products with packed weights, emulated: registers, shared memory, the sum over a cluster."""

from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import block_scaled_matmul_lanes as lanes
from pallas_kernels.block_scaled_matmul import Case, block_scaled_matmul_reference, example_inputs
from pallas_kernels.floats import as_e4m3
from pallas_kernels.nvfp4 import e2m1_value
from pallas_kernels.packed import Packed
from tests.pallas_kernels.emulated_lanes import Machine, Value


def emulate(monkeypatch, case, rows, split, groups, units, *, half_width=False, first_row=0, count=None, nan=None):
    """All blocks, cluster by cluster, of one expert (of two: the second) -> (result, what it should be)."""
    (x, codes, scales, scale, _), _ = example_inputs(case, 1, jnp.bfloat16)
    scales = np.array(scales)
    if nan:
        scales[nan] = 0x7F
    want = block_scaled_matmul_reference(x.astype(jnp.float32), Packed(codes, as_e4m3(jnp.asarray(scales)), scale))
    count = case.rows if count is None else count
    total = case.inputs // lanes.UNIT
    chunks = -(-total // (split * groups * units))
    ragged = total != chunks * split * groups * units
    dtype = np.uint16 if half_width else np.float32
    out = np.full((case.rows, case.outputs), 0x7F7F, dtype)
    pitch = lanes.OUTPUTS // split + 4
    x_bytes = units * rows * lanes.UNIT * 2
    for place in range(0, case.outputs, lanes.OUTPUTS):
        machine = Machine(split, 128 * groups, groups * x_bytes + split * groups * rows * pitch * 4)
        machine.patch(monkeypatch, lanes)
        refs = [machine.place(np.stack([z, z])) for z in (np.asarray(codes), scales)] + [machine.place(np.asarray(x))]
        group = machine.thread // 128
        x_s, sums_s = ("shared", group * x_bytes), ("shared", np.full_like(group, groups * x_bytes))
        first = min(place, case.outputs - lanes.OUTPUTS)
        zero = lanes.mgpu.c(0.0, "f32")
        registers = np.empty((rows // 8, 2), object)
        for i in np.ndindex(registers.shape):
            registers[i] = [zero, zero]
        add = lanes.products(units, total, 2, (case.outputs, case.inputs), ragged, chunks > 1)
        for chunk in range(chunks):
            acc = SimpleNamespace(shape=(lanes.OUTPUTS, rows), registers=registers, layout=None)
            unit = ((machine.block * groups + group) * chunks + chunk) * units
            numbers = [machine.number(z) for z in (1, first, first_row, first_row + count - 1, unit)]
            machine.written[:, : groups * x_bytes] = False
            registers = add(None, acc, *refs, x_s, *numbers).registers
        acc = SimpleNamespace(shape=(lanes.OUTPUTS, rows), registers=registers)
        numbers = [machine.number(float(scale), "f32"), *(machine.number(z) for z in (first, place, first_row, count))]
        end = lanes.finish(groups, split, case.outputs, half_width)
        end(None, acc, sums_s, machine.place(out), *numbers)
    return out, np.asarray(want)


def test_code_and_scale_are_made_of_their_bits_exactly(monkeypatch):
    """NumPy keeps subnormals, as the GPU does, and XLA:CPU does not."""
    scale_codes = np.arange(256, dtype=np.uint32)
    scale_codes = scale_codes[(scale_codes & 0x7F) != 0x7F]
    machine = Machine(1, 254, 0)
    machine.patch(monkeypatch, lanes)

    def numbers(registers):
        return np.stack([r.array.copy().view(ml_dtypes.bfloat16).reshape(-1, 2) for r in registers]).astype(np.float64)

    want = scale_codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    both = lanes._scale_pairs(Value(scale_codes | scale_codes[::-1] << 8, "i32"))
    for pair, scales in zip(numbers(both), (want, want[::-1]), strict=True):
        np.testing.assert_array_equal(pair, np.stack([scales, scales], axis=1) * 2.0**119)
    for first in range(16):
        word = sum((first + i) % 16 << 4 * i for i in range(8))
        weights = numbers(lanes._decode(lanes._i32(word), both[0])) * lanes.LEFT_OVER
        for i, pair in enumerate(weights):
            values = e2m1_value((first + i + np.array([0, 4])) % 16)
            np.testing.assert_array_equal(pair, np.asarray(values) * want[:, None])


@pytest.mark.parametrize(
    ("case", "rows", "split", "groups", "units"),
    [
        (Case("one row", 1, 256, 64), 8, 1, 2, 1),
        (Case("a cluster of two, 16 rows", 13, 1024, 128), 16, 2, 2, 2),
        (Case("a cluster of four", 3, 1024, 64), 8, 4, 1, 2),
        (Case("inputs that do not come out even, outputs that are no multiple of 64", 5, 640, 98), 8, 1, 2, 1),
        (Case("an odd number of outputs", 2, 256, 77), 8, 1, 1, 2),
        (Case("several chunks, x not all at once", 30, 1024, 64), 32, 1, 1, 4),
        (Case("several chunks of 64 rows in a cluster", 61, 1024, 64), 64, 2, 2, 1),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_products(monkeypatch, case, rows, split, groups, units):
    got, want = emulate(monkeypatch, case, rows, split, groups, units)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


def test_rows_of_an_expert_are_all_that_is_written(monkeypatch):
    got, want = emulate(monkeypatch, Case("", 9, 256, 64), 8, 1, 1, 2, first_row=4, count=3)
    np.testing.assert_allclose(got[4:7], want[4:7], rtol=2e-5, atol=1e-4)
    assert (got[:4] == 0x7F7F).all() and (got[7:] == 0x7F7F).all()


def test_bfloat16_is_the_rounded_sum(monkeypatch):
    got, want = emulate(monkeypatch, Case("", 3, 256, 64), 8, 1, 1, 2, half_width=True)
    rounded = (got.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(rounded, want, rtol=2**-8, atol=1e-6)


def test_scales_that_are_nan_give_nan(monkeypatch):
    got, _ = emulate(monkeypatch, Case("", 2, 256, 64), 8, 1, 1, 2, nan=(5, 3))
    assert np.isnan(got[:, 5]).all() and np.isnan(got).sum() == 2


@pytest.mark.parametrize("experts", [1, 2, 31, 33, 512])
def test_tiles_of_experts(monkeypatch, experts):
    rows, rng = 40, np.random.default_rng(experts)
    sizes = np.zeros(experts, np.int32)
    np.add.at(sizes, np.minimum(rng.integers(0, experts, 30), rng.integers(0, experts, 30)), 1)
    owner = np.repeat(np.arange(experts + 1), [*sizes, rows - sizes.sum()])
    machine = Machine(1, 64, 0)
    machine.patch(monkeypatch, lanes)
    covered = []
    for tile in range(40):
        found = lanes.find(experts, rows)(None, machine.place(sizes), machine.number(tile))
        expert, first, count = (int(np.unique(part.registers.item().array.view(np.int32)).item()) for part in found)
        if count > 0:
            assert count <= lanes.GROUP_ROWS and (owner[first : first + count] == expert).all()
            covered += range(first, first + count)
    assert covered == list(range(rows))
