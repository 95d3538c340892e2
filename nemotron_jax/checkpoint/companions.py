"""The small files beside the weights: tokenizer, chat template, generation defaults, the code of config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemotron_jax.checkpoint.store import read_json
from nemotron_jax.config import ModelConfig, same_network
from nemotron_jax.errors import ConfigError
from nemotron_jax.hf_config import from_hf, to_hf

CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates",
    "configuration_*.py",
    "modeling_*.py",
)
HF_CONFIG = "hf_config.json"  # of a training workdir: the config.json of the checkpoint that it began with
GENERATION_CONFIG = "generation_config.json"
IM_END = 11  # <|im_end|> closes a turn of a conversation; config.json names only </s>


def carry(source: Path, target: Path) -> None:
    """Copies the small files that ``target`` has not. Links are followed."""
    for pattern in CARRIED:
        for path in source.glob(pattern):
            if (target / path.name).exists():
                continue
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)


def carry_to_workdir(source: Path, target: Path) -> None:
    """Takes along what an export of the run will need: also the Hugging Face config.json, under a name of its own."""
    carry(source, target)
    if not (target / HF_CONFIG).exists():
        shutil.copyfile(source / "config.json", target / HF_CONFIG)


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """generation_config.json of a model that has none: generation stops at the end of a text, and of a turn."""
    ends = [config.eos_id] + ([IM_END] if config.vocab_size > IM_END != config.eos_id else [])
    return {"bos_token_id": config.bos_id, "eos_token_id": ends, "pad_token_id": config.pad_id}


def hf_values(config: ModelConfig, original: Path | None) -> dict[str, Any]:
    """config.json of a model: as it was (``original``), where that describes the same network, else made anew."""
    values = read_json(original, "a Hugging Face config.json") if original and original.exists() else None
    if values is not None:
        try:
            theirs = from_hf(values)
            if same_network(theirs, config):
                longest = {"max_position_embeddings": config.max_positions}
                return values if theirs.max_positions == config.max_positions else values | longest
        except ConfigError:
            pass
    return to_hf(config, layer_lists=values is not None and "layers_block_type" in values)


def write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
