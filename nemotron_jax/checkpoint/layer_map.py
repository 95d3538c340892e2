"""Which modules a checkpoint in FP8 or NVFP4 quantises when nobody says otherwise: the published maps.

Sources: the hf_quant_config.json of NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4 and -Nano-30B-A3B-NVFP4; Nemotron 3 Nano
report, section 4; Super report, section 4 and table 6; Model-Optimizer, modelopt_recipes (nvfp4-max-calib.yaml).

    models with latent experts     FP8: experts, shared experts, Mamba in_proj and out_proj
    (Super, Ultra)                 NVFP4: routed experts NVFP4, shared experts and Mamba projections FP8; for Super
                                   itself the list that NVIDIA's search chose, with 139 FP8 and 40,961 NVFP4 modules
    the others (Nano, Lightning)   everything but attention and the Mamba layers right before attention

The key/value cache is FP8. Embeddings, lm_head, routers, convolutions, norms and MTP stay in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemotron_jax.checkpoint.modelopt import FP8, MIXED, NVFP4, QuantConfig, Scheme
from nemotron_jax.config import PRESETS, ModelConfig
from nemotron_jax.errors import ConfigError

# Super's list, by layer. Where a layer is absent its module is BF16.
_SUPER_IN_PROJ = {0, 2, 4, 6, 9, 11, 13, 15, 18, 20, 27, 29, 31, 40, 49, 51, 53, 55, 57, 60, 62, 66, 68, 71, 73, 82, 84}
_SUPER_IN_PROJ |= {86}
_SUPER_OUT_PROJ = {0, 2, 4, 9, 11, 13, 18, 38, 40, 42, 44, 49, 51, 53, 55, 57, 60, 62, 64, 66, 68, 71, 73, 75, 77, 80}
_SUPER_OUT_PROJ |= {82, 84, 86}
_SUPER_FC1, _SUPER_FC2, _SUPER_O_PROJ = {1, 3, 5}, {3}, {69, 78}
_SUPER_SHARED_UP_BF16, _SUPER_SHARED_DOWN_BF16, _SUPER_SHARED_DOWN_NVFP4 = {41}, {8, 76}, {1}


def default_layer_map(config: ModelConfig, format: str) -> QuantConfig:
    """The published recipe for a model of this shape; ``format``: "fp8" or "nvfp4".

    Raises:
      ConfigError: another format.
    """
    if format not in ("fp8", "nvfp4"):
        raise ConfigError(f"format must be fp8 or nvfp4, got {format!r}.")
    if not config.moe.latent_size or "E" not in config.pattern:
        algo = FP8 if format == "fp8" else NVFP4
        return QuantConfig(algo, exclude=tuple(_nano_excluded(config.pattern)), kv_cache=_kv(config))
    if format == "fp8":
        return QuantConfig(FP8, exclude=tuple(_super_fp8_excluded(config.pattern)), kv_cache=_kv(config))
    chosen = _super_list if config.pattern == PRESETS["super"].pattern else _super_rule
    # Ultra's block scales were chosen by four over six (Ultra report, section 4).
    ultra = config.pattern == PRESETS["ultra"].pattern
    layers = {module: Scheme(algo, four_over_six=ultra and algo == NVFP4) for module, algo in chosen(config)}
    return QuantConfig(MIXED, layers=layers, exclude=_OUTSIDE, kv_cache=_kv(config))


_OUTSIDE = ("lm_head", "mtp*", "backbone.embeddings", "*.conv1d", "*.gate")


def _kv(config: ModelConfig) -> str | None:
    return FP8 if "*" in config.pattern else None


def _mixer(layer: int) -> str:
    return f"backbone.layers.{layer}.mixer"


def _nano_excluded(pattern: str) -> Iterator[str]:
    """Attention is sensitive, and so is the Mamba layer that feeds it (Nano report, section 4)."""
    yield from ("lm_head", "mtp*")
    for layer, letter in enumerate(pattern):
        if letter == "*":
            yield from (f"{_mixer(layer)}.{name}_proj" for name in "qkvo")
        elif letter == "M":
            yield f"{_mixer(layer)}.conv1d"
            if pattern[layer + 1 : layer + 2] == "*":
                yield from (f"{_mixer(layer)}.{name}" for name in ("in_proj", "out_proj"))


def _super_fp8_excluded(pattern: str) -> Iterator[str]:
    yield from _OUTSIDE
    for layer, letter in enumerate(pattern):
        if letter == "*":
            yield from (f"{_mixer(layer)}.{name}_proj" for name in "qkvo")
        elif letter == "E":
            yield f"{_mixer(layer)}.fc*_latent_proj"


def _routed(config: ModelConfig, layer: int) -> Iterator[tuple[str, str]]:
    for expert in range(config.moe.num_experts):
        for name in ("up_proj", "down_proj"):
            yield f"{_mixer(layer)}.experts.{expert}.{name}", NVFP4


def _super_rule(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """ModelOpt's shipped recipe, for models that nobody ran the search for."""
    for layer, letter in enumerate(config.pattern):
        if letter == "E":
            yield from _routed(config, layer)
            yield from ((f"{_mixer(layer)}.shared_experts.{name}_proj", FP8) for name in ("up", "down"))
        elif letter == "M":
            yield from ((f"{_mixer(layer)}.{name}_proj", FP8) for name in ("in", "out"))


def _super_list(config: ModelConfig) -> Iterator[tuple[str, str]]:
    for layer, letter in enumerate(config.pattern):
        if layer in _SUPER_IN_PROJ:
            yield f"{_mixer(layer)}.in_proj", FP8
        if layer in _SUPER_OUT_PROJ:
            yield f"{_mixer(layer)}.out_proj", FP8
        if layer in _SUPER_O_PROJ:
            yield f"{_mixer(layer)}.o_proj", FP8
        if letter != "E":
            continue
        yield from _routed(config, layer)
        if layer not in _SUPER_SHARED_UP_BF16:
            yield f"{_mixer(layer)}.shared_experts.up_proj", FP8
        if layer not in _SUPER_SHARED_DOWN_BF16:
            yield f"{_mixer(layer)}.shared_experts.down_proj", NVFP4 if layer in _SUPER_SHARED_DOWN_NVFP4 else FP8
        if layer in _SUPER_FC1:
            yield f"{_mixer(layer)}.fc1_latent_proj", FP8
        if layer in _SUPER_FC2:
            yield f"{_mixer(layer)}.fc2_latent_proj", FP8
