"""Every file in configs/ describes a run, and every key of a run can be set by one flag."""

import re
from pathlib import Path
from typing import Any

import pytest

from nemotron_jax.cli import base_config, config_keys, load_config_file, parse_train_flags
from nemotron_jax.config import PRESETS, preset
from nemotron_jax.errors import ConfigError
from nemotron_jax.model.counts import count_parameters, flops_per_token
from nemotron_jax.run_config import GROUPS, MODEL_SECTIONS, RunConfig, field_types, from_dict

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
OFFICIAL_BATCH = 3072 * 8192  # tokens


def parse(name: str, *flags: str) -> RunConfig:
    config, workdir, _ = parse_train_flags([f"--config={ROOT / 'configs' / name}.py", "--workdir=runs/x", *flags])
    assert workdir == Path("runs/x")
    return config


def docstring(file: Path) -> str:
    return " ".join(compile(file.read_text(), str(file), "exec").co_consts[0].split())


def lookup(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_is_a_run_and_says_how_to_start_it(file: Path):
    config = parse(file.stem)
    assert config.optimizer.warmup_steps + config.optimizer.decay_steps <= config.train.steps
    assert config.model == preset(load_config_file(str(file))["model"]["preset"]), "presets hold the models"
    text = docstring(file)
    assert f"python train.py --config=configs/{file.stem}.py --workdir=runs/{file.stem}" in text
    for heading in ("Command:", "Hardware:", "Time:", "Result:"):
        assert heading in text
    # The command's own flags parse, whatever stands for a file in them.
    parse(file.stem, *re.findall(r"--config\.[^ )]+", text))


def test_every_preset_has_a_config():
    used = {load_config_file(str(file))["model"]["preset"] for file in CONFIGS}
    assert used == set(PRESETS)


@pytest.mark.parametrize(
    ("name", "tokens", "decay", "warmup", "peak", "least"),
    [
        ("nano", 25e12, 5e12, 8.4e9, 1e-3, 1e-5),
        ("super", 25e12, 5e12, 200e9, 4.5e-4, 4.5e-6),
        ("ultra", 20e12, 5e12, 200e9, 2.5e-4, 2.5e-6),
    ],
)
def test_official_schedules(name: str, tokens: float, decay: float, warmup: float, peak: float, least: float):
    """Facts/nemotron3.md 4.1: what the reports give in tokens is in steps here."""
    config = parse(name)
    assert config.data.seq_len * config.train.global_batch_size == OFFICIAL_BATCH
    assert config.train.steps == pytest.approx(tokens / OFFICIAL_BATCH, rel=1e-5)
    assert config.optimizer.decay_steps == pytest.approx(decay / OFFICIAL_BATCH, abs=1)
    assert config.optimizer.warmup_steps == pytest.approx(warmup / OFFICIAL_BATCH, rel=1e-3)
    assert (config.optimizer.peak_lr, config.optimizer.min_lr) == (peak, least)


@pytest.mark.parametrize("name", ["nano", "lightning", "nano_4b", "super", "ultra"])
def test_sizes_in_the_docstrings(name: str):
    text, config = docstring(ROOT / "configs" / f"{name}.py"), parse(name)
    assert f"{16 * count_parameters(config.model)['total'] / 1e9:,.0f} GB" in text
    if name in ("nano", "super", "ultra"):
        shown = re.search(r"([\d.]+)T tokens x ([\d.]+) GFLOP = ([\d.e]+) FLOP", text)
        tokens, per_token, total = (float(number) for number in shown.groups())
        assert per_token == pytest.approx(flops_per_token(config.model, 8192) / 1e9, rel=2e-3)
        assert total == pytest.approx(tokens * 1e12 * per_token * 1e9, rel=0.03)


def test_base_config_holds_every_key_with_its_default():
    values = base_config().to_dict()
    for group, cls in GROUPS.items():
        assert {name: type(value) for name, value in values[group].items()} == field_types(cls)
    for section, cls in MODEL_SECTIONS.items():
        assert values["model"][section] == dict.fromkeys(field_types(cls))
    values["model"]["preset"] = "nano"
    assert from_dict(values) == RunConfig(model=preset("nano"))


def test_base_config_refuses_what_is_no_key_or_of_another_type():
    config = base_config()
    with pytest.raises(AttributeError, match="steps"):
        config.train.stepz = 3
    with pytest.raises(TypeError):
        config.train.steps = 1.5
    with pytest.raises(TypeError):
        config.model.mamba.num_heads = "many"
    config.optimizer.peak_lr = 1  # an int is a fine float, also for a key without a default
    config.model.moe.scaling_factor = 2
    assert (config.optimizer.peak_lr, config.model.moe.scaling_factor) == (1.0, 2.0)


# Keys of which only some values make sense; all others take a rule by type.
WORDS = {
    "model.preset": "tiny-super",
    "model.pattern": "M-*E",
    "model.mtp.pattern": "*",
    "data.files": "a.txt,b/*.txt",
    "data.blend": "blend.json",
    "data.text_field": "content",
    "data.tokenizer": "bpe:4096",
    "train.remat": "full",
    "train.trainable": "-*,+mtp/*",
    "optimizer.name": "adamw",  # the only one there is
    "precision.recipe": "float32",
    "precision.exclude": "layers/*/mixer/in_proj",
    "precision.switch_to": "mxfp8",
    "checkpoint.init_from": "runs/other",
    "model.moe.top_k_groups": "1",  # there is one group
    "model.mamba.num_groups": "4",
    "model.attention.num_kv_heads": "4",
    "parallel.data": "2",
    "data.validation_fraction": "0.5",
    "optimizer.b1": "0.5",
    "optimizer.b2": "0.5",
}
BY_TYPE = {
    bool: lambda value: str(not value).lower(),
    int: lambda value: str(2 * value or 1),
    float: lambda value: repr(value / 2 or 0.5),
}


@pytest.mark.parametrize("key", config_keys())
def test_every_key_can_be_set_alone(key: str):
    kind, default = config_keys()[key]
    before = parse("quickstart")
    text = WORDS.get(key) or BY_TYPE[kind](lookup(before, key))
    after = parse("quickstart", f"--config.{key}={text}")
    if key == "model.preset":
        assert after.model == preset(text)
        return
    value = lookup(after, key)
    assert type(value) is kind
    assert value == (text == "true" if kind is bool else kind(text))
    if key not in ("optimizer.name", "model.moe.top_k_groups"):
        assert value != lookup(before, key), "the rule above must choose another value"
        assert after != before
    assert default is None or type(default) is kind


@pytest.mark.parametrize("key", [key for key, (kind, _) in config_keys().items() if kind is float])
def test_a_whole_number_is_a_fine_float(key: str):
    try:
        value = lookup(parse("quickstart", f"--config.{key}=1", "--config.optimizer.min_lr=0"), key)
    except ConfigError as error:  # of its range, not of its type
        assert "must be in [0, 1)" in str(error) or "must not exceed" in str(error)
    else:
        assert type(value) is float


def test_a_flag_can_give_a_model_a_part_that_its_preset_lacks():
    assert parse("nano").model.mtp is None
    assert parse("nano", "--config.model.mtp.depth=1").model.mtp.depth == 1


def test_the_preset_is_resolved_after_the_flags():
    config = parse("nano", "--config.model.moe.top_k=8", "--config.model.preset=super")
    assert config.model.moe.top_k == 8
    assert config.model.moe.num_experts == preset("super").moe.num_experts
    assert config.train == parse("nano").train
