"""Conversion in both directions: bit for bit, with everything beside the weights, or not at all."""

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax
from nemotron_jax import __main__ as front
from nemotron_jax.checkpoint import companions
from nemotron_jax.checkpoint import convert as converting
from nemotron_jax.checkpoint.convert import Calibration, convert, dry_run
from nemotron_jax.checkpoint.hf import Table
from nemotron_jax.checkpoint.hf_directory import HFDirectory
from nemotron_jax.checkpoint.layer_map import default_layer_map
from nemotron_jax.checkpoint.modelopt import HF_QUANT_CONFIG, QuantConfig, Scheme, quantize, read_quant_config
from nemotron_jax.checkpoint.safetensors import DTYPES, INDEX_FILE
from nemotron_jax.config import same_network
from nemotron_jax.errors import CheckpointError, UserError
from nemotron_jax.hf_config import from_hf, to_hf
from tests.checkpoint import hf_files
from tests.checkpoint.test_hf_directory import EVEN, SMALL, save
from tests.tiny import TINY

TOKENS = jnp.arange(24).reshape(2, 12) % 64


@pytest.fixture
def hf(tmp_path):
    return hf_files.write(tmp_path / "hf", TINY)


def logits(path):
    return np.asarray(nemotron_jax.load(path)[1](TOKENS).logits)


@pytest.mark.parametrize("block_bytes", [1 << 26, 500])
def test_there_and_back_is_bit_identical(tmp_path, hf, monkeypatch, block_bytes):
    """Whether a tensor is one block or many."""
    monkeypatch.setattr(converting, "BLOCK_BYTES", block_bytes)
    done = convert(hf, tmp_path / "run")
    assert done.nbytes == sum(len(data) for _, _, data in hf_files.read(hf).values())
    convert(tmp_path / "run", tmp_path / "back")
    assert hf_files.read(tmp_path / "back") == hf_files.read(hf)
    np.testing.assert_array_equal(logits(hf), logits(tmp_path / "run"))
    index = json.loads((tmp_path / "back" / INDEX_FILE).read_text())
    assert index["weight_map"].keys() == hf_files.read(hf).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "run"]


def test_zeros_of_either_sign_and_subnormals(tmp_path):
    weights = hf_files.random_weights(SMALL)
    weights["lm_head.weight"][:] = -0.0
    weights["backbone.norm_f.weight"][:] = 0.0
    weights["backbone.layers.0.mixer.D"][:] = [1e-40, -1e-40, -0.0, 3e38]
    hf = hf_files.write(tmp_path / "hf", SMALL, weights)
    convert(hf, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert hf_files.read(tmp_path / "back") == hf_files.read(hf)


def test_compressed_tensors(tmp_path):
    """nvfp4-pack-quantized: other names, and the reciprocal of the global scale; read, and passed through."""
    quant = QuantConfig("NVFP4", exclude=("mtp*", "lm_head"))
    hf = hf_files.write(tmp_path / "hf", EVEN, quant=quant)
    arrays = {}
    for name, (dtype, shape, data) in hf_files.read(hf).items():
        array = np.frombuffer(data, DTYPES[dtype]).reshape(shape)
        stem, _, suffix = name.rpartition(".")
        if suffix in ("weight_scale_2", "input_scale"):
            suffix = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}[suffix]
            array = np.float32(1) / array.reshape(1)
        elif dtype == "U8":
            suffix = "weight_packed"
        arrays[f"{stem}.{suffix}"] = array
    values = to_hf(EVEN) | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": {"weights": {"group_size": 16}, "input_activations": {"num_bits": 4}}},
            "ignore": list(quant.exclude),
        }
    }
    packed = save(tmp_path / "packed", arrays, values)
    assert np.abs(logits(packed) - logits(hf)).max() < 1e-4
    convert(packed, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert hf_files.read(tmp_path / "back") == hf_files.read(packed)


def test_dtypes_are_kept_one_by_one(tmp_path):
    weights = hf_files.random_weights(SMALL)
    for name in ("backbone.layers.1.mixer.gate.weight", "backbone.layers.0.mixer.A_log"):
        weights[name] = weights[name].astype(np.float32) + np.float32(1e-6)
    weights["backbone.norm_f.weight"] = weights["backbone.norm_f.weight"].astype(np.float16)
    hf = save(tmp_path / "hf", weights)
    convert(hf, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert hf_files.read(tmp_path / "back") == hf_files.read(hf)
    convert(hf, tmp_path / "bf16", format="bf16")
    dtypes = {name: dtype for name, (dtype, _, _) in hf_files.read(tmp_path / "bf16").items()}
    assert {name for name, dtype in dtypes.items() if dtype != "BF16"} == {
        name for name in dtypes if name.endswith("e_score_correction_bias")
    }


def test_what_lies_beside_the_weights_is_carried_along(tmp_path, hf):
    values = to_hf(TINY, layer_lists=True) | {"foo": {"bar": [1, 2.5]}, "torch_dtype": "bfloat16"}
    values |= {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    del values["dtype"]
    files = {
        "config.json": json.dumps(values),
        "generation_config.json": '{"eos_token_id": [2, 11], "x": 1}',
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"chat_template": "é"}',
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "modeling_nemotron_h.py": "pass",
    }
    for name, text in files.items():
        (hf / name).write_text(text, encoding="utf-8")
    (hf / "README.md").write_text("not part of the model")
    convert(hf, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    for name, text in files.items():
        read = (tmp_path / "back" / name).read_text(encoding="utf-8")
        assert read == text if name != "config.json" else json.loads(read) == values, name
    assert not (tmp_path / "back" / "README.md").exists()


def test_a_generation_config_is_made_where_there_is_none(tmp_path, hf):
    convert(hf, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0}
    small = dataclasses.replace(TINY, vocab_size=8)
    assert companions.generation_config(small)["eos_token_id"] == [2]


def test_a_trained_run_becomes_a_float32_or_bf16_directory(tmp_path, hf):
    """A run's checkpoint as Orbax writes it itself."""
    import jax

    from nemotron_jax.checkpoint.store import CheckpointStore
    from nemotron_jax.model.nemotron import Nemotron, split_model
    from nemotron_jax.precision.recipe import recipe
    from nemotron_jax.run_config import RunConfig, to_dict

    model = Nemotron(TINY, recipe("float32"), jax.random.key(3))
    _, params, buffers = split_model(model)
    run = tmp_path / "run"
    with contextlib.closing(CheckpointStore(run / "checkpoints", keep=2)) as store:
        for step in (1, 2):
            params = jax.tree.map(lambda x: x + 1e-3, params)
            items = {
                "params": params,
                "buffers": {"model": buffers, "seed": jnp.uint32(5)},
                "optimizer": {"step": jnp.int32(step)},
            }
            store.save(step, items, {})
        store.wait()
    companions.write_json(run / "config.json", to_dict(RunConfig(TINY)))
    convert(run, tmp_path / "hf32")
    assert {dtype for dtype, _, _ in hf_files.read(tmp_path / "hf32").values()} == {"F32"}
    assert json.loads((tmp_path / "hf32" / "config.json").read_text())["dtype"] == "float32"
    np.testing.assert_array_equal(logits(tmp_path / "hf32"), logits(run))
    convert(run, tmp_path / "first", step=1)
    assert hf_files.read(tmp_path / "first") != hf_files.read(tmp_path / "hf32")
    convert(run, tmp_path / "bf16", format="bf16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    wide = {name: np.frombuffer(data, np.float32) for name, (_, _, data) in hf_files.read(tmp_path / "hf32").items()}
    for name, (dtype, _, data) in hf_files.read(tmp_path / "bf16").items():
        if dtype == "BF16":
            assert data == wide[name].astype(hf_files.BF16).tobytes()
    assert same_network(from_hf(json.loads((tmp_path / "bf16" / "config.json").read_text())), TINY)


# Formats


def mixed():
    fp8, nvfp4 = Scheme("FP8"), Scheme("NVFP4")
    experts = {
        f"backbone.layers.1.mixer.experts.{expert}.{name}_proj": nvfp4 for expert in range(8) for name in ("up", "down")
    }
    others = {"backbone.layers.0.mixer.in_proj": fp8, "backbone.layers.1.mixer.shared_experts.up_proj": fp8}
    return QuantConfig("MIXED_PRECISION", experts | others, exclude=("lm_head",), kv_cache="FP8")


QUANTS = {
    "fp8": default_layer_map(EVEN, "fp8"),
    "nvfp4": default_layer_map(EVEN, "nvfp4"),
    "mixed": mixed(),
    "w4a16": QuantConfig("W4A16_NVFP4", exclude=("mtp*",)),
}


@pytest.mark.parametrize("name", QUANTS)
def test_quantised_tensors_pass_through(tmp_path, name):
    """Through a training workdir and back: every byte of codes, scales and configs; and both load."""
    hf = hf_files.write(tmp_path / "hf", EVEN, quant=QUANTS[name])
    convert(hf, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert hf_files.read(tmp_path / "back") == hf_files.read(hf)
    for file in ("config.json", HF_QUANT_CONFIG):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((hf / file).read_text())
    np.testing.assert_array_equal(logits(hf), logits(tmp_path / "run"))
    for path in (hf, tmp_path / "run"):
        listed = {tensor.name: (tensor.dtype, tensor.shape) for tensor in dry_run(EVEN, path, None)}
        assert listed == {name: (dtype, shape) for name, (dtype, shape, _) in hf_files.read(hf).items()}


def test_scales_of_experts_that_were_never_routed_to(tmp_path):
    """Missing or 0: the largest of the same projection in the layer; the others stay as they are."""
    hf = hf_files.write(tmp_path / "hf", EVEN, quant=QUANTS["nvfp4"], max_shard=1 << 30)
    arrays = {
        name: np.frombuffer(data, DTYPES[dtype]).reshape(shape).copy()
        for name, (dtype, shape, data) in hf_files.read(hf).items()
    }
    scales = [f"backbone.layers.1.mixer.experts.{expert}.up_proj.input_scale" for expert in range(8)]
    for number, name in enumerate(scales):
        arrays[name][...] = 0.5 + number / 8
    arrays[scales[2]][...] = 0
    del arrays[scales[4]]
    save(hf, arrays, json.loads((hf / "config.json").read_text()))
    convert(hf, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    before, after = hf_files.read(hf), hf_files.read(tmp_path / "back")
    assert {name: after[name] for name in before if name != scales[2]} == {
        name: value for name, value in before.items() if name != scales[2]
    }
    assert after.keys() - before.keys() == {scales[4]}
    assert [np.frombuffer(after[scales[i]][2], np.float32)[0] for i in (2, 4)] == [0.5 + 7 / 8] * 2


def test_scales_of_an_mtp_cache_pass_through(tmp_path):
    hf = hf_files.write(tmp_path / "hf", EVEN, quant=QUANTS["fp8"], max_shard=1 << 30)
    arrays = {
        name: np.frombuffer(data, DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape, data) in hf_files.read(hf).items()
    }
    arrays["mtp.layers.0.mixer.k_proj.k_scale"] = np.full(1, 2.5, np.float32)
    save(hf, arrays, json.loads((hf / "config.json").read_text()))
    convert(hf, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert hf_files.read(tmp_path / "back") == hf_files.read(hf)


@pytest.mark.parametrize("name", QUANTS)
def test_dequantising(tmp_path, name):
    hf = hf_files.write(tmp_path / "hf", EVEN, quant=QUANTS[name])
    convert(hf, tmp_path / "run")
    for source in (hf, tmp_path / "run"):
        target = tmp_path / f"bf16-{source.name}"
        convert(source, target, format="bf16")
        assert HFDirectory(target).quant is None and not (target / HF_QUANT_CONFIG).exists()
        assert "quantization_config" not in json.loads((target / "config.json").read_text())
        assert np.abs(logits(target) - logits(hf)).max() < 0.02
    assert hf_files.read(tmp_path / "bf16-hf") == hf_files.read(tmp_path / "bf16-run")


def test_the_same_format_is_left_alone(tmp_path):
    hf = hf_files.write(tmp_path / "hf", EVEN, quant=QUANTS["mixed"])
    convert(hf, tmp_path / "again", format="nvfp4")
    assert hf_files.read(tmp_path / "again") == hf_files.read(hf)


def calibrated(config, amax=3.0):
    modules = [entry.module for entry in Table(config).entries.values()]
    return Calibration(
        dict.fromkeys(modules, amax), {module: 700.0 for module in modules if module[-6:] in ("k_proj", "v_proj")}
    )


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
@pytest.mark.parametrize("from_run", [False, True])
def test_quantising(tmp_path, format, from_run):
    """Each module as modelopt.quantize has it, by the published map; everything else in BF16."""
    weights = hf_files.random_weights(EVEN)
    source = hf_files.write(tmp_path / "hf", EVEN, weights)
    if from_run:
        convert(source, source := tmp_path / "run")
    calibration = calibrated(EVEN)
    del calibration.inputs["backbone.layers.1.mixer.experts.3.up_proj"]  # an expert that no token reached
    target = tmp_path / "target"
    convert(source, target, format=format, calibration=calibration)
    quant, found = read_quant_config(target), hf_files.read(target)
    assert quant == default_layer_map(EVEN, format)
    expected = {}
    for name, entry in Table(EVEN).entries.items():
        scheme = quant.scheme(entry.module) if len(entry.shape) == 2 and name.endswith(".weight") else None
        if scheme is None:
            expected[name] = weights[name].tobytes()
        else:
            arrays = quantize(scheme, weights[name], 3.0)
            expected |= {f"{entry.module}.{suffix}": array.tobytes() for suffix, array in arrays.items()}
    kv = {name: np.frombuffer(data, np.float32) for name, (_, _, data) in found.items() if name not in expected}
    assert kv == {f"backbone.layers.2.mixer.{x}_proj.{x}_scale": np.float32(700 / 448) for x in "kv"}
    assert {name: data for name, (_, _, data) in found.items() if name in expected} == expected
    assert np.abs(logits(target) - logits(source)).max() < 0.5


def test_a_calibration_is_needed(tmp_path, hf):
    with pytest.raises(UserError, match=r"--format=fp8 .* give --calibration=FILE"):
        convert(hf, tmp_path / "x", format="fp8")
    assert not (tmp_path / "x").exists()


# What goes wrong


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_target_that_is_not_empty(tmp_path, hf):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(hf, tmp_path / "full")
    with pytest.raises(CheckpointError, match="does not exist or is read-only"):
        convert(hf, tmp_path / "no" / "where")
    assert tree(tmp_path) == before
    for link in ("full", "nothing"):  # found out before the work, not when a folder should take its place
        (tmp_path / "link").symlink_to(tmp_path / link)
        with pytest.raises(CheckpointError, match="is a symbolic link"):
            convert(hf, tmp_path / "link")
        (tmp_path / "link").unlink()
    with pytest.raises(CheckpointError, match=r"x.* failed|does not exist"):
        convert(hf, tmp_path / ("x" * 300))
    with pytest.raises(CheckpointError, match="does not exist or is read-only"):
        convert(hf, tmp_path / "full" / "a" / "b")
    (tmp_path / "empty").mkdir()
    convert(hf, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize("format", [None, "bf16"])
def test_values_that_are_not_finite(tmp_path, format):
    weights = hf_files.random_weights(SMALL)
    weights["lm_head.weight"][7, 7] = np.nan
    weights["backbone.layers.1.mixer.experts.6.down_proj.weight"][0, 0] = np.inf
    hf = hf_files.write(tmp_path / "hf", SMALL, weights)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        convert(hf, tmp_path / "x", format=format)
    assert "2 faults" in str(caught.value) and "lm_head.weight" in str(caught.value)
    assert "experts.6.down_proj.weight" in str(caught.value)
    assert tree(tmp_path) == before
    with pytest.raises(CheckpointError, match="2 faults"):
        nemotron_jax.load(hf)


def test_a_damaged_run(tmp_path, hf):
    """A byte that changed on disk."""
    convert(hf, tmp_path / "run")
    embedding = hf_files.read(hf)["backbone.embeddings.weight"][2][100:200]
    (file,) = [path for path in (tmp_path / "run").rglob("d/*") if embedding in path.read_bytes()]
    content = bytearray(file.read_bytes())
    content[content.index(embedding)] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"embeddings/weight (does not match|is damaged)"):
        convert(tmp_path / "run", tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_no_such_step(tmp_path, hf):
    convert(hf, tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        convert(tmp_path / "run", tmp_path / "x", step=7)
    with pytest.raises(UserError, match="has no steps"):
        convert(hf, tmp_path / "x", step=7)


@contextlib.contextmanager
def file_size_limit(size):
    """Writes beyond the limit fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("format", [None, "bf16"])
def test_writing_fails_midway(tmp_path, hf, format):
    before = tree(tmp_path)
    with file_size_limit(20_000), pytest.raises(CheckpointError, match="nothing was left of it"):
        convert(hf, tmp_path / "x", format=format)
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("format", [None, "bf16"])
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk(tmp_path, hf, monkeypatch, format, foreseen):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs")
    if not foreseen:
        monkeypatch.setattr(converting, "_check_room", lambda *_: None)
    try:
        with pytest.raises(CheckpointError, match="GB free" if foreseen else "the disk is full"):
            convert(hf, disk / "x", format=format)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


# The command


def test_the_command(tmp_path, hf, capsys):
    assert front.run(["convert", str(hf), str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("wrote ")
    assert front.run(["convert", str(tmp_path / "run"), str(tmp_path / "back"), "--format=bf16"]) == 0
    assert hf_files.read(tmp_path / "back") == hf_files.read(hf)
    capsys.readouterr()
    for source in (hf, tmp_path / "run"):
        assert front.run(["convert", f"--dry-run={source}"]) == 0
        listed = [line.split() for line in capsys.readouterr().out.splitlines()]
        found = {name: (dtype, json.loads(shape)) for name, dtype, shape in listed}
        assert found == {name: (dtype, list(shape)) for name, (dtype, shape, _) in hf_files.read(hf).items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs SRC and DST"),
        (["."], "needs SRC and DST"),
        (["nowhere", "b"], "there is no 'nowhere'"),
        ([".", "b", "--format=fp16"], "--format must be one of bf16, fp8, nvfp4, got 'fp16'"),
        ([".", "b", "--dry-run=nano"], "takes no SRC, DST, --step or --calibration"),
        (["--dry-run=nanno"], "Did you mean 'nano'"),
        ([".", "b"], "holds no config.json"),
    ],
)
def test_the_command_refuses(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        front.run(["convert", *arguments])
    assert not list(tmp_path.iterdir())
