"""What rounding does to a run, by kind of weight: Nemotron 3 Super report, 2.2, where it explains zero gradients.

    zero_gradients/<weight>        share of the elements of the weight's gradient, over a whole step, that are zero
    flushed/<weight>/<operand>     share of an operand's elements that quantisation makes zero, of those that are not
    saturated/<weight>/<operand>   share of them that lie above the largest value of their block
    non_finite/<weight>            NaN and infinities in its operands

<weight> is a path in the mixer (``in_proj``, ``experts/up_proj``), over all layers of the run; <operand> one of
``precision.quantized.OPERANDS``. All but the first only of quantised weights. Under a quantised recipe they are counted
in the steps that are logged.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from nemotron_jax.config import ModelConfig
from nemotron_jax.model.nemotron import matmul_paths
from nemotron_jax.parallel.stack import Stack
from nemotron_jax.precision.quantized import COUNTS, OPERANDS, new_probe
from nemotron_jax.precision.recipe import Recipe

IN_PROJ_LEAVES = ("z", "x", "B", "C", "dt")  # one tensor (model/mamba2.py)


def _name(path: str) -> str:
    """``layers/3/mixer/in_proj`` -> ``in_proj``; ``mtp/eh_proj`` -> ``eh_proj``."""
    return path.partition("/mixer/")[2] or path.rpartition("/")[2]


def new_probes(recipe: Recipe, model: ModelConfig) -> dict[str, Array]:
    """A probe for each weight that the recipe quantises somewhere."""
    table = recipe.table(matmul_paths(model))
    names = {_name(path) for path, precision in table.items() if precision.format}
    stacked = {"experts/up_proj", "experts/down_proj"} if "experts" in names else set()
    return {name: new_probe() for name in sorted(names - {"experts"} | stacked)}


def operand_statistics(counts: dict[str, Array]) -> dict[str, Array]:
    """Float32 scalars from the gradients of the probes, summed over a step."""
    found: dict[str, Array] = {}
    for name, counted in counts.items():
        shares = counted / jnp.maximum(counted[:, :1], 1)
        for row, operand in enumerate(OPERANDS):
            for kind in ("flushed", "saturated"):
                found[f"{kind}/{name}/{operand}"] = shares[row, COUNTS.index(kind)]
        found[f"non_finite/{name}"] = counted[:, COUNTS.index("non_finite")].sum()
    return found


def zero_gradients(grads: nnx.State, model: ModelConfig, stack: Stack | None = None) -> dict[str, Array]:
    """Of the weights of matmuls that are trained; ``grads`` are in the view of the stack."""
    matmuls = set(matmul_paths(model))
    zeros: dict[str, Array] = {}
    sizes: dict[str, int] = {}
    for path, variable in nnx.to_flat_state(grads):
        canonical = path if stack is None else stack.canonical(path)
        module, _, leaf = "/".join(map(str, canonical)).rpartition("/")
        if module not in matmuls:
            continue
        name = _name(module) if leaf in ("weight", *IN_PROJ_LEAVES) else f"{_name(module)}/{leaf}"
        gradient = variable.get_value()
        zeros[name] = zeros.get(name, jnp.float32(0)) + (gradient == 0).sum(dtype=jnp.float32)
        sizes[name] = sizes.get(name, 0) + gradient.size
    return {f"zero_gradients/{name}": count / sizes[name] for name, count in zeros.items()}
