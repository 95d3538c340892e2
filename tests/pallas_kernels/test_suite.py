"""The table that tests, benchmarks and compile checks run over, and what it says an op costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, dispatch, suite
from pallas_kernels.grouped_matmul import BENCHMARKS as GROUPED
from pallas_kernels.suite import SUITE

every_op = pytest.mark.parametrize("op", SUITE)


def test_every_op_is_in_the_suite():
    assert list(SUITE) == list(dispatch.OPS)


@every_op
def test_names_are_unique_and_benchmarks_have_costs(op: str):
    entry = SUITE[op]
    names = [case.name for case in entry.cases + entry.benchmarks]
    assert len(set(names)) == len(names)
    for case in entry.benchmarks:
        cost = entry.cost(case)
        assert cost.bytes > 0 and (cost.backward_bytes > 0) == entry.backward


@every_op
def test_bytes_are_those_of_the_inputs_and_outputs(op: str):
    """The cost is written by hand; the shapes of the real calls say the same, but for small inputs and unread rows."""
    entry = SUITE[op]
    for case in entry.benchmarks:
        given = suite.inputs(op, case, abstract=True)
        outputs = jax.eval_shape(suite.forward(op, "reference", given.settings), given.arrays)
        arrays = {name: z for name, z in given.arrays.items() if name not in entry.for_peers}
        moved = sum(z.size * z.dtype.itemsize for z in (*arrays.values(), *outputs))
        if op == "take_rows":
            moved -= 2 * (case.size - case.entries) * case.width
        unread = 1.0
        if op == "decode_attention":  # the mean of lengths from full to empty
            unread = 0.5 if case.batch > 1 else 1.0
        if sizes := getattr(case, "group_sizes", ()):  # empty groups
            unread = np.count_nonzero(sizes) / len(sizes)
        assert entry.cost(case).bytes == pytest.approx(moved * unread, rel=0.05), case.name


@every_op
def test_the_implementation_that_runs_here_agrees_with_the_truth(op: str):
    case = SUITE[op].cases[1]
    found = suite.errors(op, case, dispatch.choose(op), seeds=(3, 4))
    assert any(name.startswith("d_") for name in found) == SUITE[op].backward
    assert max(found.values()) < 1e-2, found


def test_errors_are_seen(monkeypatch):
    module = suite._conv
    case = module.CASES[0]
    right = module.causal_conv1d_reference

    def wrong(x, *args, **kwargs):
        return right(x, *args, **kwargs) + 0.05 * x

    monkeypatch.setitem(module._IMPLEMENTATIONS, "wrong", wrong)
    monkeypatch.setitem(dispatch.OPS, "causal_conv1d", dispatch.OPS["causal_conv1d"] | {"wrong": str})
    found = suite.errors("causal_conv1d", case, "wrong")
    assert found["out"] > 0.02 and found["d_x"] > 0.02 and found["d_w"] < 1e-2
    monkeypatch.setitem(
        module._IMPLEMENTATIONS, "wrong", lambda x, *args, **kwargs: right(x, *args, **kwargs) * jnp.nan
    )
    assert suite.errors("causal_conv1d", case, "wrong")["out"] == np.inf


def test_runs_that_differ_are_seen(monkeypatch):
    module = suite._conv
    drawn = np.random.default_rng(0)

    def noisy(x, *args, **kwargs):
        noise = jax.pure_callback(
            lambda: np.float32(1e-5 * drawn.standard_normal()), jax.ShapeDtypeStruct((), "float32")
        )
        return module.causal_conv1d_reference(x, *args, **kwargs) * (1 + jax.lax.stop_gradient(noise))

    monkeypatch.setitem(module._IMPLEMENTATIONS, "noisy", noisy)
    monkeypatch.setitem(dispatch.OPS, "causal_conv1d", dispatch.OPS["causal_conv1d"] | {"noisy": str})
    found = suite.errors("causal_conv1d", module.CASES[0], "noisy", dtype=jnp.float32)
    assert found.pop("repeat") == np.inf
    assert max(found.values()) < 1e-3


def test_inputs_are_random_and_in_the_dtypes_of_training():
    given = suite.inputs("ssd", SUITE["ssd"].cases[1], seed=1)
    dtypes = {name: z.dtype for name, z in given.arrays.items()}
    assert dtypes == {**dict.fromkeys("xBC", jnp.bfloat16), **dict.fromkeys(("dt", "A", "D"), jnp.float32)}
    assert given.settings == {"chunk_size": 16}
    other = suite.inputs("ssd", SUITE["ssd"].cases[1], seed=2)
    for name, z in given.arrays.items():
        assert not np.array_equal(z, other.arrays[name])
    assert (given.arrays["dt"] > 0).all() and (given.arrays["A"] < 0).all()


def test_implementations_that_cannot_run_say_why(monkeypatch):
    known = dispatch.OPS["attention"] | {"elsewhere": lambda: "needs another machine"}
    monkeypatch.setitem(dispatch.OPS, "attention", known)
    given = suite.inputs("attention", SUITE["attention"].cases[0], abstract=True)
    reasons = suite.implementations("attention", given)
    assert reasons["reference"] == ""
    assert "needs another machine" in reasons["elsewhere"]


def test_random_loads_are_uneven_and_complete():
    for case in GROUPED:
        assert sum(case.group_sizes) <= case.rows
        if case.name in ("nano_up", "super_up"):
            assert sum(case.group_sizes) == case.rows
            assert 2 <= max(case.group_sizes) / np.mean(case.group_sizes) <= 3


def test_attention_counts_visible_pairs():
    module = suite._attention
    case = next(case for case in module.CASES if case.name == "packed")
    given = suite.inputs("attention", case)
    arrays = {name: jnp.ones_like(z) if name != "segment_ids" else z for name, z in given.arrays.items()}
    # With equal logits the largest probability of a query is one over the keys that it sees.
    eye = jnp.broadcast_to(jnp.eye(case.keys)[None, :, None], (case.batch, case.keys, case.kv_heads, case.keys))
    shares = attention(
        jnp.ones((case.batch, case.time, case.heads, case.keys)),
        jnp.zeros((case.batch, case.keys, case.kv_heads, case.keys)),
        eye,
        segment_ids=arrays["segment_ids"],
    )
    pairs = float(jnp.round(1 / shares.max(-1)).sum()) / case.heads
    assert module.cost(case).flops == 4 * pairs * case.heads * case.head_dim
