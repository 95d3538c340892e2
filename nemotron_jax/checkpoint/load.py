"""Any directory that holds a model → its configuration and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from nemotron_jax.checkpoint.hf_directory import QUANTIZED, HFDirectory
from nemotron_jax.checkpoint.packed import is_packable, read_packed
from nemotron_jax.checkpoint.store import CheckpointStore, Restored, named_leaves, read_json
from nemotron_jax.config import ModelConfig
from nemotron_jax.errors import CheckpointError
from nemotron_jax.model.nemotron import Nemotron, abstract, split_model
from nemotron_jax.parallel.mesh import shardings
from nemotron_jax.precision.recipe import Recipe, recipe
from nemotron_jax.run_config import RunConfig, from_dict
from pallas_kernels.packed import Packed

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
TOKENIZER_FILE = "tokenizer.json"
EXPECTED = "give the --workdir of a training run, or a Hugging Face directory"


def is_hf(path: Path) -> bool:
    """Whether a directory is laid out as Hugging Face's: its config.json has a model_type.

    Raises:
      CheckpointError: it is no directory with a config.json.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory: {EXPECTED}.")
    file = path / CONFIG_FILE
    if not file.exists():
        raise CheckpointError(f"{path} holds no {CONFIG_FILE}: {EXPECTED}.")
    values = read_json(file, "the config of a model")
    if "model_type" not in values and "model" not in values:
        raise CheckpointError(
            f"{file} has neither model_type (Hugging Face) nor model (train.py), so it describes no model: {EXPECTED}."
        )
    return "model_type" in values


def model_config(path: Path) -> ModelConfig:
    """The model of a directory of either kind. Raises CheckpointError."""
    if not is_hf(path):
        return run_config(path).model
    return HFDirectory(path).config


def run_config(path: Path) -> RunConfig:
    """The config of a training workdir.

    Raises:
      CheckpointError: there is none, or it is no training workdir.
    """
    if is_hf(path):
        raise CheckpointError(f"{path} is a Hugging Face directory: give the --workdir of a training run.")
    values = read_json(path / CONFIG_FILE, "the config of a training run")
    return from_dict(values)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    precision: str = "auto",
    mesh: Mesh | None = None,
    packed: bool = False,
) -> tuple[ModelConfig, Nemotron]:
    """Configuration and model of a training workdir or a Hugging Face directory.

    Each device reads its own part of each weight. Weights are float32, quantised ones dequantised; the matrices of a
    Hugging Face directory have the dtype in which the recipe multiplies them, which halves their memory under bfloat16.

    Args:
      path: the ``--workdir`` of a run, or a directory with config.json and safetensors files.
      step: which checkpoint of a run; None: the newest whole one.
      precision: recipe to compute in: "auto", "float32", "bfloat16".
      mesh: of parallel.mesh.make_mesh, to shard the weights by its table; None: all on the first device.
      packed: keep quantised weights as they are stored and unpack them when they are multiplied. Such weights are
        frozen.

    Raises:
      CheckpointError: no such directory, step, or usable checkpoint; everything that is wrong with it.
    """
    path = Path(path).expanduser()
    source = HFDirectory(path) if is_hf(path) else None
    config = source.config if source else run_config(path).model
    chosen = recipe(precision, config)
    graphdef, params, buffers = split_model(abstract(config, chosen))
    template = {"params": params, "buffers": {"model": buffers, "seed": jax.ShapeDtypeStruct((), jnp.uint32)}}
    if mesh is None:
        placed = _on(template, SingleDeviceSharding(jax.devices()[0]))
    else:
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            template,
            shardings(template, mesh),
        )
    if source:
        placed["params"] = _as_multiplied(placed["params"], chosen)
    items = read_weights(source or path, placed, step=step, packed=packed)
    return config, nnx.merge(graphdef, items["params"], items["buffers"]["model"])


def _as_multiplied(template: Any, recipe: Recipe) -> Any:
    """Matrices in the dtype of their matmul. The router is float32, and so is all that is no matrix."""

    def dtype(name: str) -> str:
        *parents, last = name.split("/")
        if name in ("embeddings/weight", "lm_head/weight"):
            return recipe.activations
        if parents[-1] in ("in_proj", "experts") or (last == "weight" and parents[-1].endswith("_proj")):
            return recipe.resolve("/".join(parents)).operands
        return "float32"

    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, dtype(name), sharding=leaf.sharding)
        for name, leaf in named_leaves(template).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def read_weights(
    source: Path | HFDirectory, template: dict[str, Any], *, step: int | None = None, packed: bool = False
) -> dict[str, Any]:
    """Parameters and buffers of a directory of either kind, in the place of the template's shapes.

    Args:
      template: {"params": tree, "buffers": {"model": tree, "seed": scalar}} of ShapeDtypeStruct with shardings.
      packed: quantised weights stay packed where a matmul can take them so.

    Returns:
      The same tree of arrays; a Hugging Face directory has no seed.

    Raises:
      CheckpointError: everything that is wrong with the directory.
    """
    if isinstance(source, Path):
        if not is_hf(source):
            return _read_workdir(source, template, step, packed)
        source = HFDirectory(source)
    if step is not None:
        raise CheckpointError(f"{source.path} is a Hugging Face directory and has no steps: leave step away.")
    items = {
        "params": _from_hf(source, template["params"], packed),
        "buffers": {"model": _from_hf(source, template["buffers"]["model"], packed)},
    }
    source.report.raise_if_any("Nothing was loaded.")
    return items


def _from_hf(source: HFDirectory, template: Any, packed: bool) -> Any:
    axes = _logical_axes(template)
    leaves = [_leaf(source, name, wanted, axes[name], packed) for name, wanted in named_leaves(template).items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _logical_axes(template: Any) -> dict[str, tuple[str, ...]]:
    return {"/".join(map(str, path)): variable.axes for path, variable in nnx.to_flat_state(template)}


def _leaf(
    source: HFDirectory, name: str, wanted: jax.ShapeDtypeStruct, axes: tuple[str, ...], packed: bool
) -> jax.Array | Packed:
    """One leaf, each device's part read for that device alone."""
    if packed and is_packable(source, name):
        return read_packed(source, name, axes, wanted.sharding)

    def part(index: Any) -> np.ndarray:
        return source.leaf(name, index).astype(wanted.dtype, copy=False)

    return jax.make_array_from_callback(wanted.shape, wanted.sharding, part)


def _read_workdir(path: Path, template: dict[str, Any], step: int | None, packed: bool) -> dict[str, Any]:
    if not (path / QUANTIZED).is_dir():
        return read_items(path, template, step=step).items
    source = HFDirectory(path / QUANTIZED, partial=True)
    flat, axes = named_leaves(template["params"]), _logical_axes(template["params"])
    aside = {name for name in flat if source.scheme(source.table.of_leaf[name][0]) is not None}
    kept = {name: wanted for name, wanted in flat.items() if name not in aside}
    items = read_items(path, {**template, "params": kept}, step=step).items
    leaves = [
        items["params"][name] if name in kept else _leaf(source, name, flat[name], axes[name], packed) for name in flat
    ]
    source.report.raise_if_any("Nothing was loaded.")
    return {**items, "params": jax.tree.unflatten(jax.tree.structure(template["params"]), leaves)}


def read_items(path: Path, template: dict[str, Any], *, step: int | None = None) -> Restored:
    """Items of a checkpoint in a training workdir, shaped and placed like the template.

    Raises:
      CheckpointError: there is no checkpoint, or none that fits.
    """
    directory = path / CHECKPOINTS
    if not directory.is_dir():
        raise CheckpointError(f"{path} holds no {CHECKPOINTS}/: the run has not saved one yet.")
    store = CheckpointStore(directory)
    try:
        if not store.steps():
            raise CheckpointError(f"{directory} holds no finished checkpoint yet.")
        return store.read(template, step)
    finally:
        store.close()


def _on(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
