"""One update: the loss and its parts, accumulation, skipped steps, router biases, what is trained, sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemotron_jax.checkpoint.store import named_leaves
from nemotron_jax.errors import ConfigError
from nemotron_jax.model.context import Context
from nemotron_jax.model.mtp import shift_left
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.run_config import ParallelConfig, PrecisionConfig
from nemotron_jax.training.losses import loss_fn, totals
from nemotron_jax.training.optimizer import decays, learning_rate
from nemotron_jax.training.state import TrainSetup
from nemotron_jax.training.step import global_batch, make_train_step, make_validation_step
from tests.tiny import random_batch, tiny_run


@functools.cache
def compiled(config, devices=1):
    """(setup, step, initial state on the host): compiled once for all tests that share a config."""
    setup = TrainSetup(config, make_mesh(config.parallel, jax.devices()[:devices]))
    return setup, make_train_step(setup), jax.device_get(setup.init_state())


def run_steps(config, batches, devices=1):
    """Setup, then state and metrics after each of some batches, from the initial state, on the host."""
    setup, step, start = compiled(config, devices)
    state = jax.device_put(start, setup.state_shardings())
    metrics = []
    with jax.set_mesh(setup.mesh):
        for batch in batches:
            state, values = step(state, global_batch(setup, batch))
            metrics.append(jax.device_get(values))
    return setup, jax.device_get(state), metrics


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    return [random_batch(rng) for _ in range(3)]


@pytest.fixture(scope="module")
def trained(batches):
    return run_steps(tiny_run(), batches)


def test_loss_is_the_sum_of_its_parts(batches, trained):
    """Recomputed from logits, with weights, borders and normalisation written out."""
    setup, _, metrics = trained
    state, batch = compiled(tiny_run())[2], batches[0]
    model = nnx.merge(setup.graphdef, state.params, state.buffers["model"])
    ctx = Context(segment_ids=jnp.asarray(batch.segment_ids))
    hidden, _, aux = model.hidden(jnp.asarray(batch.tokens), ctx)
    depths, _ = model.mtp_hidden(hidden, jnp.asarray(batch.tokens), ctx)

    def mean_nll(hidden, ahead):
        logprobs = np.asarray(jax.nn.log_softmax(model.logits(hidden), axis=-1))
        total = weight = 0.0
        for row in range(4):
            for t in range(16 - ahead):
                inside = (batch.segment_ids[row, t : t + ahead + 1] == batch.segment_ids[row, t]).all()
                if inside and batch.loss_weights[row, t + ahead]:
                    total -= logprobs[row, t, batch.targets[row, t + ahead]]
                    weight += 1
        return total / weight

    first = metrics[0]
    assert first["loss"] == pytest.approx(mean_nll(hidden, 0), rel=1e-5)
    assert first["mtp_loss_1"] == pytest.approx(mean_nll(depths[0], 1), rel=1e-5)
    assert first["mtp_loss_2"] == pytest.approx(mean_nll(depths[1], 2), rel=1e-5)
    assert first["load_balance_loss"] == pytest.approx(float(aux["layers/1/load_balance_loss"]), rel=1e-5)
    assert {"max_vio", "expert_load", "grad_norm", "learning_rate"} <= first.keys()


def test_loss_falls(batches):
    """A batch seen eight times is learned, by the main head and by each MTP depth."""
    _, _, metrics = run_steps(tiny_run(), batches[:1] * 8)
    for name in ("loss", "mtp_loss_1", "mtp_loss_2"):
        assert metrics[-1][name] < 0.9 * metrics[0][name]


@pytest.mark.parametrize("count", [2, 4])
def test_microbatches_give_the_gradient_of_the_whole_batch(count, batches, trained):
    """Rows have unequal loss weights, so a mean of means would be wrong."""
    _, expected, expected_metrics = trained
    _, state, metrics = run_steps(tiny_run(train={"microbatches": count}), batches)
    for name in ("loss", "mtp_loss_2", "grad_norm", "load_balance_loss", "max_vio"):
        assert metrics[0][name] == pytest.approx(expected_metrics[0][name], rel=1e-4), name
    for (name, a), b in zip(named_leaves(state.params).items(), named_leaves(expected.params).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3, err_msg=name)


def test_parameters_and_moments_are_sharded_alike():
    config = tiny_run(parallel={"data": 1, "fsdp": 2, "tensor": 2, "expert": 2})
    setup = TrainSetup(config, make_mesh(config.parallel, jax.devices()))
    state = setup.init_state()
    up = state.params["layers"][1]["mixer"]["experts"]["up_proj"].get_value()
    assert up.addressable_shards[0].data.size * 8 == up.size
    leaves = named_leaves(state.opt_state).items()
    moments = [leaf for name, leaf in leaves if name.endswith("u/layers/1/mixer/experts/up_proj")]  # mu and nu
    assert len(moments) == 2
    assert all(leaf.sharding == up.sharding for leaf in moments)


def test_a_step_that_is_not_finite_changes_nothing(batches):
    """Skipped and counted; buffers, parameters and moments stay; the next good step resets the count in a row."""
    bad = dataclasses.replace(batches[1], loss_weights=np.full((4, 16), np.nan, np.float32))
    _, before, _ = run_steps(tiny_run(), batches[:1])
    _, after, metrics = run_steps(tiny_run(), [batches[0], bad, bad])
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 1, 2]
    assert int(metrics[-1]["skipped_steps"]) == 2
    assert int(after.step) == 3
    for a, b in zip(
        jax.tree.leaves((before.params, before.buffers, before.opt_state)),
        jax.tree.leaves((after.params, after.buffers, after.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    _, _, metrics = run_steps(tiny_run(), [batches[0], bad, batches[2]])
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 1, 0]
    assert int(metrics[-1]["skipped_steps"]) == 1


def test_router_bias_moves_against_the_load(batches):
    """1e-3 * sign(mean - count) for each expert, once a global batch, also with microbatches."""
    setup, _, start = compiled(tiny_run())
    model = nnx.merge(setup.graphdef, start.params, start.buffers["model"])
    ctx = Context(segment_ids=jnp.asarray(batches[0].segment_ids))
    hidden, _, aux = model.hidden(jnp.asarray(batches[0].tokens), ctx)
    _, mtp_aux = model.mtp_hidden(hidden, jnp.asarray(batches[0].tokens), ctx)
    for count in (1, 4):
        _, state, _ = run_steps(tiny_run(train={"microbatches": count}), batches[:1])
        biases = state.buffers["model"]
        for counts, layer in (
            (aux["layers/1/expert_counts"], biases["layers"][1]),
            (mtp_aux["mtp/layers/1/expert_counts"], biases["mtp"]["layers"][1]),
        ):
            bias = layer["mixer"]["gate"]["e_score_correction_bias"].get_value()
            np.testing.assert_allclose(bias, 1e-3 * np.sign(counts.mean() - counts), rtol=1e-6)
            assert (bias != 0).any()


def test_the_loss_weighs_its_parts(batches):
    """nll + factor / K * MTP + coefficient * load balance of every layer, the MTP depths included."""
    setup, _, start = compiled(tiny_run())
    model = nnx.merge(setup.graphdef, start.params, start.buffers["model"])
    batch = jax.tree.map(jnp.asarray, batches[0])
    train = dataclasses.replace(setup.config.train, load_balance_coefficient=0.5)
    loss, metrics = loss_fn(model, batch, jnp.uint32(0), totals(batch, model.config), 1.0, train)
    ctx = Context(segment_ids=batch.segment_ids)
    hidden, _, aux = model.hidden(batch.tokens, ctx)
    _, mtp_aux = model.mtp_hidden(hidden, batch.tokens, ctx)
    balance = aux["layers/1/load_balance_loss"] + mtp_aux["mtp/layers/1/load_balance_loss"]
    expected = metrics["loss"] + 0.3 / 2 * (metrics["mtp_loss_1"] + metrics["mtp_loss_2"]) + 0.5 * balance
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(balance) > 2.5  # three applications, each near 1


def test_trainable_rules(batches):
    """Only what is trained changes, and only that has optimizer state."""
    config = tiny_run(train={"trainable": "-*,+mtp/*"})
    _, state, _ = run_steps(config, batches[:1])
    start = compiled(config)[2]
    for (name, a), b in zip(named_leaves(state.params).items(), named_leaves(start.params).values(), strict=True):
        assert np.array_equal(a, b) == (not name.startswith("mtp/")), name
    moments = [name for name in named_leaves(state.opt_state) if "/mu/" in name]
    assert moments and all("/mtp/" in name for name in moments)
    for name, bias in named_leaves(state.buffers["model"]).items():
        assert (bias != 0).any() == name.startswith("mtp/"), name  # a frozen router keeps its choice of experts


@pytest.mark.parametrize(
    ("rules", "message"),
    [("mtp/*", "must start with"), ("-typo/*", "matches no parameter"), ("-*", "leaves no parameter")],
)
def test_bad_trainable_rules(rules, message):
    with pytest.raises(ConfigError, match=message):
        _ = TrainSetup(tiny_run(train={"trainable": rules}), make_mesh(ParallelConfig())).trained


def test_bfloat16_keeps_float32_masters(batches):
    """Weights, moments and biases stay float32 under the bfloat16 recipe, and updates below its resolution count."""
    config = dataclasses.replace(tiny_run(optimizer={"peak_lr": 1e-5}), precision=PrecisionConfig("bfloat16"))
    _, state, metrics = run_steps(config, batches)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.buffers["model"]))} == {np.dtype(np.float32)}
    start = compiled(config)[2]
    moved = np.abs(state.params["norm_f"]["weight"].get_value() - start.params["norm_f"]["weight"].get_value())
    assert 0 < moved.max() < 1e-4  # bfloat16 could not tell 1 from 1 + 1e-4
    assert np.isfinite(metrics[-1]["loss"])


def test_what_weight_decay_touches(trained):
    _, state, _ = trained
    names = {name: decays(tuple(name.split("/"))) for name in named_leaves(state.params)}
    decayed = {name for name, yes in names.items() if yes}
    assert {"embeddings/weight", "lm_head/weight", "layers/0/mixer/in_proj/z"} <= decayed
    assert "layers/0/mixer/conv1d/weight/x" in decayed
    assert {"layers/1/mixer/experts/up_proj", "layers/1/mixer/gate/weight", "mtp/eh_proj/weight"} <= decayed
    kept = {name for name, yes in names.items() if not yes}
    for name in ("A_log", "D", "dt_bias", "conv1d/bias/x", "norm/weight"):
        assert f"layers/0/mixer/{name}" in kept
    assert {"norm_f/weight", "layers/2/norm/weight", "mtp/enorm/weight", "mtp/final_layernorm/weight"} <= kept


def test_adamw_against_numpy(batches):
    """Two steps of one decayed and one undecayed weight, from the gradients that jax gives."""
    config = tiny_run(optimizer={"clip": 1e9, "eps": 1e-8})
    _, states, _ = zip(*(run_steps(config, batches[:n]) for n in (1, 2)), strict=True)
    start = compiled(config)[2]
    for path, decay in ((("lm_head", "weight"), 0.1), (("norm_f", "weight"), 0.0)):
        at = lambda tree, path=path: np.asarray(tree[path[0]][path[1]].get_value(), np.float64)  # noqa: E731
        moments = [named_leaves(state.opt_state) for state in states]
        mu, nu = (at_name(moments[1], kind, path) for kind in ("mu", "nu"))
        update = (mu / (1 - 0.9**2)) / (np.sqrt(nu / (1 - 0.95**2)) + 1e-8) + decay * at(states[0].params)
        expected = at(states[0].params) - float(learning_rate(config.optimizer, 8, jnp.int32(1))) * update
        np.testing.assert_allclose(at(states[1].params), expected, rtol=2e-5, atol=1e-7)
        assert not np.array_equal(at(start.params), at(states[0].params))


def at_name(leaves, kind, path):
    (name,) = [name for name in leaves if f"/{kind}/" in name and name.endswith("/".join(path)) and "mtp" not in name]
    return np.asarray(leaves[name], np.float64)


def test_gradients_are_clipped_by_global_norm(batches):
    """With a tiny bound Adam's first moment is the bounded gradient."""
    _, state, metrics = run_steps(tiny_run(optimizer={"clip": 1e-3}), batches[:1])
    mu = [leaf for name, leaf in named_leaves(state.opt_state).items() if "/mu/" in name]
    norm = np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in mu))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert metrics[0]["grad_norm"] > 1e-3


def test_validation_sums(batches):
    setup, _, state = compiled(tiny_run())
    sizes = jnp.arange(64, dtype=jnp.float32)
    with jax.set_mesh(setup.mesh):
        sums = jax.device_get(make_validation_step(setup)(state, global_batch(setup, batches[0]), sizes))
    model = nnx.merge(setup.graphdef, state.params, state.buffers["model"])
    out = model(jnp.asarray(batches[0].tokens), jnp.asarray(batches[0].segment_ids))
    logprobs = model.token_logprobs(out.hidden, jnp.asarray(batches[0].targets))
    weights = batches[0].loss_weights
    assert sums["nll"] == pytest.approx(-float((weights * logprobs).sum()), rel=1e-5)
    assert sums["weight"] == weights.sum()
    assert sums["bytes"] == (weights * batches[0].targets).sum()


def test_mtp_weights_stop_at_borders():
    weights = jnp.asarray([[1.0, 1, 0, 1, 0]])
    ids = jnp.asarray([[1, 1, 1, 2, 2]])
    np.testing.assert_array_equal(shift_left(weights, 1, ids)[0], [[1, 0, 0, 0, 0]])
