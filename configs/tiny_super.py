"""Super's official tiny shape (NVIDIA-NeMo/Nemotron, super3/tiny_model.py), to try things on one machine.

With the released vocabulary it has 78M parameters, 67M of them embeddings. Only the shape is official, not the
hyper-parameters.

Command:  python train.py --config=configs/tiny_super.py --workdir=runs/tiny_super --config.data.files='DIR/*.jsonl'
Hardware: one GPU; with patience, a CPU
Time:     not run yet
Result:   not run yet; the first loss is near ln(131072) + 0.9^2/2 = 12.2
"""

from ml_collections import ConfigDict

from nemotron_jax.cli import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model.preset = "tiny-super"

    config.data.seq_len = 1024

    config.train.steps = 1000
    config.train.global_batch_size = 16

    config.optimizer.peak_lr = 1e-3
    config.optimizer.min_lr = 1e-5
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = 200
    return config
