"""The quickstart model's first losses: a change that is meant to change nothing keeps them.

``python tests/golden/test_golden.py`` writes quickstart.json anew, after a change that is meant to change them.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from nemotron_jax.config import preset
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.training.state import TrainSetup
from nemotron_jax.training.step import global_batch, make_train_step
from tests.tiny import random_batch, tiny_run

GOLDEN = Path(__file__).with_name("quickstart.json")
NAMES = ("loss", "mtp_loss_1", "load_balance_loss", "grad_norm")


def first_steps():
    config = tiny_run(model=preset("quickstart"), data={"seq_len": 96}, optimizer={"peak_lr": 3e-3})
    setup = TrainSetup(config, make_mesh(config.parallel, jax.devices()[:1]))
    state, step = setup.init_state(), make_train_step(setup)
    rng = np.random.default_rng(0)
    rows = []
    with jax.set_mesh(setup.mesh):
        for _ in range(4):
            batch = random_batch(rng, rows=4, time=96, vocab=config.model.vocab_size)
            state, metrics = step(state, global_batch(setup, batch))
            rows.append({name: float(metrics[name]) for name in NAMES})
    return rows


def test_golden_losses():
    expected = json.loads(GOLDEN.read_text())
    for row, golden in zip(first_steps(), expected, strict=True):
        assert row == pytest.approx(golden, rel=1e-5)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(first_steps(), indent=2) + "\n")
