"""What a training run is: the config groups of ``train.py`` as frozen, validated dataclasses.

The entry points turn flags and ConfigDicts into a RunConfig with ``from_dict``; everything behind them sees only
these types. ``to_dict`` is what DIR/config.json holds.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from nemotron_jax.config import AttentionConfig, MambaConfig, ModelConfig, MoEConfig, MTPConfig, preset, replace
from nemotron_jax.errors import ConfigError, did_you_mean


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _choice(key: str, value: str, known: tuple[str, ...]) -> None:
    _check(value in known, f"{key} must be one of {', '.join(known)}, got {value!r}.{did_you_mean(value, known)}")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from. Exactly one of ``files`` and ``blend`` is used: ``blend`` wins when given."""

    files: str = "stdlib"  # comma-separated paths and globs; "stdlib": the sources of Python's standard library
    blend: str = ""  # NVIDIA's blend JSON (data/blend.py)
    text_field: str = "text"  # of .jsonl and Parquet
    seq_len: int = 8192
    tokenizer: str = "bpe:8192"  # a tokenizer.json (or its folder), or bpe:N to train one on the data
    validation_fraction: float = 0.01  # of the documents
    validation_batches: int = 8

    def __post_init__(self) -> None:
        _check(bool(self.files or self.blend), "data.files and data.blend are both empty: name some text to train on.")
        _check(self.seq_len > 1, f"data.seq_len must be at least 2, got {self.seq_len}.")
        _check(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction must be in [0, 1), got {self.validation_fraction}.",
        )
        _check(self.validation_batches > 0, f"data.validation_batches must be positive, got {self.validation_batches}.")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and stability of the run."""

    steps: int = 1000
    global_batch_size: int = 8  # sequences a step over all devices
    microbatches: int = 1  # gradient accumulation: equal parts of the global batch, one after the other
    seed: int = 0
    remat: str = "full"
    validate_every: int = 100
    max_skipped_steps: int = 5  # non-finite steps in a row before the run gives up (exit 3)
    load_balance_coefficient: float = 1e-4  # Nemotron 3 Nano report, 2.4
    router_bias_rate: float = 1e-3  # the same
    trainable: str = ""  # ordered path rules, e.g. "-*,+mtp/*"; empty: everything

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "microbatches", "validate_every", "max_skipped_steps"):
            value = getattr(self, name)
            _check(value > 0, f"train.{name} must be positive, got {value}.")
        _check(
            self.global_batch_size % self.microbatches == 0,
            f"train.global_batch_size ({self.global_batch_size}) must be a multiple of train.microbatches "
            f"({self.microbatches}).",
        )
        _check(0 <= self.seed < 2**32, f"train.seed must be in [0, 2^32), got {self.seed}.")
        _choice("train.remat", self.remat, ("none", "full"))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a warm-up, stable, decay schedule (training/optimizer.py)."""

    name: str = "adamw"
    peak_lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_steps: int = 100
    decay_steps: int = 200  # the last steps of the run, minus-sqrt from peak_lr to min_lr
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # global gradient norm

    def __post_init__(self) -> None:
        _choice("optimizer.name", self.name, ("adamw",))
        for name in ("peak_lr", "eps", "clip"):
            value = getattr(self, name)
            _check(value > 0, f"optimizer.{name} must be positive, got {value}.")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "min_lr"):
            value = getattr(self, name)
            _check(value >= 0, f"optimizer.{name} must not be negative, got {value}.")
        _check(
            self.min_lr <= self.peak_lr,
            f"optimizer.min_lr ({self.min_lr}) must not exceed optimizer.peak_lr ({self.peak_lr}).",
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"optimizer.{name} must be in [0, 1), got {value}.")


@dataclass(frozen=True)
class PrecisionConfig:
    recipe: str = "auto"  # auto: bfloat16 on GPU, float32 on CPU; see nemotron_jax/precision/recipe.py
    exclude: str = ""  # comma-separated globs of matmuls that a quantised recipe leaves in bfloat16
    switch_at: int = 0  # the last step in `recipe`; those after it are in `switch_to`. 0: no switch
    switch_to: str = "bfloat16"

    def __post_init__(self) -> None:
        _check(self.switch_at >= 0, f"precision.switch_at must be 0 (no switch) or a step, got {self.switch_at}.")
        _check(
            not self.switch_at or self.switch_to != self.recipe,
            f"precision.switch_at={self.switch_at} switches from {self.recipe} to the same recipe: set "
            "precision.switch_to to another one, or precision.switch_at to 0.",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """Mesh axes, always all present; -1 (one axis at most) takes the devices that are left.

    Attributes:
      stack_layers: keep the weights of repeating layers as one and scan over them: gathered weights live for one
        layer only, and each unit is compiled once. Checkpoints are the same.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    stack_layers: bool = False

    def __post_init__(self) -> None:
        axes = {name: value for name, value in vars(self).items() if name != "stack_layers"}
        for name, value in axes.items():
            _check(value > 0 or value == -1, f"parallel.{name} must be positive or -1, got {value}.")
        _check(list(axes.values()).count(-1) <= 1, f"parallel: only one axis may be -1, got {self}.")


@dataclass(frozen=True)
class Processes:
    """How a process of a run finds the others: flags of its own, no part of the config. None: as the launcher says."""

    coordinator: str | None = None  # HOST:PORT, where process 0 listens
    count: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100
    keep: int = 2  # the newest ones
    keep_every: int = 0  # beside them, for ever, each step divisible by this; 0: none
    init_from: str = ""  # a training workdir or a Hugging Face directory whose parameters start this run

    def __post_init__(self) -> None:
        _check(self.every > 0, f"checkpoint.every must be positive, got {self.every}.")
        _check(self.keep > 0, f"checkpoint.keep must be positive, got {self.keep}.")
        _check(self.keep_every >= 0, f"checkpoint.keep_every must not be negative, got {self.keep_every}.")


@dataclass(frozen=True)
class LogConfig:
    every: int = 10
    zero_gradients: bool = False  # their shares where nothing is quantised (quantised recipes always log them)

    def __post_init__(self) -> None:
        _check(self.every > 0, f"log.every must be positive, got {self.every}.")


@dataclass(frozen=True)
class RunConfig:
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


GROUPS: dict[str, type] = {
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "precision": PrecisionConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}
MODEL_SECTIONS: dict[str, type] = {
    "mamba": MambaConfig,
    "attention": AttentionConfig,
    "moe": MoEConfig,
    "mtp": MTPConfig,
}


def field_types(cls: type) -> dict[str, type]:
    """The plain type of each field of a config dataclass; ``X | None`` counts as X."""
    hints = typing.get_type_hints(cls)
    plain = {}
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if isinstance(hint, types.UnionType):
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        plain[item.name] = hint
    return plain


def from_dict(values: dict[str, Any]) -> RunConfig:
    """A RunConfig from nested dicts; in the group ``model``, ``preset`` names the start and None means unset.

    Raises:
      ConfigError: an unknown group or key (with a suggestion), a value of the wrong type, or sizes that do not fit.
    """
    known = ("model", *GROUPS)
    for name in values:
        _check(name in known, f"unknown config group {name!r}.{did_you_mean(name, known)}")
    _check("model" in values, "the config has no group model: set model.preset or model.pattern.")
    _check(isinstance(values["model"], dict), f"model must be a group of keys, got {values['model']!r}.")
    groups = {
        name: cls(**_typed(cls, name, values[name])) for name, cls in GROUPS.items() if values.get(name) is not None
    }
    return RunConfig(model=_model(dict(values["model"])), **groups)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested dicts of plain values that JSON can hold and from_dict takes back."""
    values = dataclasses.asdict(config)
    values["model"]["hf_extra"] = [list(pair) for pair in config.model.hf_extra]
    return values


def _model(values: dict[str, Any]) -> ModelConfig:
    name = values.pop("preset", None)
    overrides: dict[str, Any] = {}
    for key, value in values.items():
        if key in MODEL_SECTIONS and value is not None:
            value = _typed(MODEL_SECTIONS[key], f"model.{key}", value)
            if not value:
                continue
        if value is not None:
            overrides[key] = value
    if "hf_extra" in overrides:
        overrides["hf_extra"] = tuple((key, text) for key, text in overrides["hf_extra"])
    types_of = field_types(ModelConfig)
    for key, value in overrides.items():
        if key in types_of and key not in MODEL_SECTIONS and key != "hf_extra":
            overrides[key] = _cast(f"model.{key}", value, types_of[key])
    if name is not None:
        return replace(preset(name), overrides)
    missing = [key for key in ("pattern", "hidden_size") if key not in overrides]
    _check(not missing, f"the config names no model.preset, so it must set model.{' and model.'.join(missing)}.")
    return replace(ModelConfig(overrides.pop("pattern"), overrides.pop("hidden_size")), overrides)


def _typed(cls: type, shown: str, values: dict[str, Any]) -> dict[str, Any]:
    _check(isinstance(values, dict), f"{shown} must be a group of keys, got {values!r}.")
    types_of = field_types(cls)
    result = {}
    for key, value in values.items():
        _check(key in types_of, f"unknown config key {shown}.{key}.{did_you_mean(key, types_of)}")
        if value is not None:
            result[key] = _cast(f"{shown}.{key}", value, types_of[key])
    return result


def _cast(shown: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    good = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    _check(good, f"{shown} must be {kind.__name__}, got {value!r}.")
    return value


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines ``a.b: old -> new`` for every leaf in which two nested dicts differ."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
