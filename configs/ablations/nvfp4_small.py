"""NVFP4 pre-training and its ablations, small enough for two CPU cores: each part of the recipe left out once.

A hybrid MoE with every block kind of Super (1.3 M parameters) on the sources of Python's standard library: 120 steps
of 512 tokens, so each of the 61k tokens is seen once. The runs differ in nothing but the recipe: same data order, same
initial values. Rounding is emulated: on a CPU a quantised step costs many times one in bfloat16.

Command:  python configs/ablations/compare.py --config=configs/ablations/nvfp4_small.py --workdir=runs/nvfp4_small
          --at-once=2
Hardware: two CPU cores
Time:     9 min 4 s (15 minutes of CPU)
Result:   loss of the last 12 steps over bfloat16's 5.6486: nvfp4 +0.28 %, no-sr +0.38 %, no-rht +0.15 %, 1d-weights
          +0.70 %, all-layers +0.20 %. One seed and 6,144 tokens: the curves (nvfp4_small.png) cross, and their order
          says nothing. Zero gradients in the experts: 0.37 % in bfloat16, 0.44 % in nvfp4, 2.9 % in all-layers
"""

from ml_collections import ConfigDict

from nemotron_jax.cli import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model.preset = "quickstart"
    config.model.pattern = "ME*ME"
    config.model.hidden_size = 128
    config.model.vocab_size = 2048
    config.model.mtp.depth = 0
    config.model.mamba.num_heads = 16  # widths that divide by 16 (in_proj: 784) and, for out_proj, by 32
    config.model.mamba.head_dim = 8
    config.model.moe.latent_size = 64
    config.model.moe.intermediate_size = 128
    config.model.moe.shared_intermediate_size = 256

    config.data.files = "stdlib"
    config.data.tokenizer = "bpe:2048"
    config.data.seq_len = 256
    config.data.validation_fraction = 0.05

    config.train.steps = 120
    config.train.global_batch_size = 2
    config.train.remat = "none"
    config.train.validate_every = 120

    config.optimizer.peak_lr = 3e-3
    config.optimizer.min_lr = 3e-5
    config.optimizer.warmup_steps = 10
    config.optimizer.decay_steps = 40

    config.checkpoint.every = 40
    config.log.every = 1
    config.log.zero_gradients = True
    return config
