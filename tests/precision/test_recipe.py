"""Which matmul gets which precision."""

import dataclasses
import functools
import re
from collections import Counter

import pytest

from nemotron_jax.config import preset
from nemotron_jax.errors import ConfigError
from nemotron_jax.model import nemotron
from nemotron_jax.model.nemotron import abstract
from nemotron_jax.precision.recipe import QUANTIZED, RECIPES, Precision, Recipe, last_layers_in_full, recipe
from tests.tiny import TINY

matmul_paths = functools.cache(nemotron.matmul_paths)


def kinds(name, config):
    table = recipe(name, config).table(matmul_paths(config))
    return Counter((path.rpartition("/")[2], precision.format) for path, precision in table.items())


def test_the_map_of_super():
    """Megatron-Bridge's te_quant.cfg, and the last 14 layers in bfloat16."""
    config = preset("super")
    before, after = Counter(config.pattern[:74]), Counter(config.pattern[74:])
    moe, mamba = before["E"], before["M"]
    full = Counter({(f"{p}_proj", ""): before["*"] + after["*"] + 1 for p in "qkvo"})
    full |= {(f"fc{i}_latent_proj", ""): 40 + 1 for i in (1, 2)}
    full |= {("in_proj", ""): after["M"], ("out_proj", ""): after["M"], ("eh_proj", ""): 1}
    full |= {(name, ""): after["E"] + 1 for name in ("up_proj", "down_proj", "experts")}
    assert kinds("nvfp4", config) == full + Counter(
        {(name, "nvfp4"): moe for name in ("up_proj", "down_proj", "experts")}
        | {("in_proj", "nvfp4"): mamba, ("out_proj", "mxfp8"): mamba}
    )
    table = recipe("nvfp4", config).table(matmul_paths(config))
    assert table["layers/73/mixer/in_proj"].format == "nvfp4" and table["layers/75/mixer/in_proj"].format == ""
    assert not [path for path, precision in table.items() if precision.format and path.startswith("mtp")]


def test_how_many_layers_stay_in_bfloat16():
    found = {name: last_layers_in_full(preset(name)) for name in ("super", "ultra", "nano", "quickstart")}
    assert found == {"super": 14, "ultra": 16, "nano": 8, "quickstart": 2}
    assert last_layers_in_full(dataclasses.replace(preset("nano"), bfloat16_share=0.0)) == 0


def test_ablations_change_one_thing():
    plain = recipe("nvfp4", preset("nano")).rules[-1][1]
    assert plain == dataclasses.replace(QUANTIZED["nvfp4"], operands=plain.operands)
    for name, change in (
        ("nvfp4-no-rht", {"hadamard": False}),
        ("nvfp4-no-sr", {"stochastic": False}),
        ("nvfp4-1d-weights", {"weight_block": "1x16"}),
    ):
        other = recipe(name, preset("nano"))
        assert other.rules[-1][1] == dataclasses.replace(plain, **change)
        assert [pattern for pattern, _ in other.rules] == [p for p, _ in recipe("nvfp4", preset("nano")).rules]
    assert {format for _, format in kinds("nvfp4-all-layers", preset("nano"))} == {"nvfp4"}
    assert kinds("mxfp8", preset("nano"))["out_proj", "mxfp8"] == kinds("mxfp8", preset("nano"))["in_proj", "mxfp8"]


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("model", ["nano", "nano-4b", "lightning", "super", "ultra"])
def test_every_recipe_suits_every_model(name, model):
    """Every rule matches something, and every width divides."""
    config = preset(model)
    rules = recipe(name, config)
    rules.table(matmul_paths(config))
    if model in ("nano", "nano-4b"):
        abstract(config, rules)


def test_widths_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"layers/0/mixer/in_proj has 100 outputs; nvfp4 needs a multiple of 16"):
        abstract(dataclasses.replace(TINY, bfloat16_share=0.0), recipe("nvfp4", TINY))
    with pytest.raises(ConfigError, match=r"Leave it in bfloat16 by a rule, --config.precision.exclude"):
        abstract(TINY, recipe("mxfp8", TINY))
    abstract(TINY, recipe("fp8", TINY))


def test_the_rule_that_the_error_names_helps():
    """One rule for all layers of the name: the quickstart's in_proj has 1032 outputs."""
    config = preset("quickstart")
    with pytest.raises(ConfigError, match="layers/0/mixer/in_proj has 1032 outputs") as error:
        abstract(config, recipe("nvfp4", config))
    rule = re.search(r"--config.precision.exclude='([^']+)'", str(error.value))[1]
    rules = recipe("nvfp4", config, rule)
    abstract(config, rules)
    table = rules.table(matmul_paths(config))
    assert {table[path].format for path in table if path.endswith("in_proj")} == {""}
    assert table["layers/1/mixer/experts"].format == "nvfp4"
    assert recipe("nvfp4", config, "").rules == rules.rules[1:]
    assert recipe("bfloat16", config, rule) is RECIPES["bfloat16"]


def test_an_excluding_rule_that_matches_nothing():
    config = preset("quickstart")
    with pytest.raises(ConfigError, match=r"'\*/mixer/in_prj' of the precision recipe matches no matmul"):
        recipe("nvfp4", config, "*/mixer/in_proj, */mixer/in_prj").table(matmul_paths(config))


def test_what_is_said_of_a_recipe():
    config = dataclasses.replace(preset("nano"), pattern="MEM*EM")
    said = recipe("nvfp4", config).describe(matmul_paths(config))
    assert said["matmuls in mxfp8"] == "out_proj of layers 0 2"
    assert "in_proj of layers 0 2; experts of layers 1 4;" in said["matmuls in nvfp4, weights 16x16"]
    assert "in_proj of layers 5" in said["matmuls in bfloat16"]
    assert RECIPES["bfloat16"].describe(matmul_paths(config)) == {"matmuls in bfloat16": "all"}
    assert str(QUANTIZED["nvfp4-no-sr"]) == "nvfp4, weights 16x16, no SR"


def test_rules_that_match_nothing():
    rules = Recipe("bfloat16", (("*/mixer/out_prj", Precision()), ("*", Precision())))
    with pytest.raises(ConfigError, match=r"'\*/mixer/out_prj' of the precision recipe matches no matmul"):
        rules.table(matmul_paths(TINY))


def test_unknown_names():
    with pytest.raises(ConfigError, match="Did you mean 'nvfp4-no-rht'"):
        recipe("nvfp4-norht", TINY)
    with pytest.raises(ConfigError, match="'nvfp4' depends on the model"):
        recipe("nvfp4")
