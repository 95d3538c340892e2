"""The quickstart in NVFP4, and in MXFP8 from the decay of the learning rate on (Super report, late-stage switch).

What a model needs whose widths do not all divide by 16: in_proj, with 1,032 outputs, is left in bfloat16 by a rule.
Rounding is emulated here, at many times the cost of a step in bfloat16.

Command:  python train.py --config=configs/quickstart_nvfp4.py --workdir=runs/quickstart_nvfp4
Hardware: two CPU cores
Time:     not measured
Result:   not run to the end
"""

from ml_collections import ConfigDict

from nemotron_jax.cli import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model.preset = "quickstart"

    config.precision.recipe = "nvfp4"
    config.precision.exclude = "layers/*/mixer/in_proj"
    config.precision.switch_at = 120  # of 200 steps: the last 80 decay the learning rate
    config.precision.switch_to = "mxfp8"

    config.data.files = "stdlib"
    config.data.tokenizer = "bpe:8192"
    config.data.seq_len = 256
    config.data.validation_fraction = 0.05  # 29 documents; the default would hold out 6

    config.train.steps = 200
    config.train.global_batch_size = 8
    config.train.microbatches = 1
    config.train.remat = "none"  # activations are small, and recomputing them would cost a third of the time
    config.train.validate_every = 50

    config.optimizer.peak_lr = 3e-3
    config.optimizer.min_lr = 3e-5
    config.optimizer.warmup_steps = 20
    config.optimizer.decay_steps = 80

    config.checkpoint.every = 50
    config.log.every = 5
    return config
