"""NVFP4 pre-training and its ablations, small enough for two CPU cores: each part of the recipe left out once.

A hybrid MoE with every block kind of Super (1.3 M parameters) on the sources of Python's standard library: 120 steps
of 512 tokens, so each of the 61k tokens is seen once. The runs differ in nothing but the recipe: same data order, same
initial values. Rounding is emulated: on a CPU a quantised step costs many times one in bfloat16.

Command:  python configs/ablations/compare.py --config=configs/ablations/nvfp4_small.py --workdir=runs/nvfp4_small
Hardware: two CPU cores
Time:     14 min 44 s beside a run of the test suite (15.9 minutes of CPU); not measured on an idle machine
Result:   loss of the last 12 steps over bfloat16's 5.6486: nvfp4 +0.07 %, no-sr -0.11 %, no-rht +0.30 %, 1d-weights
          +0.66 %, all-layers +0.28 %. One seed and 6,144 tokens: the curves (nvfp4_small.png) cross, and their order
          says nothing. Zero gradients in the experts: 0.37 % in bfloat16, 0.55 % in nvfp4, up to 1.95 % without parts
          of the recipe
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
