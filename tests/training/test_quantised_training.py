"""Steps of training under the quantised recipes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from nemotron_jax.model.nemotron import abstract
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.precision.quantized import OPERANDS
from nemotron_jax.precision.recipe import QUANTIZED, recipe
from nemotron_jax.run_config import PrecisionConfig
from nemotron_jax.training.state import TrainSetup
from nemotron_jax.training.step import TrainSteps, global_batch, make_train_step
from tests.tiny import TINY, random_batch, tiny_run

MODEL = dataclasses.replace(
    TINY,
    pattern="ME*M",  # the last one stays in bfloat16
    intermediate_size=64,
    mamba=dataclasses.replace(TINY.mamba, num_heads=32, num_groups=2),
    moe=dataclasses.replace(TINY.moe, intermediate_size=32, shared_intermediate_size=64, latent_size=32),
    mtp=dataclasses.replace(TINY.mtp, depth=1),
)
BATCHES = [random_batch(np.random.default_rng(seed)) for seed in range(3)]


@functools.cache
def compiled(name, axis):
    """(setup, step) on one device, or on two along a mesh axis."""
    parallel = {"data": 1} | ({axis: 2} if axis else {})
    config = dataclasses.replace(tiny_run(model=MODEL, parallel=parallel), precision=PrecisionConfig(name))
    setup = TrainSetup(config, make_mesh(config.parallel, jax.devices()[: 2 if axis else 1]))
    return setup, make_train_step(setup)


LOGGED = {}  # metrics of the last step


def run(name, axis=None):
    """Loss and gradient norm of three steps, and the parameters at the end."""
    setup, step = compiled(name, axis)
    found = []
    with jax.set_mesh(setup.mesh):
        state = jax.device_put(setup.init_state(), setup.state_shardings())
        for batch in BATCHES:
            state, metrics = step(state, global_batch(setup, batch))
            found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    LOGGED[name, axis] = jax.device_get(metrics)
    return np.array(found), jax.device_get(state.params)


losses = functools.cache(run)


SLOW = pytest.mark.slow  # each recipe is a program of its own to compile


@SLOW
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-all-layers", "mxfp8", "fp8"])
def test_the_loss_is_near_that_of_bfloat16(name):
    exact, _ = losses("bfloat16")
    found, _ = losses(name)
    assert np.isfinite(found).all() and (found != exact).all()
    tolerance = 0.03 if "nvfp4" in name else 0.01
    np.testing.assert_allclose(found[:, 0], exact[:, 0], rtol=tolerance)
    np.testing.assert_allclose(found[:, 1], exact[:, 1], rtol=5 * tolerance)


@SLOW
@pytest.mark.parametrize("name", sorted(set(QUANTIZED) - {"nvfp4", "nvfp4-all-layers", "mxfp8", "fp8"}))
def test_each_ablation_is_another_run(name):
    found, full = losses(name)[0], losses("nvfp4")[0]
    assert np.isfinite(found).all()
    same_forward = name != "nvfp4-1d-weights"
    assert (found[0, 0] == full[0, 0]) == same_forward and found[0, 1] != full[0, 1]


def test_runs_repeat_bit_for_bit():
    first, again = losses("nvfp4"), run("nvfp4")
    np.testing.assert_array_equal(first[0], again[0])
    jax.tree.map(np.testing.assert_array_equal, first[1], again[1])


def test_statistics_are_logged():
    """For each kind of weight that is quantised somewhere; nothing of it where nothing is quantised."""
    losses("nvfp4"), losses("bfloat16")
    logged = LOGGED["nvfp4", None]
    quantised = {"in_proj", "out_proj", "experts/up_proj", "experts/down_proj"}
    quantised |= {f"shared_experts/{name}" for name in ("up_proj", "down_proj")}
    for name in quantised:
        assert logged[f"non_finite/{name}"] == 0
        for operand in OPERANDS:
            # Half of the blocks have a scale that was rounded down, so that their largest element is above it; that
            # is most of a block where few tokens came to an expert, which the Hadamard transform makes all alike.
            most = 0.5 if operand.endswith("tokens") else 0.1
            assert 0 <= logged[f"flushed/{name}/{operand}"] < 1 and 0 <= logged[f"saturated/{name}/{operand}"] < most
        # In a block some elements are much smaller than the largest. MXFP8 keeps these.
        assert (logged[f"flushed/{name}/x"] > 0.02) == (name != "out_proj")
    weights = {name.split("/", 1)[1] for name in logged if name.startswith("zero_gradients/")}
    assert weights == quantised | {"eh_proj", "fc1_latent_proj", "fc2_latent_proj"} | {f"{p}_proj" for p in "qkvo"}
    assert {name.split("/", 1)[1].rsplit("/", 1)[0] for name in logged if name.startswith("flushed/")} == quantised
    assert not [name for name in LOGGED["bfloat16", None] if "/" in name]


@SLOW
def test_steps_that_are_not_logged_count_nothing_and_train_the_same():
    """Two programs: equal to rounding, each of the steps that are its own."""
    setup, _ = compiled("nvfp4", None)
    config = dataclasses.replace(setup.config, log=dataclasses.replace(setup.config.log, every=2))
    steps = TrainSteps(dataclasses.replace(setup, config=config))
    state, found = setup.init_state(), []
    with jax.set_mesh(setup.mesh):
        for number, batch in enumerate(BATCHES, start=1):
            state, metrics = steps(number, state, global_batch(setup, batch))
            found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
            assert any(name.startswith("flushed/") for name in metrics) == (number < 3)  # the first, and every second
            assert any(name.startswith("zero_gradients/") for name in metrics) == (number < 3)
    np.testing.assert_allclose(found, losses("nvfp4")[0], rtol=1e-3)


@SLOW
@pytest.mark.parametrize("axis", ["fsdp", "expert", "tensor"])
def test_on_a_mesh(axis):
    """The same amax, blocks and bits; a sum in another order moves a few elements to another code."""
    found, one = losses("nvfp4", axis)[0], losses("nvfp4")[0]
    np.testing.assert_allclose(found[0], one[0], rtol=1e-2)
    np.testing.assert_allclose(found, one, rtol=0.03)
    for name, value in LOGGED["nvfp4", None].items():  # counts are summed over the devices
        if name.startswith("flushed/"):
            np.testing.assert_allclose(
                LOGGED["nvfp4", axis][name], value, rtol=0.5, atol=0.02
            )  # a device has few rows of an expert


def test_layers_of_a_kind_share_their_definition():
    """M and E in NVFP4, and both in bfloat16 at the end."""
    config = dataclasses.replace(MODEL, pattern="MEMEMEMEME")
    definitions = [nnx.split(layer)[0] for layer in abstract(config, recipe("nvfp4", config)).layers]
    assert len(set(definitions[:8])) == 2 and len(set(definitions)) == 4
