"""Model configurations: validation with full sentences, presets, Hugging Face's config.json."""

import dataclasses
import json

import pytest

from nemotron_jax.config import (
    PRESETS,
    AttentionConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    preset,
    replace,
    same_network,
)
from nemotron_jax.errors import ConfigError
from nemotron_jax.hf_config import from_hf, to_hf
from nemotron_jax.precision.recipe import last_layers_in_full


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig("MEX", 8), r"'X' at position 2 of 'MEX'.*M \(Mamba-2\).*- \(dense MLP\)"),
        (lambda: ModelConfig("", 8), "model.pattern is empty"),
        (
            lambda: MambaConfig(num_heads=10, num_groups=4),
            r"num_heads \(10\) must be a multiple of mamba.num_groups \(4\)",
        ),
        (lambda: MambaConfig(time_step_min=-1.0), "time_step_min must be positive"),
        (lambda: MambaConfig(time_step_min=1.0), "must not exceed mamba.time_step_max"),
        (lambda: AttentionConfig(num_heads=6, num_kv_heads=4), r"num_heads \(6\) must be a multiple of .*kv_heads"),
        (lambda: MoEConfig(num_experts=4, top_k=5), r"top_k \(5\) must not exceed"),
        (lambda: MoEConfig(num_experts=9, num_groups=2), "multiple of moe.num_groups"),
        (lambda: MoEConfig(num_experts=8, num_groups=4, top_k_groups=1, top_k=3), "exceeds the experts"),
        (lambda: MTPConfig(pattern="*Q"), "mtp.pattern has the unknown letter 'Q'"),
        (lambda: ModelConfig("M", 0), "model.hidden_size must be positive, got 0"),
        (lambda: ModelConfig("M", 8, vocab_size=2), "eos_id"),
        (lambda: preset("supr"), "Did you mean 'super'"),
        (
            lambda: replace(preset("nano"), {"mamba": {"num_head": 1}}),
            "model.mamba.num_head.* Did you mean 'num_heads'",
        ),
        (lambda: replace(preset("nano"), {"hiden_size": 1}), "Did you mean 'hidden_size'"),
    ],
)
def test_what_does_not_make_sense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_replace_nested_and_without_mtp():
    config = replace(preset("super"), {"pattern": "ME*", "moe": {"top_k": 2}, "mtp": {"depth": 0}})
    assert (config.pattern, config.moe.top_k, config.mtp) == ("ME*", 2, None)
    assert config.moe.num_experts == 512
    assert replace(preset("nano"), {"mtp": {"depth": 3}}).mtp == MTPConfig(depth=3)


def test_presets_are_those_of_the_table():
    """Layer counts, attention positions, the fields that differ."""
    counts = {name: tuple(config.pattern.count(letter) for letter in "ME*") for name, config in PRESETS.items()}
    assert counts["nano"] == counts["lightning"] == (23, 23, 6)
    assert counts["super"] == (40, 40, 8) and counts["ultra"] == (48, 48, 12)
    attention = [index for index, letter in enumerate(preset("ultra").pattern) if letter == "*"]
    assert attention == [7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98]
    assert len(preset("nano-4b").pattern) == 42
    for name, config in PRESETS.items():
        assert config.init_std == pytest.approx(0.9 / config.hidden_size**0.5, rel=0.03) or name == "nano-4b"
    assert {"M", "E", "*"} <= set(preset("quickstart").pattern) and preset("quickstart").mtp is not None


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layer_lists", [False, True])
def test_hugging_face_round_trip(name, layer_lists):
    """Through JSON text, in both spellings; keys that mean nothing here come back."""
    config = preset(name)
    written = json.loads(json.dumps(to_hf(config, layer_lists=layer_lists) | {"torch_dtype": "bfloat16", "x": [1, {}]}))
    assert ("layers_block_type" in written) == layer_lists
    read = from_hf(written)
    plain = dataclasses.replace(read, hf_extra=(), initializer_std=config.initializer_std)
    assert plain == config
    again = to_hf(read, layer_lists=layer_lists)
    assert {key: again[key] for key in written} == written


def released_nano():
    return {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "MEM*E",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    }


def test_odd_but_real_configs():
    """What transformers writes."""
    values = released_nano()
    del values["hybrid_override_pattern"]
    values |= {
        "layers_block_type": ["linear_attention", "moe", "mamba", "full_attention", "mlp"],
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "num_nextn_predict_layers": 0,
        "mtp_layers_block_type": ["attention", "moe"],
        "eos_token_id": [2, 11],
        "rope_theta": 10000,
    }
    config = from_hf(values)
    assert config.pattern == "MEM*-" and config.mtp is None and config.eos_id == 2
    assert ("rope_theta", "10000") in config.hf_extra
    assert from_hf(values | {"num_nextn_predict_layers": 1}).mtp == MTPConfig(pattern="*E")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hybrid_override_pattern": None}, "neither hybrid_override_pattern nor layers_block_type"),
        ({"num_hidden_layers": 4}, "num_hidden_layers=4, but its layer list has 5"),
        ({"layers_block_type": ["mamba", "conv"]}, "unknown block 'conv' in layers_block_type at position 1"),
        ({"layers_block_type": ["mamba"]}, "contradicts itself"),
        ({"time_step_limit": [0.001, 0.1]}, "dt is never clamped"),
        ({"attention_bias": True}, "attention_bias=True; only False"),
        ({"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E"}, "stores 2 MTP modules"),
        ({"n_groups": 3}, "multiple of mamba.num_groups"),
        ({"hidden_size": "abc"}, "wrong kind: hidden_size='abc', expected int"),
        ({"hidden_size": 32.5}, "wrong kind: hidden_size=32.5, expected int"),
        ({"vocab_size": True}, "wrong kind: vocab_size=True, expected int"),
        ({"layer_norm_epsilon": "1e-5"}, "wrong kind: layer_norm_epsilon='1e-5', expected float"),
        ({"norm_topk_prob": 1}, "wrong kind: norm_topk_prob=1, expected bool"),
        ({"hybrid_override_pattern": 5}, "wrong kind"),
        ({"eos_token_id": []}, "wrong kind"),
        ({"time_step_limit": 5}, "wrong kind"),
    ],
)
def test_bad_config_json(change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf({key: value for key, value in (released_nano() | change).items() if value is not None})


def test_which_layers_of_ultra_stay_in_bfloat16_is_known_from_its_config_json():
    """NVIDIA's file says nothing of it; what ours says of another model is kept."""
    values = to_hf(preset("ultra"))
    assert "bfloat16_share" not in values
    assert last_layers_in_full(from_hf(values)) == 16
    assert last_layers_in_full(from_hf(to_hf(preset("super")))) == 14
    for model in (preset("ultra"), preset("nano")):
        other = dataclasses.replace(model, bfloat16_share=0.5)
        assert from_hf(to_hf(other)).bfloat16_share == 0.5 and same_network(other, model)
    default = dataclasses.replace(preset("ultra"), bfloat16_share=0.15)  # not what is read where nothing is said
    assert last_layers_in_full(from_hf(to_hf(default))) == 17
