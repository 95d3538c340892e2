"""Quantised checkpoints: which module is stored how, and one module's tensors ↔ one weight.

Sources: NVIDIA Model-Optimizer, torch/export/convert_hf_config.py and unified_export_hf.py; vLLM, modelopt.py;
compressed-tensors, nvfp4-pack-quantized.

A *module* is a tensor's name without its last part (``backbone.layers.3.mixer.experts.7.up_proj``), as on disk; a
*suffix* is that last part. Weights here are [out, in], the orientation on disk.

    scheme              tensors of a module
    FP8                 weight e4m3 [out, in], weight_scale [], input_scale []
    NVFP4               weight uint8 [out, in/2], weight_scale e4m3 [out, in/16], weight_scale_2 [], input_scale []
    W4A16_NVFP4         the same without input_scale
    compressed-tensors  weight_packed, weight_scale, weight_global_scale (= 1 / weight_scale_2), input_global_scale

Scalars are float32 and may be stored with shape [] or [1].
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemotron_jax.checkpoint.store import read_json
from nemotron_jax.errors import CheckpointError, did_you_mean
from nemotron_jax.precision import modelopt as arithmetic

FP8, NVFP4, W4A16_NVFP4, MIXED = "FP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"
ALGORITHMS = (FP8, NVFP4, W4A16_NVFP4)
HF_QUANT_CONFIG = "hf_quant_config.json"

# Modules that hold a weight to multiply with. Formats without a list of modules mean these, less what they exclude.
LINEAR = frozenset(
    "in_proj out_proj q_proj k_proj v_proj o_proj up_proj down_proj fc1_latent_proj fc2_latent_proj "
    "eh_proj lm_head".split()
)

BLOCK = arithmetic.BLOCK
_FLOAT32 = np.dtype(np.float32)
_UINT8 = np.dtype(np.uint8)

Tensors = dict[str, tuple[np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Scheme:
    """How one module's weight is stored. ``algo``: "FP8", "NVFP4" or "W4A16_NVFP4"."""

    algo: str
    compressed: bool = False  # the names of compressed-tensors: read, never written
    four_over_six: bool = False  # how `quantize` chooses block scales; nothing on disk says so

    @property
    def has_input_scale(self) -> bool:
        return self.algo != W4A16_NVFP4

    def tensors(self, module: str, shape: tuple[int, ...]) -> Tensors:
        """{suffix: (dtype, shape)} of a module whose weight is [out, in].

        Raises:
          CheckpointError: NVFP4 of a weight whose inputs are not a multiple of 16.
        """
        out, inputs = shape
        scalar: tuple[np.dtype, tuple[int, ...]] = (_FLOAT32, (1,) if self.compressed else ())
        if self.algo == FP8:
            tensors: Tensors = {"weight": (arithmetic.E4M3, (out, inputs)), "weight_scale": scalar}
        else:
            if inputs % arithmetic.BLOCK:
                raise CheckpointError(
                    f"{module} has {inputs} inputs; NVFP4 needs a multiple of {arithmetic.BLOCK}. "
                    "Exclude the module from quantisation."
                )
            tensors = {
                "weight_packed" if self.compressed else "weight": (_UINT8, (out, inputs // 2)),
                "weight_scale": (arithmetic.E4M3, (out, inputs // arithmetic.BLOCK)),
                "weight_global_scale" if self.compressed else "weight_scale_2": scalar,
            }
        if self.has_input_scale:
            tensors["input_global_scale" if self.compressed and self.algo != FP8 else "input_scale"] = scalar
        return tensors


def dequantize(scheme: Scheme, tensors: Mapping[str, ArrayLike]) -> NDArray:
    """{suffix: array} of one module -> its weight, float32 [out, in]. Activation scales play no part."""
    if scheme.algo == FP8:
        return arithmetic.dequantize_fp8(tensors["weight"], global_scale(scheme, tensors))
    codes = tensors["weight_packed" if scheme.compressed else "weight"]
    return arithmetic.dequantize_nvfp4(codes, tensors["weight_scale"], global_scale(scheme, tensors))


def global_scale(scheme: Scheme, tensors: Mapping[str, ArrayLike]) -> NDArray:
    """The one scale of a module's weight, float32 []: what its codes (NVFP4: and block scales) are multiplied by."""
    if scheme.compressed:
        return np.float32(1) / np.asarray(tensors["weight_global_scale"], np.float32).reshape(())
    name = "weight_scale" if scheme.algo == FP8 else "weight_scale_2"
    return np.asarray(tensors[name], np.float32).reshape(())


def quantize(scheme: Scheme, weight: ArrayLike, input_amax: float | None = None) -> dict[str, NDArray]:
    """A weight [out, in] of any float dtype -> {suffix: array}, as `Scheme.tensors` says.

    Args:
      input_amax: the largest absolute value among the module's inputs in a calibration run; formats that quantise
        activations (FP8, NVFP4) need it.

    Raises:
      CheckpointError: input_amax is missing, zero or not finite.
    """
    assert not scheme.compressed
    if scheme.algo == FP8:
        codes, scale = arithmetic.quantize_fp8(weight)
        tensors = {"weight": codes, "weight_scale": scale}
    else:
        codes, scales, scale_2 = arithmetic.quantize_nvfp4(weight, four_over_six=scheme.four_over_six)
        tensors = {"weight": codes, "weight_scale": scales, "weight_scale_2": scale_2}
    if scheme.has_input_scale:
        if input_amax is None or not (0 < input_amax < np.inf):
            raise CheckpointError(
                f"{scheme.algo} stores an activation scale, which needs the largest input of a calibration run: a "
                f"positive number, got {input_amax}. Give calibration text, or use W4A16_NVFP4."
            )
        tensors["input_scale"] = arithmetic.activation_scale(input_amax, scheme.algo)
    return tensors


_EXPERT = re.compile(r"^(.*\.experts\.)\d+(\..*)$")


def experts_of(module: str) -> str | None:
    """The name that the same projection of all experts of a layer shares; None for other modules."""
    return _EXPERT.sub(r"\1*\2", module) if _EXPERT.match(module) else None


def fill_expert_scales(scales: Mapping[str, float | None]) -> dict[str, float]:
    """{module: input amax or input_scale} with the missing ones (None, 0 or not finite) of experts filled in.

    An expert that no token of the calibration text reached has none (vLLM issue 45212 shows the NaN this leads to).
    It gets the largest of the same projection's experts in its layer: too large a scale costs a little precision,
    too small a one saturates.

    Raises:
      CheckpointError: nothing to fill one in from.
    """

    def usable(value: float | None) -> bool:
        return value is not None and 0 < float(value) < np.inf

    def group(module: str) -> str:
        return experts_of(module) or module

    largest: dict[str, float] = {}
    for module, value in scales.items():
        if value is not None and usable(value):
            largest[group(module)] = max(float(value), largest.get(group(module), 0.0))
    filled = {module: value if usable(value) else largest.get(group(module)) for module, value in scales.items()}
    missing = [module for module, value in filled.items() if value is None]
    if missing:
        raise CheckpointError(
            f"{len(missing)} modules have no activation scale, the first is {missing[0]}: use longer calibration text."
        )
    return {module: float(value) for module, value in filled.items() if value is not None}


@dataclass(frozen=True)
class QuantConfig:
    """Which modules of a checkpoint are quantised, and how.

    Attributes:
      algo: "FP8", "NVFP4", "W4A16_NVFP4", or "MIXED_PRECISION" with a scheme for each module.
      layers: {module: scheme}, for MIXED_PRECISION alone.
      exclude: globs over modules that are not quantised.
      kv_cache: "FP8" or None.
      compressed: the tensors have the names of compressed-tensors.
      producer: written into the files.
    """

    algo: str
    layers: Mapping[str, Scheme] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    kv_cache: str | None = None
    compressed: bool = False
    producer: tuple[tuple[str, str], ...] = (("name", "modelopt"), ("version", "0.43.0"))

    def scheme(self, module: str) -> Scheme | None:
        """How a module is stored; None: in full precision. ``model.`` and ``backbone.`` are the same prefix."""
        module = _canonical(module)
        if self.algo == MIXED:
            if module in self.layers:
                return self.layers[module]
            parents = (module[:end] for end in range(len(module)) if module[end] == ".")
            listed = [self.layers[parent] for parent in parents if parent in self.layers]
            return listed[-1] if listed and self._quantises(module) else None
        if not self._quantises(module):
            return None
        return Scheme(self.algo, self.compressed)

    def _quantises(self, module: str) -> bool:
        linear = module.rpartition(".")[2] in LINEAR
        return linear and not (self.exclude and _matcher(self.exclude).match(module))

    def kv_scales(self, module: str) -> bool:
        """Whether a k_proj or v_proj carries a k_scale or v_scale beside its weight."""
        return self.kv_cache is not None and module.rpartition(".")[2] in ("k_proj", "v_proj")

    def to_json(self) -> dict[str, dict[str, Any]]:
        """{"hf_quant_config.json": its content, "quantization_config": the entry of config.json}, ModelOpt's way."""
        assert not self.compressed
        layers = {module: _layer_json(scheme) for module, scheme in self.layers.items()}
        quantization: dict[str, Any] = {"quant_algo": self.algo, "kv_cache_quant_algo": self.kv_cache}
        if self.algo in (NVFP4, W4A16_NVFP4):
            quantization["group_size"] = arithmetic.BLOCK
        quantization["exclude_modules"] = list(self.exclude)
        if self.algo == MIXED:
            quantization["quantized_layers"] = layers
            by_algo: dict[str, list[str]] = {}
            for module, scheme in self.layers.items():
                by_algo.setdefault(scheme.algo, []).append(module)
            groups = [{**_group_json(algo), "targets": sorted(modules)} for algo, modules in by_algo.items()]
        else:
            groups = [{**_group_json(self.algo), "targets": ["Linear"]}]
        entry: dict[str, Any] = {
            "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
            "ignore": list(self.exclude),
            "quant_algo": self.algo,
        }
        if self.algo == MIXED:
            entry["quantized_layers"] = layers
        if self.kv_cache:
            entry["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        entry |= {"producer": dict(self.producer), "quant_method": "modelopt"}
        return {
            HF_QUANT_CONFIG: {"producer": dict(self.producer), "quantization": quantization},
            "quantization_config": entry,
        }


def _layer_json(scheme: Scheme) -> dict[str, Any]:
    return {"quant_algo": scheme.algo} | ({} if scheme.algo == FP8 else {"group_size": arithmetic.BLOCK})


def _group_json(algo: str) -> dict[str, Any]:
    kind: dict[str, Any] = {"dynamic": False, "num_bits": 8 if algo == FP8 else 4, "type": "float"}
    if algo != FP8:
        kind["group_size"] = arithmetic.BLOCK
    activations = {} if algo == W4A16_NVFP4 else {"input_activations": dict(kind)}
    return {**activations, "weights": kind}


def _canonical(module: str) -> str:
    """``backbone.`` as in the released files for ``model.``, as transformers 5 calls it in memory."""
    return "backbone." + module.removeprefix("model.") if module.startswith("model.") else module


@functools.lru_cache(maxsize=64)
def _matcher(globs: tuple[str, ...]) -> re.Pattern[str]:
    """Matches the modules that a list of globs covers, each with everything below it.

    Globs are fnmatch's; ``re:`` starts a regular expression from the beginning of the name (compressed-tensors). One
    expression for all of them, since Super has 41,100 modules to ask about.
    """
    below = r"(?:\..*)?\Z"
    parts = []
    for glob in globs:
        if glob.startswith("re:"):
            parts.append(glob[3:].replace(r"model\.", r"(?:model|backbone)\."))
        else:
            parts.append(fnmatch.translate(_canonical(glob)).removesuffix(r"\Z").removesuffix(r"\z") + below)
    return re.compile("|".join(f"(?:{part})" for part in parts))


def read_quant_config(directory: Path) -> QuantConfig | None:
    """The quantisation of a Hugging Face directory; None when it is not quantised.

    config.json's ``quantization_config`` tells more than hf_quant_config.json (W4A16), so it comes first; a mixed one
    that lists no layers takes them from the other file.

    Raises:
      CheckpointError: an unknown algorithm, or files that contradict each other.
    """
    entry, other = None, None
    if (directory / "config.json").exists():
        entry = read_json(directory / "config.json", "a model's config").get("quantization_config")
    if (directory / HF_QUANT_CONFIG).exists():
        other = read_json(directory / HF_QUANT_CONFIG, "ModelOpt's quantisation config")
    if entry and other:
        _check_kinds(entry, "quantization_config")
        theirs = _quantization(other)
        algos = entry.get("quant_algo", theirs.get("quant_algo")), theirs.get("quant_algo")
        if algos[0] != algos[1]:
            raise CheckpointError(
                f"{directory}: config.json says quant_algo={algos[0]!r}, {HF_QUANT_CONFIG} says {algos[1]!r}: "
                "delete the one that is wrong."
            )
        if algos[0] == MIXED and not entry.get("quantized_layers"):
            entry = {**entry, "quantized_layers": theirs.get("quantized_layers")}
    return parse_quant_config(entry or other)


def parse_quant_config(values: Mapping[str, Any] | None) -> QuantConfig | None:
    """The content of hf_quant_config.json, or of config.json's ``quantization_config`` -> QuantConfig.

    Returns None for nothing, and for a file that names no algorithm.

    Raises:
      CheckpointError: an algorithm, block size or cache format that is not supported, or a mixed one without layers.
    """
    if not values:
        return None
    given = _quantization(values)
    groups = _groups(given)
    method = given.get("quant_method")
    if method not in (None, "modelopt", "compressed-tensors"):
        raise CheckpointError(f"quant_method is {method!r}: this version reads modelopt and compressed-tensors.")
    compressed = method == "compressed-tensors"
    algo = given.get("quant_algo")
    if compressed:
        algo = _algo_of_compressed(given, groups)
    if algo is None:
        return None
    without_activations = bool(groups) and not any(group.get("input_activations") for group in groups)
    if algo == NVFP4 and without_activations:
        algo = W4A16_NVFP4
    layers = {}
    if algo == MIXED:
        listed = given.get("quantized_layers") or {}
        if not listed:
            raise CheckpointError(f"the quantisation config says {MIXED} but its quantized_layers names no layer.")
        layers = {_canonical(module): _layer_scheme(module, layer) for module, layer in listed.items()}
    else:
        _check_algo(algo, "quant_algo")
        _check_group_size(given.get("group_size"), "the quantisation config")
        for group in groups:
            _check_group_size((group.get("weights") or {}).get("group_size"), "config_groups")
    producer = values.get("producer") or {}
    return QuantConfig(
        algo=algo,
        layers=layers,
        exclude=tuple(given.get("exclude_modules") or given.get("ignore") or ()),
        kv_cache=_kv_cache(given.get("kv_cache_quant_algo") or given.get("kv_cache_scheme")),
        compressed=compressed,
        producer=tuple((str(key), str(value)) for key, value in producer.items()) or QuantConfig.producer,
    )


def _quantization(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of the quantisation, in either file. Raises CheckpointError for parts of the wrong kind."""
    _check_kinds(values, "the quantisation config")
    given = values.get("quantization", values)
    _check_kinds(given, "quantization")
    for key in ("exclude_modules", "ignore"):
        globs = given.get(key) or []
        if not isinstance(globs, list) or not all(isinstance(glob, str) for glob in globs):
            raise CheckpointError(f"{key} of the quantisation config should be a list of names, got {globs!r}.")
        for glob in globs:
            try:
                _matcher((glob,))
            except re.error as error:
                raise CheckpointError(f"{key} of the quantisation config has {glob!r}: {error}.") from error
    return given


def _check_kinds(values: Any, what: str) -> None:
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{what} should be an object, got {values!r}.")
    for key in ("producer", "quantized_layers"):
        if not isinstance(values.get(key) or {}, Mapping):
            raise CheckpointError(f"{key} of the quantisation config should be an object, got {values[key]!r}.")


def _groups(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = given.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(
        isinstance(group, Mapping) and isinstance(group.get("weights") or {}, Mapping) for group in groups.values()
    ):
        raise CheckpointError("config_groups of the quantisation config should be {name: {weights: …}}.")
    return list(groups.values())


def _algo_of_compressed(given: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> str:
    formats = {group.get("format") or given.get("format") for group in groups} or {given.get("format")}
    if formats != {"nvfp4-pack-quantized"}:
        shown = ", ".join(sorted(map(str, formats)))
        raise CheckpointError(
            f"compressed-tensors format {shown} cannot be read: nvfp4-pack-quantized is the one that is supported."
        )
    return NVFP4


def _layer_scheme(module: str, layer: Any) -> Scheme:
    if not isinstance(layer, Mapping):
        raise CheckpointError(f"quantized_layers should hold an object for {module}, got {layer!r}.")
    algo = layer.get("quant_algo")
    _check_algo(algo, f"quant_algo of {module}")
    _check_group_size(layer.get("group_size"), module)
    return Scheme(str(algo))


def _check_algo(algo: Any, what: str) -> None:
    if algo not in ALGORITHMS:
        known = (*ALGORITHMS, MIXED)
        raise CheckpointError(
            f"{what} is {algo!r}: this version reads {', '.join(known)}.{did_you_mean(str(algo), known)}"
        )


def _check_group_size(size: Any, where: str) -> None:
    if size not in (None, arithmetic.BLOCK):
        raise CheckpointError(f"group_size of {where} is {size!r}: NVFP4 has blocks of {arithmetic.BLOCK}.")


def _kv_cache(value: Any) -> str | None:
    if not value:
        return None
    if value == FP8 or (isinstance(value, Mapping) and value.get("num_bits") == 8 and value.get("type") == "float"):
        return FP8
    raise CheckpointError(f"the quantisation config has a {value!r} key/value cache: FP8 is the one that is supported.")
