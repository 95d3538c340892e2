"""RunConfig: nested dicts to frozen dataclasses and back."""

import json

import pytest

from nemotron_jax.config import PRESETS, preset
from nemotron_jax.errors import ConfigError
from nemotron_jax.run_config import RunConfig, differing_keys, from_dict, to_dict


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    config = RunConfig(model=preset(name))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_preset_is_resolved_with_its_overrides():
    config = from_dict({"model": {"preset": "super", "pattern": "ME", "hidden_size": None, "mtp": {"depth": 0}}})
    assert config.model.pattern == "ME" and config.model.hidden_size == 4096 and config.model.mtp is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown config group 'modle'. Did you mean 'model'"),
        ({}, "no group model"),
        ({"model": {}}, "model.pattern and model.hidden_size"),
        ({"model": {"preset": "nano"}, "train": {"step": 1}}, "unknown config key train.step. Did you mean 'steps'"),
        ({"model": {"preset": "nano"}, "train": {"steps": 1.5}}, "train.steps must be int, got 1.5"),
        ({"model": {"preset": "nano"}, "train": {"steps": 0}}, "train.steps must be positive"),
        ({"model": {"preset": "nano"}, "train": {"remat": "ful"}}, "train.remat must be one of none, full.* 'full'"),
        (
            {"model": {"preset": "nano"}, "train": {"global_batch_size": 6, "microbatches": 4}},
            "multiple of train.micro",
        ),
        ({"model": {"preset": "nano"}, "train": {"seed": -1}}, "train.seed"),
        ({"model": {"preset": "nano"}, "data": {"seq_len": 1}}, "data.seq_len"),
        ({"model": {"preset": "nano"}, "data": {"validation_fraction": 1.0}}, "validation_fraction"),
        ({"model": {"preset": "nano"}, "data": {"files": ""}}, "data.files and data.blend are both empty"),
        ({"model": {"preset": "nano"}, "optimizer": {"min_lr": 1.0}}, "min_lr .1.0. must not exceed"),
        ({"model": {"preset": "nano"}, "optimizer": {"b2": 1.0}}, "optimizer.b2"),
        ({"model": {"preset": "nano"}, "optimizer": {"name": "adamv"}}, "optimizer.name.*adamw"),
        ({"model": {"preset": "nano"}, "parallel": {"data": -1, "fsdp": -1}}, "only one axis may be -1"),
        ({"model": {"preset": "nano"}, "parallel": {"tensor": 0}}, "parallel.tensor"),
        ({"model": {"preset": "nano"}, "checkpoint": {"keep": 0}}, "checkpoint.keep"),
        ({"model": {"preset": "nano"}, "log": {"every": 0}}, "log.every"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_differing_keys():
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    assert differing_keys(old, {"a": {"b": 1, "c": 5}, "e": 4}) == ["a.c: 2 -> 5", "d: 3 -> None", "e: None -> 4"]
    assert differing_keys(old, old) == []
