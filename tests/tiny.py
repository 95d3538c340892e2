"""A model with every block kind that runs in milliseconds, and runs of it."""

import dataclasses

import numpy as np

from nemotron_jax.config import AttentionConfig, MambaConfig, ModelConfig, MoEConfig, MTPConfig
from nemotron_jax.data.batch import Batch
from nemotron_jax.run_config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

TINY = ModelConfig(
    pattern="ME*-M",
    hidden_size=32,
    vocab_size=64,
    intermediate_size=48,
    mamba=MambaConfig(num_heads=4, head_dim=8, num_groups=2, state_size=8, chunk_size=8),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    moe=MoEConfig(num_experts=8, top_k=3, intermediate_size=24, shared_intermediate_size=40, latent_size=16),
    mtp=MTPConfig(pattern="*E", depth=2),
)

# Flags of ``train.py --config=configs/quickstart.py`` for a run of seconds.
QUICK_FLAGS = {
    "model.pattern": "ME*",
    "model.hidden_size": 64,
    "model.vocab_size": 512,
    "data.tokenizer": "bpe:400",
    "data.seq_len": 32,
    "data.validation_fraction": 0.2,
    "data.validation_batches": 2,
    "train.global_batch_size": 4,
    "log.every": 1,
}


def tiny_run(**groups: dict) -> RunConfig:
    """A RunConfig of TINY on one device; ``groups`` overrides keys: ``train={"steps": 4}``."""
    defaults = {
        "data": {"files": "unused", "seq_len": 16, "validation_fraction": 0.2, "validation_batches": 2},
        "train": {"steps": 8, "global_batch_size": 4, "remat": "none", "validate_every": 4},
        "optimizer": {"peak_lr": 1e-2, "warmup_steps": 2, "decay_steps": 2},
        "parallel": {"data": 1},
        "checkpoint": {"every": 2},
        "log": {"every": 1},
    }
    classes = {
        "data": DataConfig,
        "train": TrainConfig,
        "optimizer": OptimizerConfig,
        "parallel": ParallelConfig,
        "checkpoint": CheckpointConfig,
        "log": LogConfig,
    }
    model = groups.pop("model", dataclasses.replace(TINY, pattern="ME*"))
    parts = {name: cls(**{**defaults[name], **groups.pop(name, {})}) for name, cls in classes.items()}
    assert not groups, groups
    return RunConfig(model=model, **parts)


def random_batch(rng: np.random.Generator, rows: int = 4, time: int = 16, vocab: int = 64) -> Batch:
    """Packed rows of several documents, with a padded end."""
    tokens = rng.integers(0, vocab, (rows, time)).astype(np.int32)
    segments = np.cumsum(rng.random((rows, time)) < 0.2, axis=1).astype(np.int32) + 1
    segments[:, time - 2 :] = 0
    same = np.zeros((rows, time), bool)
    same[:, :-1] = segments[:, 1:] == segments[:, :-1]
    weights = (same & (segments != 0)).astype(np.float32)
    positions = np.zeros((rows, time), np.int32)
    for t in range(1, time):
        positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
    return Batch(tokens, np.roll(tokens, -1, axis=1), weights, segments, positions)
