"""Pre-training of Nemotron 3 Super 120B-A12B (Super report, 2.4): 25T tokens.

Iterations are those of the official recipe. Here in bfloat16; the released model was trained in NVFP4.

Command:  python train.py --config=configs/super.py --workdir=runs/super --config.data.blend=BLEND.json
          --config.data.tokenizer=TOKENIZER.json --config.parallel.fsdp=32 --config.train.microbatches=96
Hardware: not run: needs 32 GPUs of 141 GB (16 bytes a parameter for weights, gradients and AdamW: 1,978 GB)
Time:     not measured; 25T tokens x 85.6 GFLOP = 2.1e24 FLOP
Result:   not run; the first loss is near ln(131072) + 0.9^2/2 = 12.2
"""

from ml_collections import ConfigDict

from nemotron_jax.cli import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model.preset = "super"

    config.data.seq_len = 8192

    config.parallel.stack_layers = True  # unrolled, the gathered weights of many layers are held at a time

    config.train.steps = 993_404  # 25T tokens
    config.train.global_batch_size = 3072  # 25.17M tokens
    config.train.validate_every = 1000

    config.optimizer.peak_lr = 4.5e-4
    config.optimizer.min_lr = 4.5e-6
    config.optimizer.warmup_steps = 7_949  # 200B tokens
    config.optimizer.decay_steps = 198_682  # 5T tokens

    config.checkpoint.every = 1000  # 25B tokens, what checkpoint merging averages (Super report, 2.5)
    return config
