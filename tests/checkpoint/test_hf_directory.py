"""Reading Hugging Face directories: both spellings, and one report with everything that is wrong."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from nemotron_jax.checkpoint.hf import STACKED, canonical
from nemotron_jax.checkpoint.hf_directory import HFDirectory
from nemotron_jax.checkpoint.layer_map import default_layer_map
from nemotron_jax.checkpoint.modelopt import HF_QUANT_CONFIG
from nemotron_jax.checkpoint.report import is_finite
from nemotron_jax.checkpoint.safetensors import DTYPES, INDEX_FILE, NAMES, ShardWriter, Tensor
from nemotron_jax.config import MTPConfig
from nemotron_jax.errors import CheckpointError
from nemotron_jax.hf_config import to_hf
from tests.checkpoint import hf_files
from tests.tiny import TINY

SMALL = dataclasses.replace(TINY, pattern="ME*-")
# Widths that NVFP4 can divide into blocks of 16.
EVEN = dataclasses.replace(SMALL, moe=dataclasses.replace(TINY.moe, intermediate_size=32, shared_intermediate_size=48))


@pytest.fixture
def weights():
    return hf_files.random_weights(SMALL)


def save(directory, arrays, config=None):
    """Any tensors under any names, and a config.json."""
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, [Tensor(name, NAMES[x.dtype], x.shape) for name, x in arrays.items()])
    for name, array in arrays.items():
        writer.write(name, array)
    writer.finish()
    (directory / "config.json").write_text(json.dumps(to_hf(SMALL) if config is None else config))
    return directory


def faults(directory):
    """The lines of the report on a bad directory."""
    with pytest.raises(CheckpointError) as caught:
        HFDirectory(directory)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{directory} has {len(lines)} fault"), str(caught.value)
    return [line.strip() for line in lines]


def test_leaves_are_the_tensors_in_our_layout(tmp_path, weights):
    source = HFDirectory(hf_files.write(tmp_path / "hf", SMALL, weights))
    whole = {path: source.leaf(path, [slice(None)] * len(shape)) for path, shape in source.table.shapes.items()}
    assert {path: leaf.shape for path, leaf in whole.items()} == source.table.shapes

    def equal(path, expected):
        np.testing.assert_array_equal(whole[path], expected)

    mixer = "backbone.layers.0.mixer"
    equal("embeddings/weight", weights["backbone.embeddings.weight"])
    equal("lm_head/weight", weights["lm_head.weight"].T)
    sizes = np.cumsum([0, 32, 32, 16, 16, 4])  # z, x, B, C, dt
    for part, first, last in zip(("z", "x", "B", "C", "dt"), sizes, sizes[1:], strict=False):
        equal(f"layers/0/mixer/in_proj/{part}", weights[f"{mixer}.in_proj.weight"][first:last].T)
    equal("layers/0/mixer/conv1d/weight/B", weights[f"{mixer}.conv1d.weight"][32:48, 0])
    equal("layers/0/mixer/conv1d/bias/C", weights[f"{mixer}.conv1d.bias"][48:])
    equal("layers/0/mixer/D", weights[f"{mixer}.D"])
    experts = [weights[f"backbone.layers.1.mixer.experts.{expert}.up_proj.weight"].T for expert in range(8)]
    equal("layers/1/mixer/experts/up_proj", np.stack(experts))
    equal("layers/1/mixer/gate/weight", weights["backbone.layers.1.mixer.gate.weight"].T)
    bias = "layers/1/mixer/gate/e_score_correction_bias"
    equal(bias, weights["backbone.layers.1.mixer.gate.e_score_correction_bias"])
    assert whole[bias].dtype == np.float32 and whole["norm_f/weight"].dtype == ml_dtypes.bfloat16
    equal("mtp/eh_proj/weight", weights["mtp.layers.0.eh_proj.weight"].T)
    equal("mtp/layers/1/mixer/experts/down_proj", np.stack(
        [weights[f"mtp.layers.1.mixer.experts.{expert}.down_proj.weight"].T for expert in range(8)]
    ))  # fmt: skip
    equal("mtp/final_layernorm/weight", weights["mtp.layers.1.final_layernorm.weight"])


def test_parts_of_leaves(tmp_path, weights):
    source = HFDirectory(hf_files.write(tmp_path / "hf", SMALL, weights))
    rng = np.random.default_rng(0)
    for path, shape in source.table.shapes.items():
        whole = source.leaf(path, [slice(None)] * len(shape))
        bounds = [sorted(rng.choice(size + 1, 2, replace=False)) for size in shape]
        index = tuple(slice(int(low), int(high)) for low, high in bounds)
        np.testing.assert_array_equal(source.leaf(path, index), whole[index], err_msg=path)


def test_the_names_and_stacked_experts_of_transformers_5(tmp_path, weights):
    """The same values, whether experts are one tensor or many."""
    arrays, stacks = {}, {}
    for name, array in weights.items():
        renamed = name.replace("backbone.", "model.")
        if ".experts." in name:
            stem, _, expert, projection, _ = renamed.rsplit(".", 4)
            stacks.setdefault(f"{stem}.experts.{projection}", {})[int(expert)] = array
        else:
            arrays[renamed] = array
    arrays |= {name: np.stack([stack[e] for e in range(8)]) for name, stack in stacks.items()}
    assert all(STACKED.match(canonical(name)) for name in stacks) and stacks
    source = HFDirectory(save(tmp_path / "v5", arrays))
    plain = HFDirectory(hf_files.write(tmp_path / "hf", SMALL, weights))
    assert source.stored.keys() == plain.stored.keys()
    for path, shape in source.table.shapes.items():
        index = [slice(None)] * len(shape)
        np.testing.assert_array_equal(source.leaf(path, index), plain.leaf(path, index))


def test_mtp_that_the_config_does_not_count(tmp_path, weights):
    """transformers writes num_nextn_predict_layers 0 beside a list of blocks; tensors that are there are not lost."""
    values = to_hf(SMALL, layer_lists=True) | {"num_nextn_predict_layers": 0}
    source = HFDirectory(save(tmp_path / "with", weights, values))
    assert source.config.mtp is not None and source.config.mtp.pattern == "*E"
    without = {name: array for name, array in weights.items() if not name.startswith("mtp.")}
    assert HFDirectory(save(tmp_path / "without", without, values)).config.mtp is None


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_quantised_modules_are_dequantised(tmp_path, format):
    weights = hf_files.random_weights(EVEN)
    quant = default_layer_map(EVEN, format)
    source = HFDirectory(hf_files.write(tmp_path / "hf", EVEN, weights, quant))
    leaf = source.leaf("layers/1/mixer/experts/up_proj", [slice(2, 5), slice(None), slice(3, 20)])
    expected = np.stack([weights[f"backbone.layers.1.mixer.experts.{e}.up_proj.weight"].T[:, 3:20] for e in (2, 3, 4)])
    assert leaf.dtype == np.float32 and not (leaf == expected).all()
    assert np.abs(leaf - expected.astype(np.float32)).max() < (0.02 if format == "fp8" else 0.08)
    # A part is the part of the whole.
    whole = source.leaf("layers/1/mixer/experts/up_proj", [slice(None)] * 3)
    np.testing.assert_array_equal(leaf, whole[2:5, :, 3:20])


# What is wrong


def test_missing_surplus_misnamed_shape_and_dtype_in_one_report(tmp_path, weights):
    del weights["backbone.norm_f.weight"]
    weights["backbone.layers.2.mixer.qproj.weight"] = weights.pop("backbone.layers.2.mixer.q_proj.weight")
    weights["extra"] = np.zeros(3, np.float32)
    weights["lm_head.weight"] = weights["lm_head.weight"].T.copy()
    weights["backbone.layers.0.mixer.D"] = np.zeros(4, np.int32)
    gate = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    weights[gate] = weights[gate].astype(ml_dtypes.bfloat16)
    nan = weights["backbone.layers.3.mixer.up_proj.weight"]
    nan[3, 5] = np.nan
    weights["backbone.embeddings.weight"][0, 0] = -np.inf
    lines = faults(save(tmp_path / "hf", weights))
    assert sorted(lines) == sorted(
        [
            "backbone.norm_f.weight is missing.",
            "backbone.layers.2.mixer.qproj.weight is no tensor of this model; "
            "backbone.layers.2.mixer.q_proj.weight is missing.",
            "extra is no tensor of this model.",
            "lm_head.weight has shape [32, 64], expected [64, 32].",
            "backbone.layers.0.mixer.D is I32, expected BF16 or F16 or F32.",
            f"{gate} is BF16, expected F32.",
            "backbone.layers.3.mixer.up_proj.weight holds NaN or infinity.",
            "backbone.embeddings.weight holds NaN or infinity.",
        ]
    )


def test_missing_and_damaged_shards(tmp_path):
    directory = hf_files.write(tmp_path / "hf", SMALL, max_shard=30_000)
    shards = sorted(directory.glob("*.safetensors"))
    held = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    shards[0].unlink()
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-100])
    shards[2].write_bytes(shards[2].read_bytes()[:4])
    lines = faults(directory)
    count = sum(name == shards[0].name for name in held.values())
    assert lines[0] == f"{shards[0].name} is missing: {count} tensors."
    assert lines[1].startswith(f"{shards[1].name}: the file is truncated")
    assert lines[2].startswith(f"{shards[2].name} is truncated")
    assert len(lines) == 3


def test_a_missing_shard_without_an_index(tmp_path):
    directory = hf_files.write(tmp_path / "hf", SMALL, max_shard=30_000)
    (directory / INDEX_FILE).unlink()
    HFDirectory(directory)
    sorted(directory.glob("*.safetensors"))[-1].unlink()
    (line,) = faults(directory)
    assert line.endswith("is missing.")


def test_an_index_that_says_something_else(tmp_path):
    directory = hf_files.write(tmp_path / "hf", SMALL, max_shard=30_000)
    index = json.loads((directory / INDEX_FILE).read_text())
    name = "backbone.norm_f.weight"
    index["weight_map"][name] = "model-00001-of-00002.safetensors"
    (directory / INDEX_FILE).write_text(json.dumps(index))
    lines = faults(directory)
    assert any(f"{name} is in " in line for line in lines)
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}'):
        (directory / INDEX_FILE).write_text(text)
        assert f"{INDEX_FILE} is damaged: an object with a weight_map was expected." in faults(directory)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    assert f"{'x' * 300} is missing: 1 tensors." in faults(directory)


def test_faults_come_in_the_order_of_the_model(tmp_path, weights):
    narrow = {name: array.astype(np.float64) for name, array in weights.items()}
    found = [line.split()[0] for line in faults(save(tmp_path / "hf", narrow)) if " is F64" in line]
    assert found == list(weights)[: len(found)] and len(found) > 20


def test_a_layer_number_that_is_none(tmp_path, weights):
    weights["backbone.layers.².mixer.in_proj.weight"] = weights.pop("lm_head.weight")
    assert any("layers.².mixer.in_proj.weight is no tensor" in line for line in faults(save(tmp_path / "hf", weights)))


def test_a_pattern_that_is_not_that_of_the_tensors(tmp_path, weights):
    """One line a layer, not one a tensor."""
    values = to_hf(dataclasses.replace(SMALL, pattern="EM*-"))
    assert faults(save(tmp_path / "a", weights, values)) == [
        "backbone.layers.0: the tensors are those of Mamba-2, config.json says mixture of experts.",
        "backbone.layers.1: the tensors are those of mixture of experts, config.json says Mamba-2.",
    ]
    values = to_hf(dataclasses.replace(SMALL, pattern="ME*"))
    (line,) = faults(save(tmp_path / "b", weights, values))
    assert line == "backbone.layers.3: the tensors are those of dense MLP, config.json says there are 3 layers."
    values = to_hf(dataclasses.replace(SMALL, mtp=MTPConfig("E*")))
    assert len([line for line in faults(save(tmp_path / "c", weights, values)) if line.startswith("mtp.layers")]) >= 2
    # A quantised file whose config does not say so is of the right kind all the same.
    quant = default_layer_map(EVEN, "nvfp4")
    directory = hf_files.write(tmp_path / "d", EVEN, quant=quant, values=to_hf(EVEN))
    (directory / HF_QUANT_CONFIG).unlink()
    (directory / "config.json").write_text(json.dumps(to_hf(EVEN)))
    assert not [line for line in faults(directory) if "the tensors are those of" in line]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "config.json has model_type='llama'"),
        ({"hybrid_override_pattern": "MEX*"}, "unknown letter 'X'"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "INT3"}}, "quant_algo is 'INT3'"),
    ],
)
def test_configs_that_cannot_be_used(tmp_path, weights, change, message):
    """Together with what is wrong with the files."""
    weights["backbone.embeddings.weight"][0, 0] = np.nan
    lines = faults(save(tmp_path / "hf", weights, to_hf(SMALL) | change))
    assert any(message in line for line in lines), lines
    assert "backbone.embeddings.weight holds NaN or infinity." in lines


def test_no_config_and_no_files(tmp_path):
    (tmp_path / "config.json").write_text("{")
    lines = faults(tmp_path)
    assert lines[0].startswith("config.json is not JSON") and "no safetensors files" in lines[1]


def test_tensors_of_quantised_modules_are_checked(tmp_path):
    quant = default_layer_map(EVEN, "nvfp4")
    directory = hf_files.write(tmp_path / "hf", EVEN, quant=quant)
    arrays = {
        name: np.frombuffer(data, DTYPES[dtype]).reshape(shape).copy()
        for name, (dtype, shape, data) in hf_files.read(directory).items()
    }
    module = "backbone.layers.1.mixer.experts.3.up_proj"
    del arrays[f"{module}.weight_scale_2"]
    del arrays["backbone.layers.1.mixer.experts.4.up_proj.input_scale"]  # of an expert that was never routed to: fine
    arrays[f"{module}.weight_scale"][0, 0] = np.nan
    arrays["backbone.layers.1.mixer.experts.5.up_proj.weight"] = np.zeros((32, 16), np.uint8)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    config = json.loads((directory / "config.json").read_text())
    assert sorted(faults(save(directory, arrays, config))) == [
        "backbone.layers.1.mixer.experts.3.up_proj.weight_scale holds NaN or infinity.",
        "backbone.layers.1.mixer.experts.3.up_proj.weight_scale_2 is missing.",
        "backbone.layers.1.mixer.experts.5.up_proj.weight has shape [32, 16], expected [32, 8].",
    ]


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F8_E4M3", "F8_E5M2", "F64"])
def test_finite(name):
    dtype = DTYPES[name]
    array = np.ones((600, 700), dtype)
    array[0, :3] = [ml_dtypes.finfo(dtype).min, 0, ml_dtypes.finfo(dtype).tiny]
    assert is_finite(array) and is_finite(np.zeros((0, 3), dtype)) and is_finite(np.ones((), dtype))
    for bad in [np.nan, -np.nan] + ([np.inf, -np.inf] if name != "F8_E4M3" else []):
        array[599, 650] = bad
        assert not is_finite(array)
    assert is_finite(np.full(3, 255, np.uint8))
