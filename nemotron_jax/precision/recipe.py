"""Precision recipes: ordered path rules that give every matmul of the model its precision.

A recipe is resolved once, when the model is constructed, and can be printed as a table; a layer stores the Precision
it was given, never the recipe or its own path (that would make each layer a trace of its own).
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import jax

from nemotron_jax.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Precision:
    """How one matmul and its two gradient matmuls are computed: the dtype of their operands.

    Sums are float32 in either case; float32 operands are multiplied in full (no TF32).
    """

    operands: str = "bfloat16"


@dataclass(frozen=True)
class Recipe:
    """``activations``: dtype of the residual stream. ``rules``: (glob over paths, Precision); the first match wins."""

    activations: str
    rules: tuple[tuple[str, Precision], ...]

    def resolve(self, path: str) -> Precision:
        """The precision of the matmul at a parameter path such as ``layers/3/mixer/out_proj``."""
        for pattern, precision in self.rules:
            if fnmatch.fnmatchcase(path, pattern):
                return precision
        raise ConfigError(f"no rule of the precision recipe matches {path}: end the rules with one for '*'.")


# The router and its inputs are float32 in every recipe (Megatron-LM's moe-router-dtype), by construction of moe.py.
RECIPES = {
    "float32": Recipe("float32", (("*", Precision("float32")),)),
    "bfloat16": Recipe("bfloat16", (("*", Precision("bfloat16")),)),
}


def recipe(name: str) -> Recipe:
    """A recipe by name; ``auto`` is bfloat16 on GPU and float32 elsewhere (XLA:CPU emulates bfloat16, slowly)."""
    if name == "auto":
        name = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    if name not in RECIPES:
        known = ("auto", *RECIPES)
        raise ConfigError(
            f"precision.recipe must be one of {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}"
        )
    return RECIPES[name]
