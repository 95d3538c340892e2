"""Hugging Face ``config.json`` of nemotron_h models ↔ ModelConfig (transformers, configuration_nemotron_h.py).

Both spellings of the layer list are read: the pattern string (``hybrid_override_pattern``) and the list
(``layers_block_type``), each also for the MTP module. Keys that mean nothing here are kept and written back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from nemotron_jax.config import PRESETS, AttentionConfig, MambaConfig, ModelConfig, MoEConfig, MTPConfig, same_network
from nemotron_jax.errors import ConfigError

# ModelConfig section ("" is the model itself) -> {our field: Hugging Face key}.
_FIELDS = {
    "": {
        "hidden_size": "hidden_size",
        "vocab_size": "vocab_size",
        "intermediate_size": "intermediate_size",
        "norm_eps": "layer_norm_epsilon",
        "max_positions": "max_position_embeddings",
        "bos_id": "bos_token_id",
        "eos_id": "eos_token_id",
        "pad_id": "pad_token_id",
    },
    "mamba": {
        "num_heads": "mamba_num_heads",
        "head_dim": "mamba_head_dim",
        "num_groups": "n_groups",
        "state_size": "ssm_state_size",
        "conv_kernel": "conv_kernel",
        "chunk_size": "chunk_size",
        "time_step_min": "time_step_min",
        "time_step_max": "time_step_max",
        "time_step_floor": "time_step_floor",
    },
    "attention": {
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
    },
    "moe": {
        "num_experts": "n_routed_experts",
        "top_k": "num_experts_per_tok",
        "intermediate_size": "moe_intermediate_size",
        "shared_intermediate_size": "moe_shared_expert_intermediate_size",
        "latent_size": "moe_latent_size",
        "scaling_factor": "routed_scaling_factor",
        "num_groups": "n_group",
        "top_k_groups": "topk_group",
        "normalize_weights": "norm_topk_prob",
    },
}

_REAL = {"layer_norm_epsilon", "time_step_min", "time_step_max", "time_step_floor", "routed_scaling_factor"}

# What the blocks are built for; another value would need code that does not exist, so it is refused.
_FIXED = {
    "model_type": "nemotron_h",
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
    "n_shared_experts": 1,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "sliding_window": None,
}

_LETTER_OF = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
_NAME_OF = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


def from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """A parsed config.json as ModelConfig.

    Raises:
      ConfigError: a feature that no released model uses, a missing or malformed layer list, or sizes that do not fit.
    """
    try:
        return _from_hf(dict(values))
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"config.json holds a value of the wrong kind: {error}.") from error


def _from_hf(rest: dict[str, Any]) -> ModelConfig:
    values = dict(rest)
    for key, expected in _FIXED.items():
        if key in rest and rest.pop(key) not in (expected, None):
            raise ConfigError(f"config.json has {key}={values[key]!r}; only {expected!r} is supported.")
    _check_time_step_limit(rest)
    pattern = _pop_pattern(rest, "hybrid_override_pattern", "layers_block_type")
    if pattern is None:
        raise ConfigError("config.json has neither hybrid_override_pattern nor layers_block_type: no list of layers.")
    layers = rest.pop("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        raise ConfigError(f"config.json has num_hidden_layers={layers}, but its layer list has {len(pattern)} entries.")
    sections: dict[str, dict[str, Any]] = {
        section: {ours: _number(rest, theirs) for ours, theirs in fields.items() if rest.get(theirs) is not None}
        for section, fields in _FIELDS.items()
    }
    rest.pop("moe_latent_size", None)
    model = sections[""]
    if "hidden_size" not in model:
        raise ConfigError("config.json lacks hidden_size.")
    if "bfloat16_share" in rest:  # our own key: Hugging Face has nothing to say of it
        model["bfloat16_share"] = rest.pop("bfloat16_share")
        return _config(pattern, sections, rest)
    config = _config(pattern, sections, rest)
    return dataclasses.replace(config, bfloat16_share=_share_where_none_is_given(config))


def _config(pattern: str, sections: dict[str, dict[str, Any]], rest: dict[str, Any]) -> ModelConfig:
    """``rest``: all that no field has taken; emptied of the keys of MTP."""
    return ModelConfig(
        pattern=pattern,
        **sections[""],
        mamba=MambaConfig(**sections["mamba"]),
        attention=AttentionConfig(**sections["attention"]),
        moe=MoEConfig(**sections["moe"]),
        mtp=_pop_mtp(rest),
        hf_extra=tuple((key, json.dumps(value)) for key, value in rest.items()),
    )


def _number(rest: dict[str, Any], key: str) -> Any:
    """Pops a value; raises TypeError unless it is what the key is for."""
    value = rest.pop(key)
    if key == "eos_token_id" and isinstance(value, list):
        value = value[0]
    kinds: tuple[type, ...] = (bool,) if key == "norm_topk_prob" else (int, float) if key in _REAL else (int,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{key}={value!r}, expected {kinds[-1].__name__}")
    return value


def to_hf(config: ModelConfig, *, layer_lists: bool = False) -> dict[str, Any]:
    """The config.json of a model; ``layer_lists`` writes lists of block names instead of pattern strings."""
    extra = {key: json.loads(text) for key, text in config.hf_extra}
    values: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        **_FIXED,
        "num_hidden_layers": len(config.pattern),
        "initializer_range": config.init_std,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        "dtype": "bfloat16",
    }
    for section, fields in _FIELDS.items():
        source = getattr(config, section) if section else config
        values.update({theirs: getattr(source, ours) for ours, theirs in fields.items()})
    values["moe_latent_size"] = config.moe.latent_size or None
    if config.bfloat16_share != _share_where_none_is_given(config):
        values["bfloat16_share"] = config.bfloat16_share
    values.update(_layers("", config.pattern, layer_lists))
    if config.mtp is not None:
        values.update(_layers("mtp_", config.mtp.pattern, layer_lists))
        values["num_nextn_predict_layers"] = 1
        values["mtp_depth"] = config.mtp.depth
        values["mtp_loss_scaling_factor"] = config.mtp.loss_factor
    return {**values, **extra}


def _share_where_none_is_given(config: ModelConfig) -> float:
    """NVIDIA's files do not say how a model was trained, but the presets do: Ultra's last 16 layers in bfloat16."""
    same = (known.bfloat16_share for known in PRESETS.values() if same_network(known, config))
    return next(same, ModelConfig.bfloat16_share)


def _layers(prefix: str, pattern: str, as_list: bool) -> dict[str, Any]:
    if as_list:
        return {f"{prefix}layers_block_type": [_NAME_OF[letter] for letter in pattern]}
    return {f"{prefix}hybrid_override_pattern": pattern}


def _pop_pattern(rest: dict[str, Any], text_key: str, list_key: str) -> str | None:
    text, names = rest.pop(text_key, None), rest.pop(list_key, None)
    if names:
        unknown = [name for name in names if name not in _LETTER_OF]
        if unknown:
            raise ConfigError(
                f"config.json has the unknown block {unknown[0]!r} in {list_key} at position "
                f"{list(names).index(unknown[0])}: known are {', '.join(_LETTER_OF)}."
            )
        spelled = "".join(_LETTER_OF[name] for name in names)
        if text and text != spelled:
            raise ConfigError(f"config.json contradicts itself: {text_key} is {text!r}, {list_key} says {spelled!r}.")
        return spelled
    return text or None


def _pop_mtp(rest: dict[str, Any]) -> MTPConfig | None:
    """None without MTP; ``num_nextn_predict_layers`` 0 beside a list means that no module is stored."""
    pattern = _pop_pattern(rest, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    stored = rest.pop("num_nextn_predict_layers", None)
    depth, factor = rest.pop("mtp_depth", None), rest.pop("mtp_loss_scaling_factor", None)
    if pattern is None or not stored:
        return None
    if stored != 1:
        raise ConfigError(f"config.json stores {stored} MTP modules; only 1 (shared by all depths) is supported.")
    given = {name: value for name, value in (("depth", depth), ("loss_factor", factor)) if value is not None}
    return MTPConfig(pattern=pattern, **given)


def _check_time_step_limit(rest: dict[str, Any]) -> None:
    """Accepts the two spellings of (0, infinity), the only limit any released model was trained with."""
    limit = rest.pop("time_step_limit", None)
    if limit is None:
        return
    infinity = {"__float__": "Infinity"}
    low, high = limit
    if float(low) != 0 or not (high == infinity or high == float("inf")):
        raise ConfigError(f"config.json has time_step_limit={limit!r}; dt is never clamped here: (0, inf) only.")
