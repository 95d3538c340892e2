"""What makes a training step the same bit for bit in every run on a GPU: no sum in the order in which threads come.

A GPU adds the updates of a scatter by atomics, in any order, where their indices may be equal; for floats the order
shows. So every scatter of floats has to say that its indices are unique. Read in the program that is handed to XLA for
a GPU, which needs no GPU: that of the `bench` of a small slice of Nano, whose kernels are those of the whole.
"""

import re

import jax
import pytest

from nemotron_jax.bench import PROGRAMS, Workload
from nemotron_jax.config import PRESETS, replace
from nemotron_jax.parallel import mesh as meshes
from pallas_kernels import dispatch

SCATTER = re.compile(r'"stablehlo\.scatter"\(.*?\) <\{(.*?)\}> \(\{.*?\n\s*\}\) : \(tensor<([\dx]+)x(\w+)>', re.DOTALL)


def scatters(text):
    """(type of the elements, whether the indices are unique, shape) of each."""
    return [(kind, "unique_indices = true" in said, shape) for said, shape, kind in SCATTER.findall(text)]


@pytest.mark.parametrize("optimizer", [False, True], ids=["gradients", "train step"])
def test_no_scatter_of_floats_onto_equal_indices(optimizer):
    model = replace(PRESETS["nano"], {"pattern": "ME*"})
    work = Workload(model, batch=1, seq=512, precision="bfloat16", optimizer=optimizer, documents=2)
    with jax.sharding.set_mesh(meshes.make_mesh(work.parallel, jax.devices()[:1])), dispatch.compiling_for("sm_90a"):
        program = PROGRAMS["train"](work, jax.sharding.get_mesh())
        text = program.step.trace(*program.shapes).lower(lowering_platforms=("cuda",)).as_text()
    found = scatters(text)
    assert len(found) == text.count('"stablehlo.scatter"') > 3
    assert "mosaic_gpu" in text
    assert not [one for one in found if one[0].startswith(("f", "bf")) and not one[1]]


def test_this_would_show_it():
    lowered = jax.jit(lambda x, i: x.at[i].add(1.5)).lower(jax.numpy.ones(7), jax.numpy.array([1, 1]))
    assert scatters(lowered.as_text()) == [("f32", False, "7")]
