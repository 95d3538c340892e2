"""What makes a training step the same bit for bit in every run on a GPU: no sum in the order in which threads come.

A GPU adds the updates of a scatter by atomics, in any order, where their indices may be equal; for floats the order
shows. So every scatter of floats has to say that its indices are unique. Read in the program that is handed to XLA for
a GPU, which needs no GPU: that of the `bench` of a small slice of Nano, whose kernels are those of the whole.
"""

import os
import re
import subprocess
import sys

import jax
import pytest

from nemotron_jax.bench import PROGRAMS, Workload
from nemotron_jax.config import PRESETS, replace
from nemotron_jax.parallel import mesh as meshes
from pallas_kernels import dispatch
from tests.conftest import ROOT

SCATTER = re.compile(r'"stablehlo\.scatter"\(.*?\) <\{(.*?)\}> \(\{.*?\n\s*\}\) : \(tensor<([\dx]+)x(\w+)>', re.DOTALL)


def scatters(text):
    """(type of the elements, whether the indices are unique, shape) of each."""
    return [(kind, "unique_indices = true" in said, shape) for said, shape, kind in SCATTER.findall(text)]


def step_for_a_gpu(**settings):
    """The text of a step of a slice of Nano, lowered for a Hopper GPU."""
    work = Workload(replace(PRESETS["nano"], {"pattern": "ME*"}), batch=1, seq=512, precision="bfloat16", **settings)
    with jax.sharding.set_mesh(meshes.make_mesh(work.parallel, jax.devices()[:1])), dispatch.compiling_for("sm_90a"):
        program = PROGRAMS["train"](work, jax.sharding.get_mesh())
        return program.step.trace(*program.shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("optimizer", [False, True], ids=["gradients", "train step"])
def test_no_scatter_of_floats_onto_equal_indices(optimizer):
    text = step_for_a_gpu(optimizer=optimizer, documents=2)
    found = scatters(text)
    assert len(found) == text.count('"stablehlo.scatter"') > 3
    assert "mosaic_gpu" in text
    assert not [one for one in found if one[0].startswith(("f", "bf")) and not one[1]]


def test_the_program_is_the_same_in_every_process():
    """Kernels included: its hash is the key under which the compilation cache keeps it for the next process."""
    code = "import tests.model.test_same_bits as t; from hashlib import sha256 as h; "
    code += "print(h(t.step_for_a_gpu().encode()).hexdigest())"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    first, second = (process.communicate()[0] for process in running)
    assert len(first.strip()) == 64 and first == second


def test_this_would_show_it():
    lowered = jax.jit(lambda x, i: x.at[i].add(1.5)).lower(jax.numpy.ones(7), jax.numpy.array([1, 1]))
    assert scatters(lowered.as_text()) == [("f32", False, "7")]
