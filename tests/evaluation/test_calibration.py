"""Ranges of activations against a run whose intermediate values are at hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax
from nemotron_jax.__main__ import run
from nemotron_jax.checkpoint.hf_directory import HFDirectory
from nemotron_jax.checkpoint.layer_map import default_layer_map
from nemotron_jax.checkpoint.modelopt import fill_expert_scales, parse_quant_config, read_quant_config
from nemotron_jax.data.tokenizer import train_bpe
from nemotron_jax.errors import DataError, UserError
from nemotron_jax.evaluation.calibration import calibrate, calibrate_on, without_padding
from nemotron_jax.model.context import Context
from nemotron_jax.model.mlp import relu2
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.precision.modelopt import activation_scale
from nemotron_jax.precision.recipe import recipe
from tests.checkpoint import hf_files
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, pattern="ME*-")
MODEL = Nemotron(CONFIG, recipe("float32"), jax.random.key(0))
RNG = np.random.default_rng(0)


def rows(batch, time=12):
    segments = np.sort(RNG.integers(1, 4, (batch, time))).astype(np.int32)
    return RNG.integers(0, 64, (batch, time)).astype(np.int32), segments


def largest(x):
    return float(jnp.abs(x).max())


def test_ranges():
    batches = [rows(2), rows(3)]
    found = calibrate(MODEL, batches)
    expected: dict[str, float] = {}
    outputs: dict[str, float] = {}

    def note(into, name, value):
        into[name] = max(into.get(name, 0.0), value)

    for tokens, segments in batches:
        ctx = Context(segment_ids=jnp.asarray(segments))
        h = MODEL.embeddings(jnp.asarray(tokens))
        for i, layer in enumerate(MODEL.layers):
            mixer, x = layer.mixer, layer.norm(h)
            name = f"backbone.layers.{i}.mixer"
            if CONFIG.pattern[i] == "M":
                note(expected, f"{name}.in_proj", largest(x))
            elif CONFIG.pattern[i] == "*":
                for projection in "qkv":
                    note(expected, f"{name}.{projection}_proj", largest(x))
                for projection in "kv":
                    note(outputs, f"{name}.{projection}_proj", largest(getattr(mixer, f"{projection}_proj")(x)))
            elif CONFIG.pattern[i] == "-":
                note(expected, f"{name}.up_proj", largest(x))
                note(expected, f"{name}.down_proj", largest(relu2(mixer.up_proj(x))))
            else:
                note(expected, f"{name}.fc1_latent_proj", largest(x))
                note(expected, f"{name}.shared_experts.up_proj", largest(x))
                u = mixer.fc1_latent_proj(x)
                _, chosen, _ = mixer.gate(x)
                for expert in range(CONFIG.moe.num_experts):
                    taken = u[(chosen == expert).any(-1)]
                    if len(taken):
                        note(expected, f"{name}.experts.{expert}.up_proj", largest(taken))
                        hidden = relu2(taken @ mixer.experts.up_proj[...][expert])
                        note(expected, f"{name}.experts.{expert}.down_proj", largest(hidden))
            h, _, _ = layer(h, ctx, None)
        note(expected, "lm_head", largest(MODEL.norm_f(h)))
    for module, value in expected.items():
        np.testing.assert_allclose(found.inputs[module], value, rtol=1e-4, err_msg=module)
    assert found.outputs.keys() == outputs.keys()
    for module, value in outputs.items():
        np.testing.assert_allclose(found.outputs[module], value, rtol=1e-4, err_msg=module)
    assert {module.rpartition(".")[2] for module in set(found.inputs) - set(expected)} <= {
        *("out_proj", "o_proj", "down_proj", "fc2_latent_proj")
    }


def test_every_projection_but_the_experts_nobody_visited_and_mtp():
    inputs = calibrate(MODEL, [(np.zeros((1, 1), np.int32), np.ones((1, 1), np.int32))]).inputs
    visited = [module for module in inputs if ".experts." in module]
    assert len(visited) == 2 * CONFIG.moe.top_k
    assert not [module for module in inputs if "mtp" in module or "gate" in module or "conv" in module]
    every = {f"backbone.layers.1.mixer.experts.{e}.{p}_proj": None for e in range(8) for p in ("up", "down")}
    assert min(fill_expert_scales({**every, **{m: inputs[m] for m in visited}}).values()) > 0


def test_the_model_is_left_as_it_was():
    before = [type(module) for module in (MODEL.layers[0].mixer.in_proj, MODEL.layers[1].mixer.experts)]
    calibrate(MODEL, [rows(1)])
    assert [type(module) for module in (MODEL.layers[0].mixer.in_proj, MODEL.layers[1].mixer.experts)] == before


def test_rows_without_padding():
    tokens = np.arange(1, 25, dtype=np.int32).reshape(3, 8)
    segments = np.array([[1] * 3 + [2] * 5, [1] * 6 + [0] * 2, [1] * 7 + [0]], np.int32)
    ((found, ids),) = without_padding([(tokens, segments)])
    assert found.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 17, 18]]
    assert [len(set(row)) for row in ids.tolist()] == [2, 2] and not set(ids[0]) & set(ids[1])
    ((short, _),) = without_padding([(tokens[1:2], segments[1:2])])
    assert short.tolist() == [[9, 10, 11, 12, 13, 14]]
    with pytest.raises(DataError, match="empty"):
        list(without_padding([(tokens, 0 * segments)]))


SUPER = dataclasses.replace(
    CONFIG, vocab_size=300, moe=dataclasses.replace(CONFIG.moe, intermediate_size=32, shared_intermediate_size=48)
)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_from_bfloat16_to_a_quantised_checkpoint(format, tmp_path):
    """What a user does: convert --format --calibration, then load what came out."""
    directory = hf_files.write(tmp_path / "bf16", SUPER)
    text = tmp_path / "text.txt"
    text.write_text("Text to read. " * 60)
    train_bpe([text.read_text()], 300).save(directory)
    target = tmp_path / "quantised"
    assert run(["convert", str(directory), str(target), f"--format={format}", f"--calibration={text}"]) == 0
    quant = read_quant_config(target)
    assert quant == parse_quant_config(default_layer_map(SUPER, format).to_json()["quantization_config"])
    source = HFDirectory(target)
    found = calibrate_on(directory, str(text))
    filled = fill_expert_scales(
        {
            m: found.inputs.get(m)
            for m in (entry.module for entry in source.table.entries.values() if source.scheme(entry))
        }
    )
    for entry in source.table.entries.values():
        if source.scheme(entry) is not None:
            stored = {suffix: tensor.rows() for suffix, tensor in source.module(entry).items()}
            assert stored["input_scale"] == activation_scale(filled[entry.module], source.scheme(entry).algo)
    scale = source.stored["backbone.layers.2.mixer.k_proj.k_scale"].rows()
    assert scale == max(found.outputs["backbone.layers.2.mixer.k_proj"] / 448, 1)
    _, model = nemotron_jax.load(target, precision="float32", packed=True)
    _, full = nemotron_jax.load(directory, precision="float32")
    tokens = RNG.integers(0, 300, (1, 20)).astype(np.int32)
    assert 0 < largest(model(tokens).logits - full(tokens).logits) < 0.5 * largest(full(tokens).logits)


def test_calibration_needs_a_format_that_stores_it(tmp_path):
    directory = hf_files.write(tmp_path / "bf16", SUPER)
    with pytest.raises(UserError, match="--calibration is for --format=fp8 and --format=nvfp4"):
        run(["convert", str(directory), str(tmp_path / "out"), "--calibration=x.txt"])
    with pytest.raises(UserError, match="--format=nvfp4 stores the range of each layer's inputs"):
        run(["convert", str(directory), str(tmp_path / "out"), "--format=nvfp4"])
    assert not (tmp_path / "out").exists()
