"""A whole step of NVFP4 training, compiled for an H200 and a B200: each operand of each product is still rounded in it.

XLA:GPU deletes a cast to a small format and back. The program is searched for what rounding is made of, by the scopes
of precision/quantized.py and pallas_kernels/nvfp4.py. Needs the compiler for GPUs, not a GPU (`make compile-gpu`
brings it).
"""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.nvfp4
from nemotron_jax.parallel.mesh import batch_sharding, make_mesh
from nemotron_jax.run_config import PrecisionConfig
from nemotron_jax.training.state import TrainSetup
from nemotron_jax.training.step import make_train_step
from pallas_kernels import aot
from tests.pallas_kernels.test_rounding_survives import compiler
from tests.tiny import random_batch, tiny_run
from tests.training.test_quantised_training import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not compiler(), reason="no compiler for GPUs is installed")]

# NVFP4: in_proj, up and down of experts and of the shared expert, each in one layer. MXFP8: out_proj in one layer.
NVFP4_MATMULS = 5
# Tiles of 16x16 are the same from both sides: the experts' weights are rounded once, for fprop and dgrad. So are the
# others where products do not take codes, whose order is that of the summed axis.
ROUNDED_ONCE = 2

# Those of them that the tensor cores of a B200 take by codes: not the experts'.
NATIVE_MATMULS = 3


def found_in_a_step(target):
    """{(product, operand): Counter of the instructions within its scope, and of those that round to E2M1}.

    And the calls of cuDNN's scaled matmul; and Counter of the kernels that round, which XLA cannot look into.
    """
    config = dataclasses.replace(tiny_run(model=MODEL), precision=PrecisionConfig("nvfp4"))
    with aot.compiling_for(target):  # which the recipe asks for the dtype of operands, too
        setup = TrainSetup(config, make_mesh(config.parallel, aot.devices(target)))
        batch = jax.tree.map(
            lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=batch_sharding(setup.mesh)),
            random_batch(np.random.default_rng(0)),
        )
        with jax.set_mesh(setup.mesh):
            text = make_train_step(setup).lower(setup.abstract_state(), batch).compile().as_text()
    assert "bf16[" in text  # operands are those of a GPU
    found: dict[tuple[str, str], Counter] = {}
    for kind, operation, name in re.findall(r"= (\w+)\[[^\n]*? ([\w-]+)\([^\n]*op_name=\"([^\"]*)\"", text):
        scope = re.search(r"(fprop|dgrad|wgrad)\b.*?\b(weight|rows|tokens)\b", name)
        if scope:
            counts = found.setdefault(scope.groups(), Counter())
            counts[kind, operation] += 1
            if rounding := re.search("nearest_e2m1|stochastic_e2m1", name):
                counts[rounding[0], operation] += 1
    kernels = re.findall(r"custom_call_target=\"mosaic_gpu_v2\"[^\n]*op_name=\"[^\"]*\b(quantize|weight)\b", text)
    return found, text.count('custom_call_target="__cudnn$blockScaledDot"'), Counter(kernels)


@pytest.mark.parametrize("target", ["h200", "b200"])
def test_each_operand_is_rounded(target):
    jax.clear_caches()  # layers are traced for what runs on one target
    found, calls, kernels = found_in_a_step(target)
    jax.clear_caches()
    assert calls == (3 * NATIVE_MATMULS if target == "b200" else 0)
    assert set(found) >= {("fprop", "weight"), ("dgrad", "weight")}
    if target == "h200":  # rows and tokens: of x forward, of x and of dy backward; their maxima beside them
        assert kernels["quantize"] >= 3 * NVFP4_MATMULS
        assert kernels["weight"] == NVFP4_MATMULS
        for scope in (("fprop", "weight"), ("dgrad", "weight")):
            assert found[scope]["f32", "round-nearest-even"] >= 1  # the elements of the MXFP8 matmul
        return
    assert not kernels
    assert set(found) >= {("fprop", "rows"), ("dgrad", "rows"), ("wgrad", "tokens")}
    # The sum that rounds a value to nearest, or moves it by a random share of a step: in each NVFP4 matmul.
    for scope, instructions in found.items():
        if scope != ("dgrad", "rows"):
            again = NVFP4_MATMULS - ROUNDED_ONCE if scope == ("dgrad", "weight") else NVFP4_MATMULS
            assert instructions["nearest_e2m1", "add"] >= again, scope
        if scope in (("dgrad", "rows"), ("wgrad", "tokens")):  # gradients
            assert instructions["stochastic_e2m1", "add"] >= NVFP4_MATMULS, scope
        # And the scales of blocks are rounded to e4m3; in MXFP8 the elements are.
        operands = NVFP4_MATMULS * (2 if scope == ("wgrad", "tokens") else 1)
        assert instructions["f32", "round-nearest-even"] >= operands, scope


def test_this_would_show_it(monkeypatch):
    """Codes by a cast: the pair of casts is deleted, and with it what the first test looks for."""

    def code(x):
        return jax.lax.bitcast_convert_type(x.astype(jnp.float4_e2m1fn), jnp.uint4).astype(jnp.uint8)

    monkeypatch.setattr(pallas_kernels.nvfp4, "e2m1_nearest_code", code)
    jax.clear_caches()
    try:
        for scope, instructions in found_in_a_step("b200")[0].items():
            assert instructions["nearest_e2m1", "add"] == 0, scope
    finally:
        jax.clear_caches()
