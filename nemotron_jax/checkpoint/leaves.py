"""The leaves of a training checkpoint one at a time, in parts: what conversion needs, and Orbax does not offer.

Orbax writes a checkpoint from arrays that are all in memory. Here it writes one of placeholders, which fixes
everything but the arrays; those are then written into its store with TensorStore, block by block. Reading goes
straight to the store as well. Where Orbax keeps what: ``params/_METADATA`` (JSON: names, kind of store), the arrays
in Zarr format inside of one OCDBT database a folder, under the names of the leaves with dots.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from nemotron_jax.checkpoint.store import CheckpointStore, block_checksum, read_json
from nemotron_jax.errors import CheckpointError

METADATA = "_METADATA"
META_FILE = "meta/metadata"
# Blocks wait for each other's fsync otherwise; the store is synchronised as a whole at the end.
_CONTEXT = {"file_io_sync": False}


class LeafReader:
    """The arrays of one step of ``DIR/checkpoints``.

    Attributes:
      arrays: {``params/layers/0/norm/weight``: array on disk}, with ``.shape`` and ``.dtype``.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """

    def __init__(self, directory: Path, items: Sequence[str], step: int | None = None) -> None:
        self.directory = _step(directory, step)
        self._checksums: dict[str, int] = read_json(self.directory / META_FILE, "a checkpoint's checksums")["checksums"]
        self._sums: dict[str, int] = {}
        self.arrays: dict[str, Any] = {}
        for item in items:
            metadata = read_json(self.directory / item / METADATA, "Orbax's list of arrays")
            for entry in metadata["tree_metadata"].values():
                keys = [str(part["key"]) for part in entry["key_metadata"]]
                spec = _spec(self.directory / item, keys, metadata)
                try:
                    self.arrays["/".join([item, *keys])] = ts.open(spec, read=True).result()
                except ValueError as error:
                    raise CheckpointError(f"{self.directory} is damaged: {_first_line(error)}.") from error

    def blocks(self, name: str, axis: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first index, values) along an axis, in the pieces in which the array lies on disk.

        Raises:
          CheckpointError: what is on disk is not what was saved.
        """
        array = self.arrays[name]
        size = array.shape[axis] if array.shape else 1
        step = array.chunk_layout.read_chunk.shape[axis] if array.shape else 1
        self._sums[name] = 0
        for first in range(0, size, step):
            part = (slice(None),) * axis + (slice(first, min(first + step, size)),) if array.shape else ()
            try:
                block = array[part].read().result()
            except ValueError as error:
                raise CheckpointError(f"{self.directory}: {name} is damaged: {_first_line(error)}.") from error
            start = [first if place == axis else 0 for place in range(len(array.shape))]
            self._sums[name] = (self._sums[name] + block_checksum(block, start, array.shape)) % 2**32
            yield first, block
        if self._checksums.get(name) != self._sums[name]:
            raise CheckpointError(f"{self.directory}: {name} does not match its checksum.")


class LeafWriter:
    """Writes step 0 of ``DIR/checkpoints`` in blocks.

    Args:
      directory: ``DIR/checkpoints``, made here.
      leaves: {``params/layers/0/norm/weight``: (shape, dtype)}.
      blocks: {name: shape of the blocks in which it will be written}.
    """

    def __init__(
        self,
        directory: Path,
        leaves: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        blocks: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._step = directory / "0"
        self._leaves = leaves
        self._sums = dict.fromkeys(leaves, 0)
        items: dict[str, Any] = {}
        for name in leaves:
            node = items
            *parents, last = name.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = jnp.zeros(1, jnp.uint8)
        with contextlib.closing(CheckpointStore(directory)) as store:
            try:
                store.save(0, items, {})
                store.wait()
            except CheckpointError as error:  # its advice is for training
                raise error.__cause__ or error from None
        self._specs: dict[str, Any] = {}
        self._arrays: dict[str, Any] = {}
        for item in items:
            metadata = read_json(self._step / item / METADATA, "Orbax's list of arrays")
            for entry in metadata["tree_metadata"].values():
                keys = [str(part["key"]) for part in entry["key_metadata"]]
                name = "/".join([item, *keys])
                shape, dtype = leaves[name]
                entry["value_metadata"]["write_shape"] = list(shape)
                zarr = {
                    "shape": list(shape),
                    "chunks": [max(1, size) for size in blocks.get(name, shape)],
                    "dtype": dtype.name if dtype.name == "bfloat16" else dtype.str,
                    "compressor": None,
                }
                spec = {**_spec(self._step / item, keys, metadata), "metadata": zarr, "context": _CONTEXT}
                self._specs[name] = spec
            (self._step / item / METADATA).write_text(json.dumps(metadata))
            for file in (self._step / item / "array_metadatas").iterdir():
                values = json.loads(file.read_text())
                for entry in values["array_metadatas"]:
                    described = entry["array_metadata"]
                    name = f"{item}/{described['param_name'].replace('.', '/')}"
                    described["write_shape"] = list(leaves[name][0])
                    described["chunk_shape"] = list(blocks.get(name, leaves[name][0]))
                file.write_text(json.dumps(values))

    def write(self, name: str, start: Sequence[int], block: np.ndarray) -> None:
        """A block whose first element has index ``start``. Raises ValueError, as TensorStore does, on a full disk."""
        array = self._arrays.get(name)
        if array is None:
            array = ts.open(self._specs[name], create=True, delete_existing=True).result()
            self._arrays = {name: array}  # one at a time
        part = tuple(slice(first, first + size) for first, size in zip(start, block.shape, strict=True))
        array[part].write(block).result()
        shape = self._leaves[name][0]
        self._sums[name] = (self._sums[name] + block_checksum(block, start, shape)) % 2**32

    def finish(self) -> None:
        """Puts the checksums in place."""
        file = self._step / META_FILE
        meta = json.loads(file.read_text())
        meta["checksums"] = self._sums
        file.write_text(json.dumps(meta))


def _spec(directory: Path, keys: Sequence[str], metadata: Mapping[str, Any]) -> dict[str, Any]:
    base = f"file://{directory.absolute()}/"
    kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(keys) + "/"}
    if not metadata.get("use_ocdbt", True):
        kvstore = {"driver": "file", "path": f"{directory.absolute()}/{'.'.join(keys)}/"}
    return {"driver": "zarr3" if metadata.get("use_zarr3") else "zarr", "kvstore": kvstore}


def _step(directory: Path, step: int | None) -> Path:
    if not directory.is_dir():
        raise CheckpointError(f"{directory.parent} holds no {directory.name}/: the run has not saved one yet.")
    with contextlib.closing(CheckpointStore(directory)) as store:
        steps = store.steps()
    if not steps:
        raise CheckpointError(f"{directory} holds no finished checkpoint yet.")
    if step is not None and step not in steps:
        raise CheckpointError(f"there is no checkpoint of step {step} in {directory}; there are {steps}.")
    return directory / str(steps[-1] if step is None else step)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]
