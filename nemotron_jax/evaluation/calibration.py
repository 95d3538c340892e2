"""The ranges of a model's activations on some text: what FP8 and NVFP4 checkpoints store as activation scales.

The largest absolute value of every projection's inputs (of each routed expert's, over the tokens sent to it), and of
the keys and values, as ModelOpt's max calibration has it. The layers are those of the model itself: inside of one
program, projections are exchanged for subclasses that also note what they were given, so the model has no switch for
it. MTP is left out, as it is from quantisation.

Shapes: B batch, T time, D model width, K top-k, M rows sorted by expert.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from nemotron_jax.checkpoint.convert import Calibration
from nemotron_jax.checkpoint.hf import Table
from nemotron_jax.checkpoint.load import load
from nemotron_jax.data.pipeline import evaluation_batches
from nemotron_jax.errors import DataError
from nemotron_jax.inference.text import load_tokenizer
from nemotron_jax.model.context import Context
from nemotron_jax.model.linear import Linear
from nemotron_jax.model.mamba2 import InProj
from nemotron_jax.model.moe import Experts
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.precision.matmul import expert_matmul
from pallas_kernels import permute

ROWS, SEQ_LEN = 4, 4096
Rows = tuple[np.ndarray, np.ndarray]  # tokens and segment ids, int32 [B, T], no padding


def calibrate_on(checkpoint: Path, data: str, *, step: int | None = None) -> Calibration:
    """Reads the documents of some files with a checkpoint.

    Args:
      checkpoint: a training workdir or a Hugging Face directory.
      data: comma-separated paths, globs or "stdlib", as in ``data.files``.

    Raises:
      DataError: there is no text in them.
    """
    tokenizer = load_tokenizer(checkpoint)
    config, model = load(checkpoint, step=step)
    batches, _ = evaluation_batches(
        data, tokenizer, seq_len=min(SEQ_LEN, config.max_positions), batch_size=ROWS, vocab_size=config.vocab_size
    )
    return calibrate(model, without_padding((batch.tokens, batch.segment_ids) for batch in batches))


def without_padding(batches: Iterable[Rows]) -> Iterator[Rows]:
    """The same tokens in full rows, ROWS at a time; what is left at the end is dropped, unless there is nothing else.

    Raises:
      DataError: there are no tokens.
    """
    tokens, ids, length, last = [], [], 0, 0
    for tokens_BT, segments_BT in batches:
        # Ids of documents are unique only within a row.
        starts_BT = np.diff(segments_BT, axis=1, prepend=-1) != 0
        ids_BT = last + np.cumsum(starts_BT.ravel()).reshape(starts_BT.shape)
        length, last = tokens_BT.shape[1], int(ids_BT[-1, -1])
        tokens.append(tokens_BT[segments_BT != 0])
        ids.append(ids_BT[segments_BT != 0])
    total = sum(map(len, tokens))
    if not total:
        raise DataError("the calibration text is empty.")
    length = min(length, total)
    rows = total // length
    flat = [np.concatenate(parts)[: rows * length].astype(np.int32).reshape(rows, length) for parts in (tokens, ids)]
    for first in range(0, rows, ROWS):
        yield flat[0][first : first + ROWS], flat[1][first : first + ROWS]


def calibrate(model: Nemotron, batches: Iterable[Rows]) -> Calibration:
    """The ranges over some batches, by module as on disk (``backbone.layers.3.mixer.experts.7.up_proj``).

    Experts that no token reached are missing (checkpoint/modelopt.py, fill_expert_scales).
    """
    seen: dict[str, np.ndarray] = {}
    layers = [nnx.split(layer) for layer in model.layers]
    for tokens_BT, segments_BT in batches:
        ctx = Context(segment_ids=jnp.asarray(segments_BT))
        h_BTD = model.embeddings(jnp.asarray(tokens_BT))
        for index, (graphdef, leaves) in enumerate(layers):
            h_BTD, ranges = _observed_layer(graphdef, leaves, h_BTD, ctx)
            _merge(seen, {f"layers/{index}/{name}": value for name, value in ranges.items()})
        _merge(seen, {"lm_head": _range(model.norm_f(h_BTD))})
    table = Table(model.config)
    inputs, outputs = {}, {}
    for path, entries in table.of_leaf.items():
        owner = path.removesuffix("/weight").removesuffix("/z")
        if owner in seen:
            values = np.broadcast_to(seen[owner], len(entries))
            inputs.update({entry.module: float(v) for entry, v in zip(entries, values, strict=True) if v > 0})
        if f"{owner}/out" in seen:
            outputs[entries[0].module] = float(seen[f"{owner}/out"])
    return Calibration(inputs, outputs)


def _merge(seen: dict[str, np.ndarray], ranges: dict[str, Array]) -> None:
    for name, value in jax.device_get(ranges).items():
        seen[name] = np.maximum(seen.get(name, 0), value)


def _range(x: Array) -> Array:
    return jnp.max(jnp.abs(x.astype(jnp.float32)))


@functools.partial(jax.jit, static_argnums=0)
def _observed_layer(graphdef: nnx.GraphDef, leaves: Any, h_BTD: Array, ctx: Context) -> tuple[Array, dict[str, Array]]:
    """One layer and {``mixer/q_proj``: largest input, ``mixer/k_proj/out``: largest output, experts: [E]}."""
    layer = nnx.merge(graphdef, leaves)
    ranges: dict[str, Array] = {}
    for path, module in nnx.iter_modules(layer):
        if isinstance(module, Linear | InProj | Experts):
            module.__class__ = _observing(type(module), "/".join(map(str, path)), ranges)
    h_BTD, _, _ = layer(h_BTD, ctx, None)
    return h_BTD, ranges


def _observing(kind: Any, path: str, ranges: dict[str, Array]) -> type:
    """A subclass that notes its inputs, under its path within the layer, while the layer is traced."""

    class Observing(kind):
        def __call__(self, x: Array, *args: Any) -> Any:
            result = super().__call__(x, *args)
            if issubclass(kind, Experts):
                experts_BTK = args[0]
                flat = x.reshape(-1, x.shape[-1]), experts_BTK.reshape(-1, experts_BTK.shape[-1])
                rows, group_sizes, _ = permute(*flat, self.num_experts)
                hidden = expert_matmul(rows, self.up_proj[...], group_sizes, self.precision, activation="relu2")
                ranges[f"{path}/up_proj"] = _range_of_each(rows, group_sizes)
                ranges[f"{path}/down_proj"] = _range_of_each(hidden, group_sizes)
                return result
            ranges[path] = _range(x)
            if path.endswith(("k_proj", "v_proj")):
                ranges[f"{path}/out"] = _range(result)
            return result

    return Observing


def _range_of_each(rows: Array, group_sizes: Array) -> Array:
    """[M, ...] rows sorted by expert -> [E], 0 where there is none."""
    experts = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows.shape[0]), side="right")
    largest = jnp.abs(rows.astype(jnp.float32)).max(-1)
    return jnp.zeros(len(group_sizes), jnp.float32).at[experts].max(largest, mode="drop")
