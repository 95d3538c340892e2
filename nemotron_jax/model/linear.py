"""Weights: each declared once, with its shape, logical axes and initialisation.

A Scope travels through the constructors and hands each declaration its path, so that initial values depend on the
path alone (not on the order of construction) and the precision recipe is resolved where the weight is made. Nothing
of it is stored: layers of one kind have equal graph definitions and share one trace.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from nemotron_jax.parallel.embedding import lookup
from nemotron_jax.precision.matmul import matmul
from nemotron_jax.precision.recipe import Precision, Recipe

Init = Callable[[Array, tuple[int, ...]], Array]


class Buffer(nnx.Variable):
    """A variable without gradient: changed by the training step (router correction bias), never by the optimizer."""


@dataclass(frozen=True)
class Scope:
    """Where in the model a constructor stands: path, random key of the whole model, recipe."""

    key: Array
    recipe: Recipe
    path: str = ""

    def __truediv__(self, name: str | int) -> Scope:
        return replace(self, path=f"{self.path}/{name}" if self.path else str(name))

    def precision(self, n_in: int, n_out: int) -> Precision:
        """Of the matmul with a weight [n_in, n_out] here. Raises ConfigError when its sizes do not suit the format."""
        precision = self.recipe.resolve(self.path)
        precision.check(self.path, n_in, n_out)
        return precision

    def param(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Init) -> nnx.Param:
        """A float32 parameter ``name`` here; ``axes`` are the logical axes of parallel.mesh.RULES."""
        assert len(shape) == len(axes)
        key = jax.random.fold_in(self.key, zlib.crc32(f"{self.path}/{name}".encode()))
        return nnx.Param(init(key, shape), axes=axes)


def normal(std: float) -> Init:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def uniform(low: float, high: float) -> Init:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, low, high)


def constant(value: float) -> Init:
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


class Linear(nnx.Module):
    """``x [..., n_in] -> [..., n_out]`` without bias; weight [n_in, n_out]."""

    def __init__(self, scope: Scope, n_in: int, n_out: int, axes: tuple[str, str], std: float) -> None:
        self.weight = scope.param("weight", (n_in, n_out), axes, normal(std))
        self.precision = scope.precision(n_in, n_out)

    def __call__(self, x: Array, seed: Array | None = None, probe: Array | None = None) -> Array:
        return matmul(x, self.weight[...], self.precision, seed, probe)


class RMSNorm(nnx.Module):
    """RMS norm over the last axis in float32; the weight is multiplied before the cast (modeling_nemotron_h.py)."""

    def __init__(self, scope: Scope, size: int, eps: float) -> None:
        self.weight = scope.param("weight", (size,), ("norm",), constant(1.0))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.weight[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """Token ids [B, T] -> vectors [B, T, D] in the dtype of the residual stream."""

    def __init__(self, scope: Scope, vocab_size: int, size: int, std: float) -> None:
        self.weight = scope.param("weight", (vocab_size, size), ("vocab", "embed"), normal(std))
        self.dtype = scope.recipe.activations

    def __call__(self, tokens: Array) -> Array:
        return lookup(self.weight[...], tokens, self.dtype)
