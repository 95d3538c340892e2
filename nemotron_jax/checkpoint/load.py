"""Any directory that holds a model → its configuration and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from nemotron_jax.checkpoint.store import CheckpointStore, Restored, read_json
from nemotron_jax.config import ModelConfig
from nemotron_jax.errors import CheckpointError
from nemotron_jax.model.nemotron import Nemotron, abstract, split_model
from nemotron_jax.precision.recipe import recipe
from nemotron_jax.run_config import RunConfig, from_dict

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
TOKENIZER_FILE = "tokenizer.json"


def run_config(path: Path) -> RunConfig:
    """The config of a training workdir.

    Raises:
      CheckpointError: there is none, or it is no training workdir.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory: give the --workdir of a training run.")
    file = path / CONFIG_FILE
    if not file.exists():
        raise CheckpointError(f"{path} holds no {CONFIG_FILE}: give the --workdir of a training run.")
    values = read_json(file, "the config of a training run")
    if "model_type" in values:
        raise CheckpointError(f"{path} is a Hugging Face directory; only training workdirs can be read so far.")
    return from_dict(values)


def load(path: str | Path, *, step: int | None = None, precision: str = "auto") -> tuple[ModelConfig, Nemotron]:
    """Configuration and model of a training workdir, on the first device.

    Args:
      path: the ``--workdir`` of a run.
      step: which checkpoint; None: the newest whole one.
      precision: recipe to compute in: "auto", "float32", "bfloat16".

    Raises:
      CheckpointError: no such directory, step, or usable checkpoint.
    """
    path = Path(path)
    config = run_config(path).model
    graphdef, params, buffers = split_model(abstract(config, recipe(precision)))
    device = SingleDeviceSharding(jax.devices()[0])
    template = {"params": params, "buffers": {"model": buffers, "seed": jax.ShapeDtypeStruct((), jnp.uint32)}}
    items = read_items(path, _on(template, device), step=step).items
    return config, nnx.merge(graphdef, items["params"], items["buffers"]["model"])


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
