"""Parameters and FLOPs of a model, counted from the shapes of the real one."""

from __future__ import annotations

import math
from typing import Any

from flax import nnx

from nemotron_jax.config import ModelConfig
from nemotron_jax.model.layer import BLOCKS
from nemotron_jax.model.nemotron import abstract
from nemotron_jax.precision.recipe import RECIPES


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
