"""The stacked view: what it finds in the released patterns, scanned == unrolled, checkpoints identical."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemotron_jax.checkpoint.store import named_leaves
from nemotron_jax.config import MambaConfig, preset
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.parallel.stack import find_stack, scan_layers
from nemotron_jax.run_config import PrecisionConfig
from nemotron_jax.training.loop import DONE, pretrain
from nemotron_jax.training.state import TrainSetup
from nemotron_jax.training.step import global_batch, make_train_step
from tests.tiny import TINY, random_batch, tiny_run

MODEL = dataclasses.replace(
    TINY,
    pattern="MEMEM*EMEMEM*E-",  # 2 x [M 2 x [E M] * E] -
    mamba=MambaConfig(num_heads=16, head_dim=4, num_groups=2, state_size=8, chunk_size=8),
    moe=dataclasses.replace(TINY.moe, intermediate_size=32, shared_intermediate_size=48),
)
# What is compiled is shorter: a stack in a stack of every kind but the dense one, which stands alone.
SHORT = dataclasses.replace(MODEL, pattern="MEE*MEE*-", mtp=dataclasses.replace(TINY.mtp, pattern="*", depth=1))


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("nano", "M 2 x [E M] 4 x [* 3 x [E M]] 2 x [* 4 x [E M]] E"),
        ("super", "M 3 x [E M] 2 x [* 4 x [E M]] 4 x [* 5 x [E M]] 2 x [* 4 x [E M]] E"),
    ],
)
def test_the_released_patterns(name, spelled):
    pattern = preset(name).pattern
    stack = find_stack(pattern)
    assert stack.spell(pattern) == spelled
    numbers = np.concatenate([members.ravel() for members in stack.members])
    assert sorted(numbers) == list(range(len(pattern)))
    for members in stack.members:
        assert len({pattern[number] for number in members.flat}) == 1


@pytest.mark.parametrize("kinds", ["", "a", "aaaa", "abab", "abcabd", "aabaab", "abababc"])
def test_layers_run_in_order(kinds):
    stack = find_stack(kinds)
    leaves = [jnp.asarray(members) for members in stack.members]

    def apply(place, number_held, number, carry):
        return carry * 3 + number_held, {"held": number_held, "told": number, "place": jnp.int32(place)}

    carry, reports = scan_layers(stack, leaves, jnp.int32(0), apply)
    assert list(reports) == list(range(len(kinds)))
    expected = 0
    for number in range(len(kinds)):
        expected = expected * 3 + number
        assert int(reports[number]["held"]) == int(reports[number]["told"]) == number
    assert int(carry) == expected


def test_a_stack_is_cut_where_kinds_differ():
    assert find_stack("MEMEmeme").spell("MEMEmeme") == "2 x [M E] 2 x [m e]"
    setup = setup_of(stack_layers=True, recipe="nvfp4-no-sr")  # the last 3 of 15 layers are in bfloat16
    assert setup.stack.spell(MODEL.pattern) == "M 2 x [E M] * 3 x [E M] * E -"
    assert setup_of(stack_layers=True).stack.spell(MODEL.pattern) == "2 x [M 2 x [E M] * E] -"


def test_a_stack_is_cut_where_training_differs():
    setup = setup_of(stack_layers=True, trainable="-layers/6/*")
    assert all(numbers.tolist() in (6, [6]) for numbers in setup.stack.members if 6 in numbers)
    state = setup.abstract_state()
    trained, frozen = setup.split_params(state.params)
    place = next(place for place, numbers in enumerate(setup.stack.members) if 6 in numbers)
    assert {path[1] for path, _ in nnx.to_flat_state(frozen)} == {place}
    assert place not in {path[1] for path, _ in nnx.to_flat_state(trained) if path[0] == "layers"}


@functools.cache
def start():
    """A state in the canonical view, drawn on one device, so that it does not depend on the mesh."""
    return jax.device_get(setup_of(SHORT, stack_layers=False).init_state())


def after(setup, steps=2):
    """Metrics of some steps from equal parameters, the first gradients (a tenth of them), and the state at the end."""
    places = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_checkpoint())
    state = setup.from_checkpoint(jax.device_put(start(), places))
    rng = np.random.default_rng(3)
    metrics, step = [], make_train_step(setup)
    for number in range(steps):
        with jax.set_mesh(setup.mesh):
            state, told = step(state, global_batch(setup, random_batch(rng, rows=8)))
        metrics.append(jax.device_get(told))
        if number == 0:
            moments = named_leaves(setup.to_checkpoint(state).opt_state)
            gradients = {name: np.asarray(leaf, np.float64) for name, leaf in moments.items() if "mu/" in name}
    return metrics, gradients, state


def test_the_scans_around_each_layer():
    stack = find_stack("M" + 2 * ("*" + 3 * "EM") + "-")  # M 2 x [* 3 x [E M]] -
    outer, first, second = range(1, 15), range(2, 8), range(9, 15)
    inner = [(outer,), *6 * [(outer, first)], (outer,), *6 * [(outer, second)]]
    assert stack.around == ((), *inner, ())


@pytest.mark.parametrize(
    ("remat", "devices", "axes", "tolerance"),
    [
        ("full", 1, {}, 1e-5),
        pytest.param("full", 8, {"fsdp": 2, "expert": 2, "context": 2}, 2e-5, marks=pytest.mark.slow),
        pytest.param("none", 8, {"fsdp": 2, "expert": 2, "tensor": 2}, 2e-5, marks=pytest.mark.slow),
    ],
)
def test_scanned_equals_unrolled(remat, devices, axes, tolerance):
    train = {"remat": remat, "microbatches": 2}
    one, expected, _ = after(setup_of(SHORT, stack_layers=False, train=train))
    setup = setup_of(SHORT, stack_layers=True, train=train, devices=devices, **axes)
    assert setup.stack.spell(SHORT.pattern) == "2 x [M 2 x [E] *] -"
    two, found, _ = after(setup)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=tolerance, atol=tolerance, err_msg=name)
    assert found.keys() == expected.keys()
    errors = {name: np.linalg.norm(found[name] - g) / np.linalg.norm(g) for name, g in expected.items()}
    assert max(errors.values()) < tolerance, errors


def test_a_state_there_and_back_is_the_same():
    axes = {"fsdp": 2, "tensor": 2, "expert": 2}
    setup = setup_of(SHORT, stack_layers=True, devices=8, **axes)
    state = setup.init_state()
    canonical = setup.to_checkpoint(state)
    unrolled = named_leaves(setup_of(SHORT, stack_layers=False, devices=8, **axes).init_state())
    found = named_leaves(canonical)
    assert found.keys() == unrolled.keys()
    for name, leaf in unrolled.items():
        assert found[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    assert found["params/layers/1/norm/weight"].sharding.memory_kind == "pinned_host"
    # What is read again lies on the devices as abstract_checkpoint says.
    read = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), canonical, setup.abstract_checkpoint())
    again = setup.from_checkpoint(read)
    for name, leaf in named_leaves(state).items():
        np.testing.assert_array_equal(named_leaves(again)[name], leaf)
        assert named_leaves(again)[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name


def test_a_run_may_change_its_view(tmp_path):
    """Checkpoints have no view: a run goes on in the other one."""
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of {n * n} and no more" for n in range(400)))

    def config(steps, *, stack_layers):
        return tiny_run(
            model=dataclasses.replace(TINY, vocab_size=320, pattern="EE", mtp=None),
            data={"files": str(tmp_path / "text.txt"), "tokenizer": "bpe:300", "validation_fraction": 0.0},
            train={"steps": steps, "validate_every": 100, "global_batch_size": 8},
            optimizer={"decay_steps": 0},
            parallel={"data": 8, "stack_layers": stack_layers},
        )

    def rows(name):
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert pretrain(config(4, stack_layers=False), tmp_path / "one") == DONE
    for steps, stack_layers in ((2, True), (4, False)):
        assert pretrain(config(steps, stack_layers=stack_layers), tmp_path / "two") == DONE
    np.testing.assert_allclose(rows("two"), rows("one"), rtol=1e-5)


def test_a_stack_is_cut_where_either_recipe_of_a_run_cuts_it():
    setup = setup_of(stack_layers=True, recipe="bfloat16", switch_to="nvfp4-no-sr")
    assert setup.stack == setup_of(stack_layers=True, recipe="nvfp4-no-sr").stack
    assert [part.stack for _, part in setup.phases] == [setup.stack] * 2


def setup_of(model=MODEL, *, stack_layers, recipe="float32", switch_to="", devices=1, train=None, trainable="", **axes):
    config = tiny_run(
        model=model,
        data={"seq_len": 16},
        train={"global_batch_size": 8, "steps": 4, "trainable": trainable, **(train or {})},
        optimizer={"clip": 1e9},
        parallel={"data": 1, **axes, "stack_layers": stack_layers},
        log={"zero_gradients": True},
    )
    switch = {"switch_at": 2, "switch_to": switch_to} if switch_to else {}
    config = dataclasses.replace(config, precision=PrecisionConfig(recipe, **switch))
    return TrainSetup(config, make_mesh(config.parallel, jax.devices()[:devices]))
