"""Training steps on a GPU, through every kernel: repeated from the same state, they end in the same bits."""

import dataclasses

import jax
import numpy as np
import pytest

from nemotron_jax.config import AttentionConfig, MambaConfig, ModelConfig, MoEConfig
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.run_config import PrecisionConfig
from nemotron_jax.training.state import TrainSetup
from nemotron_jax.training.step import global_batch, make_train_step
from tests.tiny import random_batch, tiny_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

ROWS, TIME, VOCAB = 2, 8192, 2048  # shorter rows repeat even where sums have no order
MODEL = ModelConfig(  # widths that the kernels take
    pattern="ME*E",
    hidden_size=256,
    vocab_size=VOCAB,
    mamba=MambaConfig(num_heads=16, head_dim=64, num_groups=2, state_size=128),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=128),
    moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=256, shared_intermediate_size=256),
)


@pytest.mark.parametrize("recipe", ["bfloat16", "nvfp4-all-layers"])
def test_steps_repeat_bit_for_bit(recipe):
    config = dataclasses.replace(
        tiny_run(model=MODEL, data={"seq_len": TIME}, train={"global_batch_size": ROWS}),
        precision=PrecisionConfig(recipe),
    )
    setup = TrainSetup(config, make_mesh(config.parallel, jax.devices()[:1]))
    batch = random_batch(np.random.default_rng(0), ROWS, TIME, VOCAB)
    # Documents of 5 tokens on average in random_batch: here of about 100, and one that fills a row.
    segments = np.maximum(batch.segment_ids // 20, 1)
    segments[0] = 1
    batch = dataclasses.replace(batch, segment_ids=segments)
    with jax.set_mesh(setup.mesh):
        step, start = make_train_step(setup), jax.device_get(setup.init_state())
        ends = []
        for _ in range(4):
            state = jax.device_put(start, setup.state_shardings())
            for _ in range(3):
                state, metrics = step(state, global_batch(setup, batch))
            assert np.isfinite(jax.device_get(metrics["loss"]))
            ends.append(jax.tree.leaves(jax.device_get(state)))
    for end in ends[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(ends[0], end, strict=True)), "two runs differ"
