"""The NVFP4 recipe's three products by codes and block scales, as on Blackwell, against their emulation."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.precision.matmul import expert_matmul, matmul
from nemotron_jax.precision.recipe import Precision
from pallas_kernels import aot, dispatch
from tests.pallas_kernels.test_rounding_survives import compiler

RNG = np.random.default_rng(0)
M, K, N = 37, 96, 48  # tokens that are no multiple of 16
X, W, DY = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((M, K), (K, N), (M, N)))
SEED = jnp.uint32(7)
RECIPES = {
    "nvfp4": Precision("float32", "nvfp4"),
    "nvfp4-no-sr-no-rht-1d": Precision("float32", "nvfp4", "1x16", stochastic=False, hadamard=False),
}


def products(precision):
    """A function of x, w, dy: y, dx and dw. A new one each time: what runs is chosen where it is traced."""

    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: matmul(x, w, precision, SEED), x, w)
        return y, *pull(dy)

    return run


@pytest.mark.parametrize("precision", RECIPES.values(), ids=RECIPES)
def test_values_are_those_of_the_emulation(precision):
    """The same operands bit for bit, so that results differ by the order of float32 sums alone.

    (The bound is that of a sum of K terms, in units of the largest result.)
    """
    emulated = jax.jit(products(precision))(X, W, DY)
    with dispatch.compiling_for("sm_100a"):
        program = jax.jit(products(precision)).lower(X, W, DY)
    assert program.as_text().count("f4E2M1FN") > 0
    for found, expected, terms in zip(program.compile()(X, W, DY), emulated, (K, N, M), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=terms * 2.0**-24 * float(jnp.abs(expected).max()))


def compiled_for(target, function, *arrays):
    here = jax.sharding.SingleDeviceSharding(aot.devices(target)[0])
    with aot.compiling_for(target):
        shapes = [jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=here) for z in arrays]
        return jax.jit(function).lower(*shapes).compile().as_text()


def roundings(text):
    """{(product, operand): Counter} of an optimised program: what rounds within its scope."""
    found: dict[tuple[str, str], Counter] = {}
    for kind, operation, name in re.findall(r"= (\w+)\[[^\n]*? ([\w-]+)\([^\n]*op_name=\"([^\"]*)\"", text):
        scope = re.search(r"(fprop|dgrad|wgrad)\b.*?\b(weight|rows|tokens)\b", name)
        if scope:
            rounding = re.search("nearest_e2m1|stochastic_e2m1", name)
            found.setdefault(scope.groups(), Counter())[rounding[0] if rounding else kind, operation] += 1
    return found


CALL = 'custom_call_target="__cudnn$blockScaledDot"'
needs_compiler = pytest.mark.skipif(not compiler(), reason="no compiler for GPUs is installed")


@needs_compiler
def test_three_calls_in_the_program_for_a_b200():
    arrays = X.astype(jnp.bfloat16), W, DY.astype(jnp.bfloat16)
    text = compiled_for("b200", products(Precision("bfloat16", "nvfp4")), *arrays)
    kinds = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", text))
    calls = re.findall(r"custom-call\(([^)]*)\), " + re.escape(CALL), text)
    assert len(calls) == 3 and not re.search(r" dot\(|__cublas", text)
    for operands in calls:
        assert [kinds[name] for name in operands.split(", ")] == ["f4e2m1fn"] * 2 + ["f8e4m3fn"] * 2
    found = roundings(text)
    assert set(found) == {(p, o) for p in ("fprop", "dgrad") for o in ("rows", "weight")} | {("wgrad", "tokens")}
    for scope, instructions in found.items():
        # The sum that rounds a value to nearest, or moves it by a random share of a step; scales are rounded to e4m3.
        kind = "stochastic_e2m1" if scope == ("dgrad", "rows") else "nearest_e2m1"
        assert instructions[kind, "add"] >= 1 and instructions["f32", "round-nearest-even"] >= 1, scope
    assert found["wgrad", "tokens"]["stochastic_e2m1", "add"] >= 1  # gradients, beside the activations


@needs_compiler
def test_no_such_call_for_an_h200_nor_for_experts():
    arrays = X.astype(jnp.bfloat16), W, DY.astype(jnp.bfloat16)
    precision = Precision("bfloat16", "nvfp4")
    assert CALL not in compiled_for("h200", products(precision), *arrays)

    def experts(x, w, sizes):
        return expert_matmul(x, w, sizes, precision, SEED)

    sizes = jnp.asarray([20, 0, 17], jnp.int32)
    assert CALL not in compiled_for("b200", experts, arrays[0], jnp.stack([W] * 3), sizes)
