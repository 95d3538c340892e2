"""Precision recipes: ordered path rules that give every matmul of the model its precision.

A recipe is resolved once, when the model is constructed, and can be printed as a table; a layer stores the Precision
it was given, never the recipe or its own path (that would make each layer a trace of its own).

``nvfp4`` is the pre-training recipe of Nemotron 3 Super (NVIDIA-NeMo/Nemotron, super3/pretrain.md; Megatron-Bridge,
te_quant.cfg): routed and shared experts, dense MLPs and Mamba's in_proj in NVFP4, Mamba's out_proj in MXFP8, and in
bfloat16 attention, latent projections, MTP and every matmul of the last layers.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from nemotron_jax.config import ModelConfig
from nemotron_jax.errors import ConfigError, did_you_mean
from pallas_kernels.dispatch import on_gpu

# What the sizes of a quantised matmul must divide by: the elements that share a scale.
MULTIPLES = {"nvfp4": 16, "mxfp8": 32, "fp8": 1}


class Cut(NamedTuple):
    """Where devices compute a matmul of parts (inside of a shard_map): the mesh axes over which they hold other ones.

    A tensor's amax is that of all its parts.
    """

    rows: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


WHOLE = Cut()


@dataclass(frozen=True)
class Precision:
    """How one matmul and its two gradient matmuls are computed.

    Sums are float32 in either case; float32 operands are multiplied in full (no TF32).

    Attributes:
      operands: dtype of what is multiplied. Codes times block scales are exact in bfloat16.
      format: "" (none), "nvfp4", "mxfp8" or "fp8": operands are rounded to it first (precision/quantized.py).
      weight_block: nvfp4: "16x16", so that the forward and the backward pass see one weight, or "1x16".
      stochastic: nvfp4: gradients are rounded stochastically.
      hadamard: nvfp4: both operands of the weight gradient are transformed first.
      cut: of the experts, set where they are computed (model/moe.py); other matmuls are cut by XLA, which sees whole
        tensors.
    """

    operands: str = "bfloat16"
    format: str = ""
    weight_block: str = "16x16"
    stochastic: bool = True
    hadamard: bool = True
    cut: Cut = WHOLE

    @property
    def draws(self) -> bool:
        """Whether random bits are drawn."""
        return self.format == "nvfp4" and self.stochastic

    def __str__(self) -> str:
        if self.format != "nvfp4":
            return self.format or self.operands
        without = [name for name, on in (("SR", self.stochastic), ("RHT", self.hadamard)) if not on]
        return f"nvfp4, weights {self.weight_block}" + "".join(f", no {name}" for name in without)

    def check(self, path: str, n_in: int, n_out: int) -> None:
        """Raises ConfigError when a weight [n_in, n_out] does not divide into blocks."""
        multiple = MULTIPLES.get(self.format, 1)
        for name, size in (("inputs", n_in), ("outputs", n_out)):
            if size % multiple:
                raise ConfigError(
                    f"{path} has {size} {name}; {self.format} needs a multiple of {multiple}. Leave it in bfloat16 by "
                    f"a rule, --config.precision.exclude='{_every_layer(path)}' (rules are separated by commas), or "
                    "change the model's widths."
                )


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

    def table(self, paths: Iterable[str]) -> dict[str, Precision]:
        """{path: precision} of the matmuls of a model.

        Raises:
          ConfigError: a rule before the last one matches none of them.
        """
        paths = list(paths)
        for pattern, _ in self.rules[:-1]:
            if not fnmatch.filter(paths, pattern):
                hint = did_you_mean(pattern, paths)
                raise ConfigError(f"the rule {pattern!r} of the precision recipe matches no matmul of the model.{hint}")
        return {path: self.resolve(path) for path in paths}

    def describe(self, paths: Iterable[str]) -> dict[str, str]:
        """``{"matmuls in mxfp8": "mixer/out_proj of layers 0 2 4"}``: the start-up table. Raises as `table` does."""
        found: dict[str, dict[str, list[str]]] = {}
        for path, precision in self.table(paths).items():
            where, _, name = path.partition("/mixer/")
            found.setdefault(f"matmuls in {precision}", {}).setdefault(name or path, []).append(where.split("/", 1)[-1])
        if len(found) == 1:
            return dict.fromkeys(found, "all")
        return {
            kind: "; ".join(f"{name} of {_layers(layers)}" for name, layers in names.items())
            for kind, names in found.items()
        }


def _every_layer(path: str) -> str:
    """The rule for the matmuls of one name: ``layers/*/mixer/in_proj``."""
    return re.sub(r"layers/\d+/", "layers/*/", path)


def _layers(names: list[str]) -> str:
    """``layers 0 2 4, mtp``."""
    numbers = [name for name in names if name.isdigit()]
    others = ["mtp" for name in names if not name.isdigit()]
    return ", ".join([f"layers {' '.join(numbers)}"] * bool(numbers) + others[:1])


# The router and its inputs are float32 in every recipe (Megatron-LM's moe-router-dtype), by construction of moe.py.
RECIPES = {
    "float32": Recipe("float32", (("*", Precision("float32")),)),
    "bfloat16": Recipe("bfloat16", (("*", Precision("bfloat16")),)),
}

# Recipes that depend on the model: what takes the place of nvfp4 in the rules of the top of this file.
_NVFP4 = Precision(format="nvfp4")
QUANTIZED = {
    "nvfp4": _NVFP4,
    "nvfp4-no-rht": replace(_NVFP4, hadamard=False),
    "nvfp4-no-sr": replace(_NVFP4, stochastic=False),
    "nvfp4-1d-weights": replace(_NVFP4, weight_block="1x16"),
    "nvfp4-all-layers": _NVFP4,  # every matmul of every layer: no exceptions at all
    "mxfp8": Precision(format="mxfp8"),
    "fp8": Precision(format="fp8"),
}


def recipe(name: str, model: ModelConfig | None = None, exclude: str = "", *, key: str = "precision.recipe") -> Recipe:
    """A recipe by name; ``auto`` is bfloat16 on GPU and float32 elsewhere (XLA:CPU emulates bfloat16, slowly).

    Args:
      model: what the rules of a quantised recipe are made for.
      exclude: comma-separated globs over paths such as ``layers/3/mixer/in_proj``: what a quantised recipe leaves in
        bfloat16 beside its own exceptions. The other recipes quantise nothing and have no use for it.
      key: what asks for the recipe, for messages.

    Raises:
      ConfigError: an unknown name, or a quantised recipe without a model.
    """
    if name == "auto":
        name = "bfloat16" if on_gpu() else "float32"
    if name in RECIPES:
        return RECIPES[name]
    if name not in QUANTIZED:
        known = ("auto", *RECIPES, *QUANTIZED)
        raise ConfigError(f"{key} must be one of {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}")
    if model is None:
        raise ConfigError(f"{key} {name!r} depends on the model: it cannot be had without one.")
    excluded = [(rule, Precision("bfloat16")) for rule in map(str.strip, exclude.split(",")) if rule]
    return Recipe("bfloat16", (*excluded, *_rules(name, model)))


def block_of(name: str) -> int:
    """Elements that share a scale in the quantised matmuls of a recipe; 1 of others."""
    return MULTIPLES[QUANTIZED[name].format] if name in QUANTIZED else 1


def _rules(name: str, model: ModelConfig) -> Iterable[tuple[str, Precision]]:
    # Quantised operands are exact in float32 as well as in bfloat16, and the CPU multiplies float32.
    operands = "bfloat16" if on_gpu() else "float32"
    full, quantized = Precision("bfloat16"), replace(QUANTIZED[name], operands=operands)
    if name == "nvfp4-all-layers":
        yield "*", quantized
        return
    if model.mtp is not None:
        yield "mtp/*", full
    depth = len(model.pattern)
    last = range(depth - last_layers_in_full(model), depth)
    yield from ((f"layers/{layer}/*", full) for layer in last)
    quantised_layers = set(model.pattern[: last.start])
    if "*" in quantised_layers:
        yield "*/mixer/[qkvo]_proj", full
    if "E" in quantised_layers and model.moe.latent_size:
        yield "*/mixer/fc[12]_latent_proj", full
    if "M" in quantised_layers and quantized.format == "nvfp4":
        yield "*/mixer/out_proj", replace(quantized, format="mxfp8")  # values of it underflow in NVFP4
    yield "*", quantized


def last_layers_in_full(model: ModelConfig) -> int:
    """14 of Super's 88 layers, 16 of Ultra's 108: a share (15 %) of the layers, rounded up."""
    return math.ceil(model.bfloat16_share * len(model.pattern) - 1e-6)
