"""Which implementation runs, what is said when one cannot, and the pinned public signatures."""

import importlib
import inspect

import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import dispatch

# Outside callers rely on these: changing one needs a deprecation.
SIGNATURES = {
    "ssd": "(x, dt, A, B, C, *, D=None, chunk_size=128, initial_state=None, segment_ids=None, "
    "return_final_state=False, impl=None)",
    "causal_conv1d": "(x, w, bias=None, *, activation='silu', initial_state=None, segment_ids=None, "
    "return_final_state=False, impl=None)",
    "grouped_matmul": "(lhs, rhs, group_sizes, *, activation=None, impl=None)",
    "grouped_mlp": "(x, up, down, group_sizes, *, impl=None)",
    "attention": "(q, k, v, *, causal=True, scale=None, segment_ids=None, kv_segment_ids=None, impl=None)",
    "decode_attention": "(q, k_cache, v_cache, lengths, *, page_table=None, scale=None, impl=None)",
    "take_rows": "(table, ids, *, dtype=None, impl=None)",
    "block_scaled_matmul": "(x, w, *, impl=None)",
    "nvfp4_matmul": "(a, b, *, impl=None)",
    "quantize": "(x, amax, amax_columns, *, hadamard=False, seed=None, impl=None)",
    "quantize_operands": "(x, amax, amax_columns, *, hadamard=False, seed=None, impl=None)",
    "quantize_expert_operands": "(x, group_sizes, amax, amax_columns, *, hadamard=False, seed=None, entries=None, "
    "impl=None)",
    "quantize_tiles": "(w, amax, *, dtype='bfloat16', impl=None)",
    "permute": "(x, expert_ids, num_experts, *, impl=None)",
    "unpermute": "(rows, row_map, weights, *, impl=None)",
}


def test_public_signatures():
    assert sorted(pallas_kernels.__all__) == sorted(SIGNATURES) == sorted(dispatch.OPS)
    for op, want in SIGNATURES.items():
        signature = inspect.signature(getattr(pallas_kernels, op))
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == want


def test_every_listed_implementation_exists():
    tables = {
        "decode_attention": ("attention", "_IMPLEMENTATIONS_DECODE"),
        "permute": ("permute", "_PERMUTE"),
        "unpermute": ("permute", "_UNPERMUTE"),
    }
    for op, known in dispatch.OPS.items():
        module, table = tables.get(op, (op, "_IMPLEMENTATIONS"))
        assert set(getattr(importlib.import_module(f"pallas_kernels.{module}"), table)) == set(known)
        assert known["reference"]() == ""  # the reference runs everywhere


def test_the_first_that_runs_is_chosen(monkeypatch):
    checks = {"mosaic": lambda: "needs an NVIDIA GPU of compute capability 9.0", "xla": lambda: "", "reference": str}
    monkeypatch.setitem(dispatch.OPS, "ssd", checks)
    assert dispatch.choose("ssd") == "xla"
    assert dispatch.choose("ssd", "reference") == "reference"
    assert dispatch.describe()["ssd"] == "xla"
    with pytest.raises(ValueError) as error:
        pallas_kernels.ssd(
            *[jnp.ones((1, 2, 2, 2)), jnp.ones((1, 2, 2)), -jnp.ones(2)] + [jnp.ones((1, 2, 1, 3))] * 2, impl="mosaic"
        )
    assert str(error.value) == (
        "ssd: implementation 'mosaic' cannot run on cpu: needs an NVIDIA GPU of compute capability 9.0. "
        "Use impl=None, or one that runs here: xla, reference"
    )


def test_describe_names_every_op():
    assert list(dispatch.describe()) == list(dispatch.OPS)
    assert dispatch.describe()["grouped_matmul"] == "blocked"


def test_unknown_names():
    with pytest.raises(
        ValueError, match="grouped_matmul has no implementation 'triton'; known: mosaic, blocked, reference"
    ):
        pallas_kernels.grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2]), impl="triton")
    with pytest.raises(ValueError, match="unknown op 'conv'; known ops: ssd, causal_conv1d"):
        dispatch.choose("conv")


def test_operands_that_do_not_fit_pass_over_an_implementation(monkeypatch, caplog):
    monkeypatch.setitem(dispatch.OPS, "ssd", {"mosaic": dispatch.on_hopper, "reference": str})
    unfit = {"mosaic": "head_dim must be 64, got 63"}
    with dispatch.compiling_for("sm_90a"):
        assert dispatch.choose("ssd") == dispatch.choose("ssd", unfit={"mosaic": ""}) == "mosaic"
        assert not caplog.messages
        assert dispatch.choose("ssd", unfit=unfit) == dispatch.choose("ssd", unfit=unfit) == "reference"
        assert caplog.messages == [
            "ssd: 'reference' runs in place of 'mosaic', which cannot take these operands: head_dim must be 64, got 63"
        ]
        with pytest.raises(ValueError, match="head_dim must be 64, got 63"):
            dispatch.choose("ssd", "mosaic", unfit=unfit)
    assert dispatch.choose("ssd", unfit=unfit) == "reference"  # not on a GPU: nothing was passed over
    assert len(caplog.messages) == 1
