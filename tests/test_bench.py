"""`python -m nemotron_jax bench`: programs, their arguments, and what is said about them."""

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax import __main__ as front
from nemotron_jax import bench
from nemotron_jax.config import preset, replace
from nemotron_jax.errors import ConfigError, UserError
from nemotron_jax.model.counts import count_parameters, flops_per_token
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.run_config import ParallelConfig

MODEL = replace(preset("quickstart"), {"pattern": "ME*", "vocab_size": 512, "moe": {"num_experts": 4}})
WORK = bench.Workload(MODEL, batch=8, seq=32, precision="bfloat16", steps=2)
MESH = make_mesh(ParallelConfig())


def program(what: str, **changes) -> bench.Program:
    return bench.PROGRAMS[what](dataclasses.replace(WORK, **changes), MESH)


def leaves(tree) -> dict[str, jax.ShapeDtypeStruct]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("what", bench.PROGRAMS)
def test_a_command_prints_one_object(capfd, monkeypatch, what: str):
    monkeypatch.setitem(front.PRESETS, "here", MODEL)
    assert (
        front.run(["bench", what, "--preset=here", "--batch=8", "--seq=32", "--steps=2", "--mesh=data=4,fsdp=2"]) == 0
    )
    result = json.loads(capfd.readouterr().out)
    assert result["bench"] == what
    assert result["devices"] == "8 x cpu" and result["mesh"] == "data=4, fsdp=2"
    assert result["collectives"]["all-gather"] > 0
    tokens = 8 if what == "decode" else 8 * 32
    assert result["tokens_per_second"] == pytest.approx(1e3 * tokens / result["step_ms"], rel=0.01)
    assert 0 < result["step_ms_min"] <= result["step_ms"] and result["steps"] == 2
    seconds = result["compile_seconds"]
    assert seconds["total"] > seconds["tracing"] > 0 and seconds["cache"] == "empty"
    assert result["mfu"] is None  # the peak of this CPU is not known
    assert result["operations"]["ssd"] == "reference" and result["precision"] == "float32"
    if what == "train":
        assert result["loss"] == pytest.approx(1.3 * math.log(MODEL.vocab_size), rel=0.2)  # MTP counts 0.3


def test_a_profile_is_of_gpus_and_of_steps_that_run(monkeypatch, tmp_path):
    monkeypatch.setitem(front.PRESETS, "here", MODEL)
    profiled = ["bench", "train", "--preset=here", f"--profile={tmp_path}"]
    with pytest.raises(UserError, match="here are devices of kind 'cpu'"):
        front.run(profiled)
    with pytest.raises(UserError, match="leave out --compile-only"):
        front.run([*profiled, "--compile-only"])


def test_another_process_finds_what_was_compiled(capfd, monkeypatch, tmp_path):
    monkeypatch.setitem(front.PRESETS, "here", MODEL)
    arguments = ["bench", "decode", "--preset=here", "--batch=8", "--seq=32", "--compile-only", f"--cache={tmp_path}"]
    results = []
    for _ in range(2):
        assert front.run(arguments) == 0
        results.append(json.loads(capfd.readouterr().out))
        jax.clear_caches()
    first, second = (result["compile_seconds"] for result in results)
    assert (first["cache"], second["cache"]) == ("empty", "warm")
    assert second["total"] < first["total"] and "step_ms" not in results[0]


def test_training_keeps_weights_and_gradients_in_bfloat16_and_nothing_else():
    one = program("train")
    params, _, _ = one.shapes
    dtypes = {path: leaf.dtype for path, leaf in leaves(params).items()}
    wide = {path for path, dtype in dtypes.items() if dtype == jnp.float32}
    assert {path for path in dtypes if "gate" in path} <= wide
    assert all(leaf.ndim == 1 for path, leaf in leaves(params).items() if path in wide and "gate" not in path)
    assert all(dtypes[path] == jnp.bfloat16 for path in dtypes.keys() - wide)
    loss, grads = jax.eval_shape(one.step, *one.shapes)
    assert loss.dtype == jnp.float32
    assert {path: leaf.dtype for path, leaf in leaves(grads).items()} == dtypes
    assert one.parameters == count_parameters(MODEL)["total"]
    made = one.start()
    assert all(
        a.sharding == b.sharding for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(one.shapes), strict=True)
    )


def test_gradients_are_those_of_the_loss_and_finite():
    one = program("train", precision="float32")
    arguments = one.start()
    with jax.set_mesh(MESH):
        loss, grads = one.step(*arguments)
        assert float(loss) == pytest.approx(1.3 * math.log(MODEL.vocab_size), rel=0.1)  # 0.3 of it from MTP
        assert all(bool(jnp.isfinite(grad).all()) for grad in jax.tree.leaves(grads))
        downhill = jax.tree.map(lambda w, g: w - 0.01 * g, arguments[0], grads)
        norm2 = sum(float((grad.astype(jnp.float32) ** 2).sum()) for grad in jax.tree.leaves(grads))
        after, _ = one.step(downhill, *arguments[1:])
    assert float(after) - float(loss) == pytest.approx(-0.01 * norm2, rel=0.2)


def test_the_whole_step_has_float32_weights_and_trains():
    one = program("train", optimizer=True)
    state = one.start()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state[0].params))
    assert one.parameters == count_parameters(MODEL)["total"]
    with jax.set_mesh(MESH):
        results = one.step(*state)
    assert int(one.following(state, results)[0].step) == 1


def test_documents_are_packed():
    plain, packed = bench._batch(WORK), bench._batch(dataclasses.replace(WORK, documents=4))
    assert plain.segment_ids is None
    np.testing.assert_array_equal(plain.loss_weights.sum(1), 31)
    np.testing.assert_array_equal(packed.segment_ids[0], np.repeat([1, 2, 3, 4], 8))
    np.testing.assert_array_equal(packed.positions[0], np.tile(np.arange(8), 4))
    np.testing.assert_array_equal(packed.loss_weights[0], np.tile([1] * 7 + [0], 4))
    counted = packed.loss_weights > 0
    np.testing.assert_array_equal(packed.targets[counted], np.roll(packed.tokens, -1, axis=1)[counted])


def test_decoding_goes_on_behind_a_filled_state():
    one = program("decode")
    arguments = one.start()
    state = arguments[3]
    np.testing.assert_array_equal(state.lengths, 32)
    filled = jax.tree.leaves(state.layers)
    assert all(float(jnp.abs(leaf.astype(jnp.float32)).max()) > 0 for leaf in filled)
    with jax.set_mesh(MESH):
        results = one.step(*arguments)
    following = one.following(arguments, results)
    np.testing.assert_array_equal(following[3].lengths, 33)
    assert following[2].shape == arguments[2].shape == (8, 1)
    assert "mtp" not in "".join(leaves(arguments[0]))


def test_floating_point_operations_of_a_step():
    without_mtp = dataclasses.replace(MODEL, mtp=None)
    assert program("train").flops == 8 * 32 * flops_per_token(MODEL, 32)
    head = 2 * MODEL.hidden_size * MODEL.vocab_size
    assert program("prefill").flops == pytest.approx(8 * 32 * flops_per_token(without_mtp, 32) / 3 - 8 * 31 * head)
    attending = 4 * 32 * MODEL.attention.num_heads * MODEL.attention.head_dim  # each of 32 keys, twice
    rest = flops_per_token(dataclasses.replace(without_mtp, pattern=MODEL.pattern.replace("*", "")), 64) / 3
    projections = 2 * count_parameters(without_mtp)["kinds"]["*"] - 2 * MODEL.hidden_size  # its norm is no matmul
    assert program("decode").flops == pytest.approx(8 * (rest + attending + projections))


def test_sizes_that_do_not_fit():
    with pytest.raises(ConfigError, match="--batch is 3 sequences, which do not divide over the 8 devices"):
        bench.run("train", dataclasses.replace(WORK, batch=3))
    with pytest.raises(ConfigError, match=r"--seq=32 must be a multiple of --documents \(5\)"):
        bench.run("train", dataclasses.replace(WORK, documents=5))
    with pytest.raises(ConfigError, match="the mesh"):
        bench.run("train", dataclasses.replace(WORK, parallel=ParallelConfig(data=3)))


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the compiler is installed")
def test_a_target_without_its_compiler_says_what_is_missing():
    with pytest.raises(UserError, match="jax-cuda13-plugin and jax-cuda13-pjrt, which `make compile-gpu` installs"):
        bench.run("train", dataclasses.replace(WORK, target="h200"))


def test_stacked_layers_are_a_view_of_the_whole_step():
    with pytest.raises(UserError, match="--optimizer"):
        front.run(["bench", "train", "--preset=nano", "--stack-layers"])
