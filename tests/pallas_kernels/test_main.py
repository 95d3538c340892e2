"""`python -m pallas_kernels` on a machine without a GPU."""

import importlib
import time

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch, suite
from pallas_kernels.cost import Cost

main = importlib.import_module("pallas_kernels.__main__")


def test_one_case_of_one_op(capsys):
    assert main.main(["permute", "--case=several_slots"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("permute")]
    assert [row[:4] for row in rows] == [["permute", "several_slots", "reference", d] for d in ("fwd", "fwd+bwd")]
    assert all(float(row[4]) > 0 for row in rows)
    assert 0 < float(rows[0][8]) < 1e-2 and rows[0][9] == "d_x"
    assert "No GPU here" in out and "ceilings: copy" in out


def test_a_failing_implementation_does_not_end_the_table(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(suite._permute._PERMUTE, "broken", broken)
    monkeypatch.setitem(dispatch.OPS, "permute", {"reference": str, "broken": str})
    monkeypatch.setattr(suite, "implementations", lambda op, given: {"reference": "", "broken": ""})
    assert main.main(["permute", "--case=one_slot", "--no-check"]) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("permute")]
    assert len(rows) == 4 and "failed: RuntimeError: out of" in rows[2] and "failed" not in rows[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["sdd"], "unknown op 'sdd'; known: ssd, "), (["ssd", "--case=huge"], "no case is called huge in ssd")],
)
def test_mistakes(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as ending:
        main.main(arguments)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_times_are_of_one_call_and_rotate_through_the_inputs():
    seen = set()

    def call(x):
        seen.add(float(x))
        time.sleep(0.01)
        return x

    assert 0.01 <= main.median_seconds(call, [(jnp.ones(()),), (2 * jnp.ones(()),)]) < 1
    assert seen == {1.0} or seen == {1.0, 2.0}


def test_calls_that_read_few_experts_rotate_through_all_of_them(monkeypatch):
    timed = []
    monkeypatch.setattr(main, "ON_GPU", True)
    monkeypatch.setattr(main, "median_seconds", lambda _, sets: timed.append(sets) or 0.0)
    case = suite._block_scaled.Case("", 2, 256, 64, (1, 0, 0, 1, 0, 0, 0))
    monkeypatch.setattr(main, "CACHE_BYTES", 4 * suite._block_scaled.cost(case).bytes / 3)
    assert main.time_case("block_scaled_matmul", case, "blocked", False, launch=1.0) == 0
    sets, ((*together,),) = timed
    assert len(sets) == len(together) == main.TOGETHER
    for i, (arrays,) in enumerate(together):
        assert arrays["codes"] is together[0][0]["codes"]
        assert arrays["group_sizes"].tolist() == jnp.roll(jnp.array(case.group_sizes), i).tolist()


def test_the_roofline_is_the_slower_of_arithmetic_and_bytes():
    cost = Cost(flops=100, bytes=10, backward_flops=200, backward_bytes=1000)
    assert main.least_seconds(cost, False, copied=1, multiplied=1) == (100, 10, 100)
    assert main.least_seconds(cost, True, copied=1, multiplied=1) == (300, 1010, 1010)


def test_the_dense_peer_is_a_grouped_matmul_of_equal_groups():
    grouped = suite._grouped
    lhs, rhs = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(12, 5), (3, 5, 7)]))
    for activation in (None, "relu2"):
        want = grouped.grouped_matmul(lhs, rhs, jnp.array([4, 4, 4]), activation=activation)
        got = suite.SUITE["grouped_matmul"].peers["dense"](lhs, rhs, None, activation=activation)
        assert jnp.allclose(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="11 rows are not a multiple of 3 groups"):
        suite.SUITE["grouped_matmul"].peers["dense"](lhs[:11], rhs, None, activation=None)
