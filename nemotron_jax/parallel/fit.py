"""Whether a model, a batch and a sequence can be cut by a mesh: said before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable

from jax.sharding import AbstractMesh, Mesh

from nemotron_jax.config import ModelConfig
from nemotron_jax.errors import ConfigError
from nemotron_jax.parallel.mesh import mesh_axes


def check_model(model: ModelConfig, mesh: Mesh | AbstractMesh, block: int = 1) -> None:
    """Raises ConfigError where an axis does not divide what it cuts, naming the sizes that would do.

    That is experts, groups and heads, which kernels need whole, and the widths of weights: a matrix that stayed whole
    on each device would not fit where the mesh was chosen so that it does. The vocabulary may stay whole (`kept_whole`
    in parallel/mesh.py says so at the start of a run).

    Args:
      block: elements that share a scale of quantisation; those of an expert have to be on one device.
    """
    letters = model.pattern + (model.mtp.pattern if model.mtp else "")
    if "M" in letters:  # heads are a multiple of groups
        groups = model.mamba.num_groups
        _require(mesh, "groups", groups, f"model.mamba.num_groups ({groups})", lambda n: groups % n == 0)
    if "*" in letters:
        heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
        shown = f"model.attention.num_heads ({heads}) together with num_kv_heads ({kv_heads})"
        _require(mesh, "heads", heads, shown, lambda n: heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0))
    if "E" in letters:
        experts = model.moe.num_experts
        _require(mesh, "experts", experts, f"model.moe.num_experts ({experts})", lambda n: experts % n == 0)
    widths = {"hidden_size": ("embed", model.hidden_size)}
    if "-" in letters:
        widths["intermediate_size"] = ("mlp", model.intermediate_size)
    if "E" in letters:
        widths["moe.intermediate_size"] = ("expert_mlp", model.moe.intermediate_size)
        widths["moe.shared_intermediate_size"] = ("mlp", model.moe.shared_intermediate_size)
        if model.moe.latent_size:
            widths["moe.latent_size"] = ("latent", model.moe.latent_size)
    for key, (name, width) in widths.items():
        shown, fits = f"model.{key} ({width})", _divides(width)
        if name == "expert_mlp" and block > 1 and _shards(mesh, name) > 1:
            shown, fits = (
                f"{shown} into parts of whole blocks of {block}, which share a scale",
                _divides(width // block),
            )
        _require(mesh, name, width, shown, fits)


def _shards(mesh: Mesh | AbstractMesh, name: str) -> int:
    """Parts into which a mesh cuts a logical axis."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(name))


def _divides(size: int) -> Callable[[int], bool]:
    return lambda n: size % n == 0


def _require(mesh: Mesh | AbstractMesh, name: str, most: int, shown: str, fits: Callable[[int], bool]) -> None:
    sizes = {axis: mesh.shape[axis] for axis in mesh_axes(name)}
    parts = _shards(mesh, name)
    if fits(parts):
        return
    cutting = {axis: size for axis, size in sizes.items() if size > 1}
    asked, it = " * ".join(f"parallel.{axis}={size}" for axis, size in cutting.items()), "it"
    if len(cutting) > 1:
        asked, it = f"{asked} ({parts} devices)", "their product"
    good = ", ".join(str(n) for n in range(1, most + 1) if fits(n) and n <= max(64, 2 * parts))
    raise ConfigError(f"{asked} does not divide {shown}: {it} may be one of {good}.")


def check_batch(
    model: ModelConfig, mesh: Mesh | AbstractMesh, *, rows: int, rows_name: str, seq_len: int, seq_name: str
) -> None:
    """Raises ConfigError where the rows of a microbatch or the tokens of a row do not divide over the mesh.

    Args:
      rows_name, seq_name: what the user calls them.
    """
    axes = mesh_axes("batch")
    parts = _shards(mesh, "batch")
    if rows % parts:
        sizes = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        raise ConfigError(
            f"{rows_name} is {rows} sequences, which do not divide over the {parts} devices of the mesh axes that hold "
            f"rows ({sizes}): make it a multiple of {parts}."
        )
    (axis,) = mesh_axes("time")
    parts = mesh.shape[axis]
    if seq_len % parts:
        good = [str(n) for n in range(1, seq_len + 1) if seq_len % n == 0]
        raise ConfigError(
            f"{seq_name} ({seq_len}) must be a multiple of parallel.{axis} ({parts}): make it "
            f"{seq_len // parts * parts or parts} or {(seq_len // parts + 1) * parts}, or parallel.{axis} one of "
            f"{', '.join(good)}."
        )
    before = model.mamba.conv_kernel - 1
    if parts > 1 and "M" in model.pattern and seq_len // parts < before:
        raise ConfigError(
            f"parallel.{axis}={parts} leaves {seq_len // parts} tokens of {seq_name} ({seq_len}) to a device, but the "
            f"convolution of Mamba reads {before} tokens before each: at most {seq_len // before} devices would do."
        )
