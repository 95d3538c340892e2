"""Names and layouts against the released checkpoints, and leaf by leaf."""

import json

import numpy as np
import pytest

from nemotron_jax import __main__ as front
from nemotron_jax.checkpoint.convert import dry_run
from nemotron_jax.checkpoint.hf import Table, canonical, copy_into, leaf_shapes, tensors_of, to_ours, to_theirs
from nemotron_jax.config import PRESETS, preset
from tests.tiny import TINY


@pytest.mark.parametrize(
    ("name", "count", "nbytes"),
    [
        ("nano", 6243, 63155886464),
        ("lightning", 6513, 65826538624),
        ("super", 42683, 247222108160),
        ("ultra", 51023, 1121049257984),
    ],
)
def test_released_checkpoints(name, count, nbytes, capsys):
    """Tensors and bytes of the released BF16 files; what --dry-run prints says the same."""
    tensors = dry_run(preset(name), None, None)
    assert len({tensor.name for tensor in tensors}) == len(tensors) == count
    assert sum(tensor.nbytes for tensor in tensors) == nbytes
    assert front.run(["convert", f"--dry-run={name}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(name, dtype, tuple(json.loads(shape))) for name, dtype, shape in map(str.split, lines)] == [
        (tensor.name, tensor.dtype, tensor.shape) for tensor in tensors
    ]


def test_names_and_shapes_of_super():
    """As the released Super has them (Megatron-Bridge, nemotron_h_bridge.py)."""
    shapes = {tensor.name: tensor.shape for tensor in dry_run(preset("super"), None, None)}
    expected = {
        "backbone.embeddings.weight": (131072, 4096),
        "backbone.layers.0.norm.weight": (4096,),
        "backbone.layers.0.mixer.in_proj.weight": (18560, 4096),
        "backbone.layers.0.mixer.conv1d.weight": (10240, 1, 4),
        "backbone.layers.0.mixer.conv1d.bias": (10240,),
        "backbone.layers.0.mixer.dt_bias": (128,),
        "backbone.layers.0.mixer.A_log": (128,),
        "backbone.layers.0.mixer.D": (128,),
        "backbone.layers.0.mixer.norm.weight": (8192,),
        "backbone.layers.0.mixer.out_proj.weight": (4096, 8192),
        "backbone.layers.7.mixer.q_proj.weight": (4096, 4096),
        "backbone.layers.7.mixer.k_proj.weight": (256, 4096),
        "backbone.layers.7.mixer.v_proj.weight": (256, 4096),
        "backbone.layers.7.mixer.o_proj.weight": (4096, 4096),
        "backbone.layers.1.mixer.gate.weight": (512, 4096),
        "backbone.layers.1.mixer.gate.e_score_correction_bias": (512,),
        "backbone.layers.1.mixer.experts.511.up_proj.weight": (2688, 1024),
        "backbone.layers.1.mixer.experts.0.down_proj.weight": (1024, 2688),
        "backbone.layers.1.mixer.shared_experts.up_proj.weight": (5376, 4096),
        "backbone.layers.1.mixer.shared_experts.down_proj.weight": (4096, 5376),
        "backbone.layers.1.mixer.fc1_latent_proj.weight": (1024, 4096),
        "backbone.layers.1.mixer.fc2_latent_proj.weight": (4096, 1024),
        "backbone.norm_f.weight": (4096,),
        "lm_head.weight": (131072, 4096),
        "mtp.layers.0.enorm.weight": (4096,),
        "mtp.layers.0.hnorm.weight": (4096,),
        "mtp.layers.0.eh_proj.weight": (4096, 8192),
        "mtp.layers.0.norm.weight": (4096,),
        "mtp.layers.0.mixer.q_proj.weight": (4096, 4096),
        "mtp.layers.1.norm.weight": (4096,),
        "mtp.layers.1.mixer.experts.7.up_proj.weight": (2688, 1024),
        "mtp.layers.1.final_layernorm.weight": (4096,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    float32 = {tensor.name for tensor in dry_run(preset("super"), None, None) if tensor.dtype == "F32"}
    assert float32 == {name for name in shapes if name.endswith("e_score_correction_bias")}
    assert len(float32) == 41


@pytest.mark.parametrize("name", [*PRESETS, "tiny"])
def test_every_element_has_one_place(name):
    config = TINY if name == "tiny" else PRESETS[name]
    table = Table(config)
    assert set(table.of_leaf) == set(leaf_shapes(config))
    on_disk = sum(int(np.prod(entry.shape)) for entry in table.entries.values())
    assert on_disk == sum(int(np.prod(shape)) for shape in table.shapes.values())


def test_layouts():
    table = Table(TINY)
    for entry in table.entries.values():
        rows = np.arange(np.prod(entry.shape)).reshape(entry.shape).astype(np.float32)
        ours = to_ours(entry, rows)
        np.testing.assert_array_equal(to_theirs(entry, ours), rows)
        shape = table.shapes[entry.leaves[0]]
        if len(entry.leaves) == 1:
            assert ours.shape == (shape if entry.expert is None else shape[1:]), entry
    assert table.entries["backbone.layers.0.mixer.in_proj.weight"].leaves == tuple(
        f"layers/0/mixer/in_proj/{part}" for part in ("z", "x", "B", "C", "dt")
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (130, 131)])
def test_copies_of_transposed_matrices(shape):
    import ml_dtypes

    matrix = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)
    target = np.zeros(shape[::-1], ml_dtypes.bfloat16)
    copy_into(target, matrix.T)
    assert target.tobytes() == np.ascontiguousarray(matrix.T).tobytes()
    wide = np.zeros(shape[::-1], np.float32)
    copy_into(wide, matrix.T)
    np.testing.assert_array_equal(wide, matrix.T.astype(np.float32))


def test_transformers_5_names():
    assert canonical("model.layers.3.norm.weight") == "backbone.layers.3.norm.weight"
    assert canonical("lm_head.weight") == "lm_head.weight"


def test_dry_run_of_a_format(capsys):
    """A Super quantised by its published map: 40,961 NVFP4 and 139 FP8 modules, and an FP8 cache in 8 layers."""
    assert front.run(["convert", "--dry-run=super", "--format=nvfp4"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    suffixes = [name.rpartition(".")[2] for name, _, _ in lines]
    assert suffixes.count("weight_scale_2") == 40961 and suffixes.count("weight_scale") == 40961 + 139
    assert suffixes.count("k_scale") == suffixes.count("v_scale") == 8
    assert ["backbone.layers.1.mixer.experts.0.up_proj.weight", "U8", "[2688,512]"] in lines


def test_tensors_of_a_plain_entry():
    table = Table(TINY)
    bias = next(entry for entry in table.entries.values() if entry.is_float32)
    assert [tensor.dtype for tensor in tensors_of(bias, None, "BF16")] == ["F32"]
