"""Names and layouts: our parameter tree <-> the tensors of a Hugging Face checkpoint.

    ours                                     theirs
    embeddings/weight [V, d]                 backbone.embeddings.weight [V, d]
    layers/3/norm/weight [d]                 backbone.layers.3.norm.weight [d]
    layers/3/mixer/out_proj/weight [in, out] backbone.layers.3.mixer.out_proj.weight [out, in], as all matrices
    layers/3/mixer/in_proj/{z,x,B,C,dt}      backbone.layers.3.mixer.in_proj.weight, their rows in this order
    layers/3/mixer/conv1d/weight/{x,B,C}     backbone.layers.3.mixer.conv1d.weight [channels, 1, K]; biases alike
    layers/3/mixer/experts/up_proj [E, l, f] backbone.layers.3.mixer.experts.{e}.up_proj.weight [f, l], e < E
    mtp/layers/1/mixer/...                   mtp.layers.1.mixer....
    mtp/enorm/weight, hnorm, eh_proj         mtp.layers.0.enorm.weight, ...
    mtp/final_layernorm/weight               mtp.layers.{last}.final_layernorm.weight
    lm_head/weight [d, V]                    lm_head.weight [V, d]

Source: Megatron-Bridge, models/nemotronh/nemotron_h_bridge.py; names checked against the released tensor counts.
transformers 5 calls ``backbone`` ``model`` and stacks the experts; both are read, and never written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from flax import nnx

from nemotron_jax.checkpoint.modelopt import QuantConfig, Scheme
from nemotron_jax.checkpoint.safetensors import NAMES, Tensor
from nemotron_jax.config import ModelConfig
from nemotron_jax.model.nemotron import abstract
from nemotron_jax.precision.recipe import RECIPES

PARTS = {"in_proj": ("z", "x", "B", "C", "dt"), "conv1d": ("x", "B", "C")}  # leaves of one tensor, in its order
FLOAT32 = "e_score_correction_bias"  # rounded to bfloat16 it would choose other experts


@dataclass(frozen=True)
class Entry:
    """One tensor of the Hugging Face checkpoint (of a quantised module: its weight, as if it were not quantised).

    Attributes:
      name: as we write it.
      shape: on disk.
      leaves: paths of ours whose rows follow each other on disk; one, but for in_proj and conv1d.
      rows: of each leaf.
      expert: index into the first axis of a stacked leaf.
    """

    name: str
    shape: tuple[int, ...]
    leaves: tuple[str, ...]
    rows: tuple[int, ...]
    expert: int | None = None

    @property
    def module(self) -> str:
        """What quantisation maps call the layer that the weight belongs to."""
        return self.name.removesuffix(".weight")

    @property
    def is_float32(self) -> bool:
        return self.name.endswith(FLOAT32)

    @property
    def transposed(self) -> bool:
        """Matrices, but the embeddings: ours are [in, out], theirs [out, in]."""
        return len(self.shape) == 2 and not self.name.endswith("embeddings.weight")

    def tensor(self, dtype: str = "BF16") -> Tensor:
        """What the file says of it; the router correction bias is float32 whatever the others are."""
        return Tensor(self.name, "F32" if self.is_float32 else dtype, self.shape)


class Table:
    """All tensors of a model, in the order of its layers.

    Attributes:
      config: of the model.
      shapes: {path: shape} of our leaves.
      entries: {name on disk: Entry}.
      of_leaf: {path: entries that hold its values}: E of them for stacked experts, else one.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.shapes = leaf_shapes(config)
        self.entries: dict[str, Entry] = {}
        self.of_leaf: dict[str, list[Entry]] = {}
        for path in sorted(self.shapes, key=_order):
            for entry in self._entries(path):
                self.entries[entry.name] = entry
                for leaf in entry.leaves:
                    self.of_leaf.setdefault(leaf, []).append(entry)

    def _entries(self, path: str) -> list[Entry]:
        shape = self.shapes[path]
        names = path.split("/")
        if len(shape) == 3:
            experts, n_in, n_out = shape
            stem, projection = self._name(names[:-1]), names[-1]
            return [
                Entry(f"{stem}.{expert}.{projection}.weight", (n_out, n_in), (path,), (n_out,), expert)
                for expert in range(experts)
            ]
        kind = next((kind for kind in PARTS if kind in names), None)
        if kind is None:
            name = self._name(names)
            on_disk = shape[::-1] if not name.endswith("embeddings.weight") else shape
            return [Entry(name, on_disk, (path,), on_disk[:1])]
        if names[-1] != PARTS[kind][0]:
            return []  # told with the first part
        parts = [f"{path.rpartition('/')[0]}/{part}" for part in PARTS[kind]]
        if kind == "in_proj":
            rows, rest = [self.shapes[part][1] for part in parts], shape[:1]
            name = self._name([*names[:-1], "weight"])
        else:
            rows = [self.shapes[part][0] for part in parts]
            rest = (1, shape[1]) if len(shape) == 2 else ()
            name = self._name(names[:-1])
        return [Entry(name, (sum(rows), *rest), tuple(parts), tuple(rows))]

    def _name(self, names: list[str]) -> str:
        if names[0] == "mtp" and names[1] != "layers":
            last = len(self.config.mtp.pattern) - 1 if self.config.mtp else 0
            names = ["mtp", "layers", str(last if names[1] == "final_layernorm" else 0), *names[1:]]
        elif names[0] not in ("mtp", "lm_head"):
            names = ["backbone", *names]
        return ".".join(names)


def _order(path: str) -> tuple[int, int, str]:
    """Embeddings, layers by number, final norm, head, MTP; within a layer by name."""
    first, *rest = path.split("/")
    number = next((int(name) for name in rest if name.isdigit()), -1)
    # enorm, hnorm and eh_proj stand in front of the MTP module's layers, its norm behind them.
    if rest[0] == "final_layernorm":
        number = 1 << 30
    return ("embeddings", "layers", "norm_f", "lm_head", "mtp").index(first), number, path


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{``layers/0/mixer/in_proj/z``: shape} of every parameter and buffer, without making any."""
    _, variables = nnx.split(abstract(config, RECIPES["float32"]))
    return {
        "/".join(map(str, path)): tuple(variable.get_value().shape) for path, variable in nnx.to_flat_state(variables)
    }


def item_name(path: str) -> str:
    """Where a training checkpoint keeps one of our leaves."""
    return f"buffers/model/{path}" if path.endswith(FLOAT32) else f"params/{path}"


def canonical(name: str) -> str:
    """A name as we write it: transformers 5 says ``model`` for ``backbone``."""
    return re.sub(r"^model\.", "backbone.", name)


STACKED = re.compile(r"(.*\.experts)\.((?:up|down)_proj)$")  # transformers 5: all experts in one tensor


def to_ours(entry: Entry, array: np.ndarray) -> np.ndarray:
    """Rows of a tensor on disk -> the same values in our layout (a view)."""
    if entry.transposed:
        return array.T
    return array[:, 0] if array.ndim == 3 else array


def to_theirs(entry: Entry, array: np.ndarray) -> np.ndarray:
    """Values in our layout -> rows of the tensor on disk, contiguous."""
    if not entry.transposed:
        return array[:, None] if len(entry.shape) == 3 else array
    result = np.empty(array.shape[::-1], array.dtype)
    copy_into(result, array.T)
    return result


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source``, for transposed matrices in strips that stay in the cache: five times as fast."""
    if target.dtype != source.dtype or source.ndim != 2 or source.strides[1] <= source.strides[0]:
        target[...] = source
        return
    bits = f"u{source.dtype.itemsize}"  # numpy copies types that it does not know one element at a time
    source, target = source.view(bits), target.view(bits)
    for first in range(0, source.shape[1], 64):
        target[:, first : first + 64] = source[:, first : first + 64]


def scheme_of(entry: Entry, quant: QuantConfig | None) -> Scheme | None:
    """How the weight of an entry is quantised; None: not at all."""
    if quant is None or len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return None
    return quant.scheme(entry.module)


def tensors_of(entry: Entry, quant: QuantConfig | None, dtype: str) -> list[Tensor]:
    """What a checkpoint holds of an entry; ``dtype``: where it is not quantised.

    Raises:
      CheckpointError: its shape does not suit the format.
    """
    scheme = scheme_of(entry, quant)
    if scheme is None:
        tensors = [entry.tensor(dtype)]
    else:
        suffixes = scheme.tensors(entry.module, entry.shape)
        tensors = [Tensor(f"{entry.module}.{name}", NAMES[kind], shape) for name, (kind, shape) in suffixes.items()]
    # ModelOpt leaves MTP alone, its cache included.
    if quant is not None and quant.kv_scales(entry.module) and not entry.module.startswith("mtp."):
        tensors.append(Tensor(kv_scale_name(entry.module), "F32", (1,)))
    return tensors


def kv_scale_name(module: str) -> str:
    """``….k_proj.k_scale`` of ``….k_proj``."""
    return f"{module}.{module[-len('k_proj')]}_scale"
