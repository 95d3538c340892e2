"""The schedule."""

import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.run_config import OptimizerConfig
from nemotron_jax.training.optimizer import learning_rate

CONFIG = OptimizerConfig(peak_lr=1.0, min_lr=0.01, warmup_steps=10, decay_steps=20)


def rates(config, steps):
    return np.asarray([learning_rate(config, steps, jnp.int32(step)) for step in range(steps)])


def test_warmup_stable_decay():
    lr = rates(CONFIG, 100)
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(lr[10:80], 1.0)
    np.testing.assert_allclose(lr[80:], 1 - 0.99 * np.sqrt(np.arange(1, 21) / 20), rtol=1e-5)
    assert lr[-1] == pytest.approx(0.01)


def test_more_steps_move_the_decay_to_the_new_end():
    longer = rates(CONFIG, 200)
    assert longer[179] == 1.0 and longer[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("steps", [1, 5, 10, 12, 25])
def test_short_runs_clip_warmup_and_decay(steps):
    lr = rates(CONFIG, steps)
    assert np.isfinite(lr).all() and (lr > 0).all() and lr.max() <= 1.0
    assert lr[0] == pytest.approx(1 / min(10, steps), rel=1e-5)
    if steps > 10:
        assert lr[-1] == pytest.approx(0.01)


def test_no_warmup_and_no_decay():
    np.testing.assert_allclose(rates(OptimizerConfig(peak_lr=0.5, warmup_steps=0, decay_steps=0), 7), 0.5)
