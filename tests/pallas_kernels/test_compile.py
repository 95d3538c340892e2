"""`make compile-gpu`: what is compiled, and how the figures are read. Compiling itself is a step of CI."""

import importlib.util
import os
import re
from pathlib import Path

import jax
import pytest

from pallas_kernels import compile as compiler
from pallas_kernels import dispatch
from pallas_kernels.suite import SUITE

PRINTED = """
ptxas info    : Compiling entry function 'a' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem
  %13 = call i32 @mosaic_gpu_launch_kernel(ptr %0, i32 132, i32 1, i32 1, i32 0, i32 0, i32 0, i32 384, i32 1, i32 1, \
i32 213056, i32 0, ptr %1, ptr %8)
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1 bytes smem
  %9 = call i32 @mosaic_gpu_launch_kernel(ptr %0, i32 %4, i32 1, i32 1, i32 0, i32 0, i32 0, i32 128, i32 1, i32 1, \
i32 1024, i32 0, ptr %1, ptr %8)
"""


def test_what_ptxas_and_the_launches_say():
    assert compiler.read_dump(PRINTED) == {
        "registers": (168, 255),
        "shared": (213056, 1024),
        "spills": (0, 24),
        "serialised": True,
    }
    assert compiler.read_dump("nothing")["registers"] == ()


def test_output_below_python_is_captured(capfd):
    with compiler.captured() as file:
        os.write(1, b"from C++ ")
        os.write(2, b"twice")
        file.seek(0)
        assert file.read() == b"from C++ twice"
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_kernels_are_compiled_for_all_cases_that_they_take_and_xla_where_it_runs(monkeypatch):
    monkeypatch.setitem(dispatch.OPS, "permute", {"reference": str})
    found = list(compiler.jobs(["h200", "b200"], ["permute"], [], []))
    benchmarks = {case.name for case in SUITE["permute"].benchmarks}
    assert {compiler._cases("permute")[job.case].name for job in found} == benchmarks
    assert len(found) == 2 * len(benchmarks) and {job.target for job in found} == {"h200"}
    found = list(compiler.jobs(["h200"], ["ssd"], [], []))
    kernels = [impl for impl in dispatch.OPS["ssd"] if impl != "reference"]
    assert {job.impl for job in found if compiler._cases("ssd")[job.case].name == "nano"} <= {*kernels, "reference"}
    named = list(compiler.jobs(["h200"], ["permute"], ["one_slot"], ["reference"]))
    assert [job.backward for job in named] == [False, True]


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the compiler is installed")
def test_without_the_compiler_it_says_where_it_comes_from(capsys):
    assert compiler.main(["ssd"]) == 2
    assert "`make compile-gpu` installs" in capsys.readouterr().err


def test_unknown_names(capsys):
    for arguments in (["sdd"], ["--target=h300"]):
        with pytest.raises(SystemExit) as ending:
            compiler.main(arguments)
        assert ending.value.code == 2
    assert "unknown 'h300'; known: h200, b200" in capsys.readouterr().err


def test_the_version_of_the_compiler_is_that_of_jax():
    root = Path(compiler.__file__).parents[1]
    pins = re.findall(r"^jax-cuda13-(pjrt|plugin)==(.*)$", (root / "requirements-cuda.txt").read_text(), re.MULTILINE)
    assert dict(pins) == dict.fromkeys(("pjrt", "plugin"), jax.__version__)
