"""Quantisation configs in every spelling, and one module's tensors."""

import json
from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from nemotron_jax.checkpoint.layer_map import default_layer_map
from nemotron_jax.checkpoint.modelopt import (
    HF_QUANT_CONFIG,
    QuantConfig,
    Scheme,
    dequantize,
    fill_expert_scales,
    parse_quant_config,
    quantize,
    read_quant_config,
)
from nemotron_jax.config import preset
from nemotron_jax.errors import CheckpointError, ConfigError
from tests.tiny import TINY

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
UP = "backbone.layers.1.mixer.experts.{}.up_proj"


def modules_of(config):
    """Every linear module of a model, as on disk."""
    for layer, letter in enumerate(config.pattern):
        mixer = f"backbone.layers.{layer}.mixer"
        if letter == "M":
            yield from (f"{mixer}.in_proj", f"{mixer}.out_proj", f"{mixer}.conv1d", f"{mixer}.norm")
        elif letter == "*":
            yield from (f"{mixer}.{name}_proj" for name in "qkvo")
        elif letter == "E":
            yield f"{mixer}.gate"
            yield from (f"{mixer}.{name}" for name in ("fc1_latent_proj", "fc2_latent_proj"))
            parents = ["shared_experts", *(f"experts.{e}" for e in range(config.moe.num_experts))]
            yield from (f"{mixer}.{parent}.{name}_proj" for parent in parents for name in ("up", "down"))
    yield from ("backbone.embeddings", "backbone.norm_f", "lm_head", "mtp.layers.0.eh_proj")
    yield from ("mtp.layers.0.mixer.q_proj", "mtp.layers.1.mixer.experts.0.up_proj")


def algos(quant, config):
    return {module: scheme.algo for module in modules_of(config) if (scheme := quant.scheme(module))}


def test_the_published_map_of_super():
    config = preset("super")
    found = algos(default_layer_map(config, "nvfp4"), config)
    assert Counter(found.values()) == {"FP8": 139, "NVFP4": 40_961} and len(found) == 41_100
    kinds = Counter((module.rpartition(".")[2], "shared" in module, algo) for module, algo in found.items())
    assert kinds == {
        ("up_proj", False, "NVFP4"): 20_480,
        ("down_proj", False, "NVFP4"): 20_480,
        ("in_proj", False, "FP8"): 28,
        ("out_proj", False, "FP8"): 29,
        ("up_proj", True, "FP8"): 39,
        ("down_proj", True, "FP8"): 37,
        ("down_proj", True, "NVFP4"): 1,
        ("fc1_latent_proj", False, "FP8"): 3,
        ("fc2_latent_proj", False, "FP8"): 1,
        ("o_proj", False, "FP8"): 2,
    }
    assert len(default_layer_map(config, "nvfp4").layers) == 41_100  # no name that the model does not have


def test_the_published_map_of_nano():
    config = preset("nano")
    for format, algo in (("nvfp4", "NVFP4"), ("fp8", "FP8")):
        found = algos(default_layer_map(config, format), config)
        assert set(found.values()) == {algo}
        left_out = {module for module in modules_of(config) if module.endswith("_proj")} - set(found)
        left_out = {module for module in left_out if "mtp" not in module and "latent" not in module}
        projections = {f"backbone.layers.{i}.mixer.{p}_proj" for i in (4, 11, 18, 25, 32, 41) for p in ("in", "out")}
        attention = {f"backbone.layers.{i}.mixer.{p}_proj" for i in (5, 12, 19, 26, 33, 42) for p in "qkvo"}
        assert left_out == projections | attention


def test_rules_for_other_sizes():
    ultra = preset("ultra")
    found = algos(default_layer_map(ultra, "nvfp4"), ultra)
    letters = Counter(ultra.pattern)
    assert Counter(found.values()) == {
        "NVFP4": letters["E"] * ultra.moe.num_experts * 2,
        "FP8": 2 * letters["E"] + 2 * letters["M"],
    }
    scheme = default_layer_map(ultra, "nvfp4").scheme(UP.format(3))
    assert scheme.four_over_six and not default_layer_map(preset("super"), "nvfp4").scheme(UP.format(3)).four_over_six
    fp8 = algos(default_layer_map(TINY, "fp8"), TINY)
    assert set(fp8.values()) == {"FP8"} and not [m for m in fp8 if "latent" in m or "q_proj" in m or "mtp" in m]
    assert len(fp8) == 2 * 2 + 2 * (8 + 1)
    with pytest.raises(ConfigError, match="got 'int8'"):
        default_layer_map(TINY, "int8")


@pytest.mark.parametrize("name", ["super", "nano", "nano-4b", "quickstart"])
@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_both_files_say_the_same_and_come_back(name, format, tmp_path):
    config = preset(name)
    quant = default_layer_map(config, format)
    written = json.loads(json.dumps(quant.to_json()))
    for part in written.values():
        again = parse_quant_config(part)
        assert algos(again, config) == algos(quant, config)
        assert (again.algo, again.exclude, again.kv_cache) == (quant.algo, quant.exclude, quant.kv_cache)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(written["hf_quant_config.json"]))
    assert read_quant_config(tmp_path).algo == quant.algo
    # config.json may leave the map to the other file
    entry = {key: value for key, value in written["quantization_config"].items() if key != "quantized_layers"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    assert algos(read_quant_config(tmp_path), config) == algos(quant, config)


def test_files_that_contradict_each_other(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_algo": "FP8"}}))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(CheckpointError, match=r"config.json says quant_algo='FP8'.* says 'NVFP4'"):
        read_quant_config(tmp_path)


def test_a_directory_in_full_precision(tmp_path):
    assert read_quant_config(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert read_quant_config(tmp_path) is None


@pytest.mark.parametrize(
    ("glob", "module", "excluded"),
    [
        ("lm_head", "lm_head", True),
        ("backbone.layers.1*", "backbone.layers.1.mixer.in_proj", True),
        ("backbone.layers.1*", "backbone.layers.12.mixer.in_proj", True),  # as fnmatch has it
        ("backbone.layers.1.*", "backbone.layers.12.mixer.in_proj", False),
        ("backbone.layers.1.mixer", "backbone.layers.1.mixer.in_proj", True),
        ("backbone.layers.1.mix", "backbone.layers.1.mixer.in_proj", False),
        ("*.in_proj", "backbone.layers.1.mixer.in_proj", True),
        ("model.layers.1.*", "backbone.layers.1.mixer.in_proj", True),
        ("backbone.layers.1.*", "model.layers.1.mixer.in_proj", True),
        ("re:.*layers\\.[0-3]\\..*in_proj", "backbone.layers.1.mixer.in_proj", True),
        ("re:model\\.layers\\.1\\.", "backbone.layers.1.mixer.in_proj", True),
        ("re:in_proj", "backbone.layers.1.mixer.in_proj", False),
        ("*IN_PROJ", "backbone.layers.1.mixer.in_proj", False),
    ],
)
def test_excluded_modules(glob, module, excluded):
    assert (QuantConfig("FP8", exclude=(glob,)).scheme(module) is None) == excluded


def test_only_projections_are_quantised():
    quant = QuantConfig("NVFP4")
    for module in ("backbone.embeddings", "backbone.layers.0.mixer.conv1d", "backbone.layers.1.mixer.gate", "norm_f"):
        assert quant.scheme(module) is None
    assert quant.scheme("lm_head").algo == "NVFP4"


def test_a_mixed_map_may_name_a_parent():
    values = {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "model.layers.1.mixer.experts": {"quant_algo": "NVFP4", "group_size": 16},
            "backbone.layers.1.mixer.experts.3.up_proj": {"quant_algo": "FP8"},
        },
        "ignore": ["*.5.up_proj"],
    }
    quant = parse_quant_config(values)
    assert quant.scheme(UP.format(2)).algo == "NVFP4"
    assert quant.scheme(UP.format(3)).algo == "FP8"
    assert quant.scheme(UP.format(5)) is None
    assert quant.scheme("backbone.layers.1.mixer.shared_experts.up_proj") is None


def test_weights_alone():
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}}
    quant = parse_quant_config({"quant_algo": "NVFP4", "config_groups": groups, "kv_cache_scheme": None})
    assert quant.algo == "W4A16_NVFP4" and quant.kv_cache is None
    assert "input_scale" not in quant.scheme(UP.format(0)).tensors("m", (8, 32))
    groups["group_0"]["input_activations"] = {"num_bits": 4}
    assert parse_quant_config({"quant_algo": "NVFP4", "config_groups": groups}).algo == "NVFP4"
    assert parse_quant_config({"quantization": {"quant_algo": "W4A16_NVFP4"}}).algo == "W4A16_NVFP4"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_algo": "NVFP44"}, "quant_algo is 'NVFP44'.*Did you mean 'NVFP4'"),
        ({"quant_algo": "NVFP4_AWQ"}, "quant_algo is 'NVFP4_AWQ': this version reads FP8, NVFP4"),
        ({"quant_algo": "MIXED_PRECISION"}, "names no layer"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"m": {"quant_algo": "W8A16"}}}, "of m is 'W8A16'"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"m": "FP8"}}, "an object for m"),
        ({"quant_algo": "NVFP4", "group_size": 32}, "blocks of 16"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "'NVFP4' key/value cache"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format pack-quantized cannot be read"),
        ({"quant_algo": "FP8", "config_groups": ["a"]}, "config_groups"),
        ({"quant_algo": "FP8", "config_groups": {"a": {"weights": "x"}}}, "config_groups"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq': this version reads modelopt"),
        ({"quant_algo": "FP8", "ignore": "lm_head"}, "ignore .* a list of names, got 'lm_head'"),
        ({"quant_algo": "FP8", "exclude_modules": [1]}, "exclude_modules .* a list of names"),
        ({"quant_algo": "FP8", "ignore": ["re:("]}, r"ignore .* has 're:\('"),
        ({"quant_algo": "FP8", "producer": "modelopt"}, "producer .* should be an object"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": ["m"]}, "quantized_layers .* should be an object"),
    ],
)
def test_what_cannot_be_read(values, message):
    for spelling in (values, {"quantization": values}):
        with pytest.raises(CheckpointError, match=message):
            parse_quant_config(spelling)


@pytest.mark.parametrize("value", ["FP8", ["FP8"], {"quantization": "FP8"}, {"quantization": None}])
def test_what_is_no_object(value, tmp_path):
    with pytest.raises(CheckpointError, match="should be an object"):
        parse_quant_config(value)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_algo": "FP8"}}')
    (tmp_path / HF_QUANT_CONFIG).write_text(json.dumps({"quantization": value}))
    with pytest.raises(CheckpointError):
        read_quant_config(tmp_path)


def test_no_algorithm_is_full_precision():
    assert parse_quant_config({"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}) is None


@pytest.mark.parametrize("scheme", [Scheme("FP8"), Scheme("NVFP4"), Scheme("W4A16_NVFP4"), Scheme("NVFP4", True)])
def test_declared_tensors(scheme, rng=np.random.default_rng(0)):  # noqa: B008
    declared = scheme.tensors("m", (6, 64))
    if not scheme.compressed:
        tensors = quantize(scheme, rng.normal(size=(6, 64)).astype(ml_dtypes.bfloat16), input_amax=3.0)
        assert {suffix: (array.dtype, array.shape) for suffix, array in tensors.items()} == declared
    else:
        assert declared == {
            "weight_packed": (np.dtype(np.uint8), (6, 32)),
            "weight_scale": (E4M3, (6, 4)),
            "weight_global_scale": (np.dtype(np.float32), (1,)),
            "input_global_scale": (np.dtype(np.float32), (1,)),
        }


def test_a_width_that_is_no_multiple_of_16():
    with pytest.raises(CheckpointError, match=r"m.up_proj has 24 inputs; NVFP4 needs a multiple of 16"):
        Scheme("NVFP4").tensors("m.up_proj", (6, 24))
    assert Scheme("FP8").tensors("m.up_proj", (6, 24))["weight"] == (E4M3, (6, 24))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_of_either_shape_and_both_sets_of_names(shape, rng=np.random.default_rng(1)):  # noqa: B008
    weight = rng.normal(size=(5, 48)).astype(np.float32)
    for scheme, worst in ((Scheme("FP8"), 2**-4), (Scheme("NVFP4"), 1 / 6 + 2**-4)):
        tensors = {
            suffix: array.reshape(shape) if array.ndim == 0 else array
            for suffix, array in quantize(scheme, weight, input_amax=1.0).items()
        }
        back = dequantize(scheme, tensors)
        assert back.dtype == np.float32 and back.shape == weight.shape
        largest = np.abs(weight).reshape(5, 3, 16).max(-1).repeat(16, axis=-1).reshape(5, 48)
        assert (np.abs(back - weight) <= worst * (largest if scheme.algo == "NVFP4" else np.abs(weight) + 1e-3)).all()
        if scheme.algo == "NVFP4":
            renamed = {
                "weight_packed": tensors["weight"],
                "weight_scale": tensors["weight_scale"],
                "weight_global_scale": 1 / tensors["weight_scale_2"],
            }
            np.testing.assert_allclose(dequantize(Scheme("NVFP4", True), renamed), back, rtol=1e-6)


def test_activation_scales():
    weight = np.ones((2, 16), np.float32)
    assert quantize(Scheme("NVFP4"), weight, input_amax=10.0)["input_scale"] == np.float32(10) / np.float32(6 * 448)
    assert quantize(Scheme("FP8"), weight, input_amax=10.0)["input_scale"] == np.float32(10) / np.float32(448)
    for bad in (None, 0.0, float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="calibration"):
            quantize(Scheme("NVFP4"), weight, input_amax=bad)
    assert "input_scale" not in quantize(Scheme("W4A16_NVFP4"), weight)


def test_experts_that_nobody_visited():
    scales = {UP.format(e): value for e, value in enumerate((1.0, None, 3.0, 0.0, float("nan")))}
    scales |= {UP.format(1).replace("up_proj", "down_proj"): 9.0, "backbone.layers.2.mixer.in_proj": 5.0}
    scales |= {UP.format(7).replace("layers.1", "layers.3"): 8.0}
    filled = fill_expert_scales(scales)
    assert [filled[UP.format(e)] for e in range(5)] == [1.0, 3.0, 3.0, 3.0, 3.0]
    assert filled["backbone.layers.2.mixer.in_proj"] == 5.0
    with pytest.raises(CheckpointError, match=r"1 modules have no activation scale, the first is .*layers.4"):
        fill_expert_scales({**scales, UP.format(0).replace("layers.1", "layers.4"): None})
    with pytest.raises(CheckpointError, match=r"the first is lm_head"):
        fill_expert_scales({**scales, "lm_head": None})
