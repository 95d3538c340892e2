"""Parameters and FLOPs of a model, counted from the shapes of the real one."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nemotron_jax.config import ModelConfig
from nemotron_jax.model.context import Context
from nemotron_jax.model.layer import BLOCKS, Layer
from nemotron_jax.model.linear import Scope
from nemotron_jax.model.nemotron import abstract
from nemotron_jax.parallel.plan import Part, Saved
from nemotron_jax.precision.recipe import RECIPES, Recipe


def tensor_sizes(config: ModelConfig) -> dict[str, int]:
    """Elements of every tensor by path (``layers/0/mixer/in_proj/z``), router correction biases included."""
    _, variables = nnx.split(abstract(config, RECIPES["float32"]))
    return {
        "/".join(map(str, path)): math.prod(variable.get_value().shape)
        for path, variable in nnx.to_flat_state(variables)
    }


def count_parameters(config: ModelConfig) -> dict[str, Any]:
    """Totals over every tensor of a released checkpoint (parameters and router correction biases).

    Returns:
      total; mtp (part of total); active: parameters that one token uses, both embeddings in, MTP and correction
      biases out, top_k of the routed experts; kinds: {letter: parameters of one layer of that kind}.
    """
    sizes = tensor_sizes(config)
    trained = {path: size for path, size in sizes.items() if not path.endswith("e_score_correction_bias")}
    kinds: dict[str, int] = {}
    for letter in dict.fromkeys(config.pattern):
        prefix = f"layers/{config.pattern.index(letter)}/"
        kinds[letter] = sum(size for path, size in trained.items() if path.startswith(prefix))
    mtp = sum(size for path, size in sizes.items() if path.startswith("mtp/"))
    active = sum(_used(config, path, size) for path, size in trained.items() if not path.startswith("mtp/"))
    return {"total": sum(sizes.values()), "active": active, "mtp": mtp, "kinds": kinds}


def _used(config: ModelConfig, path: str, size: int) -> int:
    """Elements of a tensor that one token uses: top_k of the routed experts, all of everything else."""
    return size // config.moe.num_experts * config.moe.top_k if "/experts/" in path else size


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs a token: 3 x the forward pass (the backward pass costs two forward passes).

    Forward = 2 x (every matmul weight that a token meets: input embedding out, lm_head in, top_k of the routed
    experts) + per-block terms (causal attention over half the sequence: 2 seq_len heads head_dim; the chunked SSD:
    2 CNG + 2 CHP + 4 HPN + convolution). The MTP module counts once a depth, each time with lm_head.
    Recomputation is not counted.
    """
    sizes = tensor_sizes(config)

    def weights(prefix: str) -> int:
        """Elements of the matmul weights below a prefix that one token uses."""
        return sum(
            _used(config, path, size) for path, size in sizes.items() if path.startswith(prefix) and _is_matmul(path)
        )

    def blocks(pattern: str) -> float:
        return sum(BLOCKS[letter].flops_per_token(config, seq_len) for letter in pattern)

    head = 2 * config.hidden_size * config.vocab_size
    forward = 2 * weights("layers/") + blocks(config.pattern) + head
    if config.mtp is not None:
        forward += config.mtp.depth * (2 * weights("mtp/") + blocks(config.mtp.pattern) + head)
    return 3 * forward


def _is_matmul(path: str) -> bool:
    """Projections, experts and the router; not norms, convolutions, biases or the scalars of Mamba."""
    names = path.split("/")
    if "in_proj" in names or "experts" in names or "gate" in names:
        return names[-1] != "e_score_correction_bias"
    return names[-1] == "weight" and names[-2].endswith("_proj")


def parts(config: ModelConfig, seq_len: int, recipe: Recipe) -> list[Part]:
    """The model as parallel/plan.py sees it, in the order of a forward pass."""
    _, variables = nnx.split(abstract(config, recipe))
    tensors = {
        "/".join(map(str, path)): (variable.get_value().shape, variable.axes)
        for path, variable in nnx.to_flat_state(variables)
    }

    def below(*prefixes: str) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        return {path: what for path, what in tensors.items() if path.startswith(prefixes)}

    def flops(prefix: str) -> float:
        sizes = {path: math.prod(shape) for path, (shape, _) in below(prefix).items()}
        return 2 * sum(_used(config, path, size) for path, size in sizes.items() if _is_matmul(path))

    saved = {letter: saved_for_backward(config, letter, recipe) for letter in dict.fromkeys(config.pattern)}

    def layers(name: str, pattern: str, prefix: str, runs: int) -> list[Part]:
        found = []
        for letter, count in Counter(pattern).items():
            first = f"{prefix}layers/{pattern.index(letter)}/"
            forward = flops(first) + BLOCKS[letter].flops_per_token(config, seq_len)
            of = saved.get(letter) or saved_for_backward(config, letter, recipe)
            found.append(Part(f"{name}{letter}", count, runs, below(first), forward, of))
        return found

    head = 2.0 * config.hidden_size * config.vocab_size
    depth = config.mtp.depth if config.mtp else 0
    found = [Part("embeddings", 1, 1 + depth, below("embeddings/"), 0.0)]
    found += layers("", config.pattern, "", 1)
    found.append(Part("head", 1, 1 + depth, below("lm_head/", "norm_f/"), head))
    if config.mtp is not None:
        around = {path: what for path, what in below("mtp/").items() if not path.startswith("mtp/layers/")}
        found.append(Part("mtp eh_proj", 1, depth, around, flops("mtp/eh_proj")))
        found += layers("mtp ", config.mtp.pattern, "mtp/", depth)
    return found


def saved_for_backward(config: ModelConfig, letter: str, recipe: Recipe) -> Saved:
    """What a layer leaves for its backward pass, from the residuals of its trace: two lengths tell tokens from weights.

    Left out are float32 copies of wide arrays that are there in the dtype of the residual stream as well (norms and
    gates compute in float32), and truth values: XLA makes them again where they are used.
    """
    (short, few), (long, more) = ((_residuals(config, letter, recipe, tokens), tokens) for tokens in (512, 1024))
    # By shape without the tokens' part: residuals come in the same order at both lengths.
    wide = inner = rows = inner_rows = copies = 0.0
    width = {config.hidden_size, config.moe.latent_size}
    for one, two in zip(short, long, strict=True):
        per_token = (two.size - one.size) / (more - few)
        size = one.dtype.itemsize
        if not per_token:
            copies += one.size * size
        elif one.dtype == bool or (one.dtype == jnp.float32 != jnp.dtype(recipe.activations) and per_token > 1024):
            continue
        elif one.shape[0] == few * config.moe.top_k:
            if one.shape[-1] in width:
                rows += per_token * size
            else:
                inner_rows += per_token * size
        elif one.shape[-1] in width:
            wide += per_token * size
        else:
            inner += per_token * size
    return Saved(wide, inner, rows, inner_rows, copies)


def _residuals(config: ModelConfig, letter: str, recipe: Recipe, tokens: int) -> list[jax.ShapeDtypeStruct]:
    """Of one row, weights that the layer was given left out."""
    layer = nnx.eval_shape(lambda: Layer(Scope(jax.random.key(0), recipe), letter, config))
    graphdef, leaves = nnx.split(layer)

    def forward(leaves: Any, h_BTD: jax.Array) -> Any:
        y_BTD, _, aux = nnx.merge(graphdef, leaves)(h_BTD, Context(), None)
        return y_BTD, aux

    h_BTD = jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.dtype(recipe.activations))
    backward = jax.eval_shape(lambda *inputs: jax.vjp(forward, *inputs, has_aux=True)[1], leaves, h_BTD)
    given = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(leaves)}
    return [leaf for leaf in jax.tree.leaves(backward) if (leaf.shape, leaf.dtype) not in given]
