"""A step on 8 devices equals the step on one: loss, each gradient, and ten losses, for every axis and for mixtures."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from nemotron_jax.checkpoint.store import named_leaves
from nemotron_jax.config import AttentionConfig, MambaConfig, MTPConfig
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.run_config import ParallelConfig
from nemotron_jax.training.state import TrainSetup
from nemotron_jax.training.step import global_batch, make_train_step
from tests.tiny import TINY, random_batch, tiny_run

# Heads and groups for eight devices; two key/value heads, which fewer than eight devices can share.
MODEL = dataclasses.replace(
    TINY,
    pattern="ME*-",
    mamba=MambaConfig(num_heads=8, head_dim=4, num_groups=8, state_size=4, chunk_size=8),
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=8),
    mtp=MTPConfig(pattern="E", depth=2),
)
SLOW = pytest.mark.slow
MESHES = [
    "fsdp=2,context=2,tensor=2",
    "data=2,expert=4",
    pytest.param("data=8", marks=SLOW),
    pytest.param("fsdp=8", marks=SLOW),
    pytest.param("expert=8", marks=SLOW),
    pytest.param("context=8", marks=SLOW),
    pytest.param("tensor=8", marks=SLOW),
    pytest.param("fsdp=2,context=4", marks=SLOW),
    pytest.param("expert=2,context=4", marks=SLOW),
    pytest.param("fsdp=2,expert=2,tensor=2", marks=SLOW),
    pytest.param("data=2,context=2,tensor=2", marks=SLOW),
    pytest.param("fsdp=2,expert=2,context=2", marks=SLOW),
]


@functools.cache
def ten_steps(axes: str, devices: int):
    """Losses of ten steps, and the gradients of the first: nothing is clipped, so the first moments are 0.1 of them."""
    sizes = dict.fromkeys(("data",), 1) | {
        name: int(size) for name, size in (p.split("=") for p in axes.split(",") if p)
    }
    config = tiny_run(
        model=MODEL,
        data={"seq_len": 32},
        train={"global_batch_size": 8, "steps": 10},
        optimizer={"clip": 1e9},
        parallel=sizes,
    )
    setup = TrainSetup(config, make_mesh(ParallelConfig(**sizes), jax.devices()[:devices]))
    rng = np.random.default_rng(2)
    batches = [random_batch(rng, rows=8, time=32) for _ in range(3)]
    # Initial values are drawn on one device: what is compared are steps from equal parameters.
    one = TrainSetup(config, make_mesh(ParallelConfig(data=1), jax.devices()[:1]))
    state = jax.device_put(jax.device_get(one.init_state()), setup.state_shardings())
    step, losses, gradients = make_train_step(setup), [], {}
    with jax.set_mesh(setup.mesh):
        for number in range(10):
            state, metrics = step(state, global_batch(setup, batches[number % 3]))
            losses.append(float(metrics["loss"]))
            if number == 0:
                moments = named_leaves(jax.device_get(state.opt_state))
                gradients = {name: np.asarray(leaf, np.float64) for name, leaf in moments.items() if "mu/" in name}
    return losses, gradients


@pytest.mark.parametrize("axes", MESHES)
def test_a_step_equals_that_of_one_device(axes):
    losses, gradients = ten_steps(axes, 8)
    expected_losses, expected = ten_steps("", 1)
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-5)
    np.testing.assert_allclose(losses, expected_losses, atol=1e-4)
    assert losses[-1] < losses[0]
    assert gradients.keys() == expected.keys() and len(expected) > 40
    errors = {name: np.linalg.norm(gradients[name] - g) / np.linalg.norm(g) for name, g in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-5, (worst, errors[worst])
