"""Nemotron 3.5 Lightning 30B-A3B: Nano with an MTP module (Megatron-LM's functional test).

Its pre-training hyper-parameters are not published: these are Nano's.

Command:  python train.py --config=configs/lightning.py --workdir=runs/lightning --config.data.blend=BLEND.json
          --config.data.tokenizer=TOKENIZER.json --config.parallel.fsdp=8 --config.train.microbatches=384
Hardware: not run: needs 8 GPUs of 141 GB (16 bytes a parameter for weights, gradients and AdamW: 527 GB)
Time:     not measured
Result:   not run; the first loss is near ln(131072) + 0.9^2/2 = 12.2
"""

from ml_collections import ConfigDict

from nemotron_jax.cli import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model.preset = "lightning"

    config.data.seq_len = 8192

    config.train.steps = 993_410  # 25T tokens
    config.train.global_batch_size = 3072  # 25.17M tokens
    config.train.validate_every = 1000

    config.optimizer.peak_lr = 1e-3
    config.optimizer.min_lr = 1e-5
    config.optimizer.warmup_steps = 334  # 8.4B tokens
    config.optimizer.decay_steps = 198_682  # 5T tokens

    config.checkpoint.every = 1000
    return config
