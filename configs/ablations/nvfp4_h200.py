"""NVFP4 pre-training and its ablations at the size of the small published comparisons, for H200s.

A hybrid MoE shaped like Super (latent experts, 8 of 64 a token; 44 M active parameters without embeddings) for 200M
tokens on the Python sources of the packages that are installed beside it. How many unique tokens that is depends on
the machine: the start-up table says ("data"), and tokens of the run over unique tokens are the epochs. A run that is
stopped goes on from its checkpoint by the same command.

Command:  python configs/ablations/compare.py --config=configs/ablations/nvfp4_h200.py --workdir=runs/nvfp4_h200
          --runs=bfloat16,bfloat16:1,nvfp4,nvfp4:1,nvfp4-no-sr,nvfp4-no-rht,nvfp4-1d-weights,nvfp4-all-layers
          (--at-once=8 where there are GPUs for it)
Hardware: one H200 or more
Time:     on two H200s with --at-once=8, 2026-11-28: 4 to 5 minutes to the first NVFP4 step, while eight programs
          compile on 32 cores; then 95 k tokens/s a run, four runs a GPU (200M tokens would take 35 minutes). A run with
          a GPU to itself did 290 k with steps of one program (2026-11-27), bfloat16 768 k
Result:   (four H200s, 2026-11-27, with one microbatch and layers that were not stacked)
          not the 200M tokens: with --config.train.steps=1600, bfloat16 (two seeds) and nvfp4-no-rht ended, the others
          did 400 to 710 steps. At 42M tokens loss is above bfloat16's by 0.52 % and 0.45 % (nvfp4, two seeds), 0.49 %
          (no-sr), 0.54 % (no-rht), 0.62 % (1d-weights); all-layers 3.2 % at 26M tokens, where nvfp4 has 1.6 %. no-rht
          ends at 0.32 % (105M tokens). Hardly any gradient is exactly zero, in any recipe (nvfp4_h200.png,
          BENCHMARKS.md). The white paper (arXiv 2512.20856, 2.4) gives a gap below 1 % at Nano's scale, and about 3
          times the zero gradients of bfloat16 (Super report, 2.2)
"""

import sysconfig

from ml_collections import ConfigDict

from nemotron_jax.cli import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model.preset = "tiny-super"
    config.model.pattern = "MEMEM*EMEMEM*EME"  # of 16 layers the last 3 stay in bfloat16
    config.model.hidden_size = 512
    config.model.vocab_size = 16384
    config.model.mtp.depth = 0
    config.model.mamba.num_heads = 16  # in_proj: 4,112 outputs, a multiple of 16
    config.model.mamba.head_dim = 64
    config.model.attention.num_heads = 8
    config.model.moe.num_experts = 64
    config.model.moe.top_k = 8
    config.model.moe.latent_size = 256
    config.model.moe.intermediate_size = 512
    config.model.moe.shared_intermediate_size = 1024

    config.data.files = f"{sysconfig.get_path('purelib')}/**/*.py"
    config.data.tokenizer = "bpe:16384"
    config.data.seq_len = 1024

    config.train.steps = 3052  # 200M tokens
    config.train.global_batch_size = 64
    config.train.microbatches = 2  # a run takes 22 GB, by its compiled step: four on an H200
    config.train.remat = "none"
    config.train.validate_every = 500

    config.optimizer.peak_lr = 1e-3
    config.optimizer.min_lr = 1e-5
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = 600

    config.parallel.stack_layers = True  # compiles in two minutes, ten without

    config.checkpoint.every = 250
    config.log.zero_gradients = True
    return config
