"""The whole model: initialisation, counts, multi-token prediction, tracing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemotron_jax.config import PRESETS, preset, replace
from nemotron_jax.model import layer as layers
from nemotron_jax.model.context import Context
from nemotron_jax.model.counts import count_parameters, flops_per_token, tensor_sizes
from nemotron_jax.model.mtp import shift_left
from nemotron_jax.model.nemotron import Nemotron, abstract
from nemotron_jax.precision.recipe import RECIPES, Precision, Recipe

# Counted from the released files' shapes: total, MTP, active.
RELEASED = {
    "nano": (31_577_940_288, 0, 3_580_073_408),
    "lightning": (32_913_266_240, 1_335_325_952, 3_580_073_408),
    "super": (123_611_033_088, 2_942_325_248, 12_770_216_960),
    "ultra": (560_524_603_904, 11_215_610_368, 56_058_818_560),
}
PER_LAYER = {
    "nano": {"M": 38_744_896, "*": 23_399_040, "E": 1_297_468_032},
    "super": {"M": 109_640_064, "*": 35_655_680, "E": 2_873_102_336},
    "ultra": {"M": 421_645_056, "*": 138_420_224, "E": 10_942_947_328},
}


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts_of_the_released_models(name):
    counts = count_parameters(preset(name))
    assert (counts["total"], counts["mtp"], counts["active"]) == RELEASED[name]
    assert counts["kinds"] == PER_LAYER.get(name, counts["kinds"])


@pytest.mark.parametrize(("name", "expected"), [("nano", 20.8e9), ("super", 85.6e9), ("ultra", 361.5e9)])
def test_flops_per_token(name, expected):
    assert flops_per_token(preset(name), 8192) == pytest.approx(expected, rel=0.01)


def narrow(name):
    """A preset at a 16th of its width or less: every block and ratio stays, one unit of the pattern."""
    config = preset(name)
    pattern = "".join(dict.fromkeys(config.pattern)) + config.pattern[:2]
    return dataclasses.replace(
        replace(
            config,
            {
                "mamba": {"num_heads": 8, "head_dim": 16, "state_size": 16, "chunk_size": 16},
                "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
                "moe": {
                    "num_experts": 16,
                    "top_k": min(config.moe.top_k, 8),
                    "intermediate_size": 32,
                    "shared_intermediate_size": 64,
                    "latent_size": 32 if config.moe.latent_size else 0,
                },
            },
        ),
        pattern=pattern,
        hidden_size=128,
        intermediate_size=256,
        initializer_std=0.0,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_first_loss_of_each_preset(name, rng):
    """Logits start with standard deviation 0.9: ln V + 0.9^2 / 2, at the preset's own vocabulary."""
    config = narrow(name)
    model = Nemotron(config, RECIPES["float32"], jax.random.key(0))
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 33)), jnp.int32)
    hidden = model(tokens[:, :-1]).hidden
    loss = -float(model.token_logprobs(hidden, tokens[:, 1:]).mean())
    assert loss == pytest.approx(math.log(config.vocab_size) + 0.9**2 / 2, abs=0.25)


def test_initialisation_is_the_official_one(tiny_config):
    config = dataclasses.replace(
        replace(tiny_config, {"mamba": {"num_heads": 64, "num_groups": 2}}), hidden_size=256, pattern="ME*-"
    )
    model = Nemotron(config, RECIPES["float32"], jax.random.key(3))
    mamba, moe, attention, mlp = (layer.mixer for layer in model.layers)
    std, out = 0.9 / 16, 0.9 / 16 / math.sqrt(4)
    for weight, expected in (
        (model.embeddings.weight, std),
        (model.lm_head.weight, std),
        (mamba.in_proj.z, std),
        (mamba.out_proj.weight, out),
        (attention.q_proj.weight, std),
        (attention.o_proj.weight, out),
        (moe.gate.weight, std),
        (moe.experts.up_proj, std),
        (moe.experts.down_proj, out),
        (moe.shared_experts.down_proj.weight, out),
        (moe.fc1_latent_proj.weight, std),
        (moe.fc2_latent_proj.weight, out),
        (mlp.down_proj.weight, out),
    ):
        assert float(weight[...].std()) == pytest.approx(expected, rel=0.05)
    A, dt = np.exp(mamba.A_log[...]), np.log1p(np.exp(mamba.dt_bias[...]))
    assert 1 <= A.min() < 3 and 13 < A.max() <= 16
    assert 0.001 <= dt.min() < 0.003 and 0.04 < dt.max() <= 0.1001
    assert np.all(mamba.D[...] == 1) and np.all(mamba.norm.weight[...] == 1)
    assert np.abs(mamba.conv1d.weight["x"][...]).max() <= 0.5 and np.abs(mamba.conv1d.bias["x"][...]).max() > 0.3


def test_initial_values_depend_on_the_path_alone(tiny_config):
    """A prefix of the pattern starts from the same weights: nothing depends on the order of construction."""
    whole = Nemotron(tiny_config, RECIPES["float32"], jax.random.key(0))
    part = Nemotron(dataclasses.replace(tiny_config, mtp=None), RECIPES["float32"], jax.random.key(0))
    for a, b in zip(jax.tree.leaves(nnx.state(whole.layers)), jax.tree.leaves(nnx.state(part.layers)), strict=True):
        np.testing.assert_array_equal(a, b)
    first, last = whole.layers[0].mixer, whole.layers[4].mixer
    assert not np.allclose(first.in_proj.z[...], last.in_proj.z[...])


def test_each_kind_of_layer_is_traced_once(tiny_config, monkeypatch):
    """No layer holds its index, path or recipe: ten layers of two kinds are two traces, with any number of steps."""
    traces = []
    original = layers.Layer.__call__

    def counted(self, *args):
        traces.append(type(self.mixer).__name__)
        return original(self, *args)

    monkeypatch.setattr(layers.Layer, "__call__", counted)
    config = dataclasses.replace(tiny_config, pattern="ME" * 5, mtp=None, norm_eps=1.25e-5)  # not traced before
    model = Nemotron(config, RECIPES["float32"], jax.random.key(0))
    graphdef, variables = nnx.split(model)

    @jax.jit
    def loss(variables, tokens):
        return nnx.merge(graphdef, variables)(tokens).hidden.sum()

    loss(variables, jnp.zeros((1, 6), jnp.int32))
    assert sorted(traces) == ["Mamba2", "MoE"]


def test_every_layer_and_depth_has_a_seed_of_its_own(tiny_model, monkeypatch):
    seeds = []

    def run(graphdef, leaves, h, ctx, state, *, remat):
        seeds.append(int(ctx.seed))
        return h, state, {}

    monkeypatch.setattr(layers, "_run_layer", run)
    tokens, ctx = jnp.zeros((1, 4), jnp.int32), Context(seed=jnp.uint32(3))
    hidden, _, _ = tiny_model.hidden(tokens, ctx)
    tiny_model.mtp_hidden(hidden, tokens, ctx)
    assert len(seeds) == 5 + 2 * 2 == len(set(seeds))


def test_two_precisions_of_a_kind_are_two_traces(tiny_config):
    """The recipe reaches each matmul by its path, and layers of equal precision have equal graph definitions."""
    recipe = Recipe("float32", (("layers/4/*", Precision("bfloat16")), ("*", Precision("float32"))))
    model = abstract(dataclasses.replace(tiny_config, pattern="MMMMMM"), recipe)
    definitions = [nnx.split(layer)[0] for layer in model.layers]
    assert len(set(definitions)) == 2
    assert model.layers[4].mixer.out_proj.precision == Precision("bfloat16")
    assert definitions[4] != definitions[5] and definitions[0] == definitions[5]


def test_packed_mtp_never_crosses_a_border(tiny_model, rng):
    """Every document gets from a packed row the MTP hidden states that it has alone."""
    lengths = [6, 2, 1, 7]
    documents = [jnp.asarray(rng.integers(0, 64, (1, length)), jnp.int32) for length in lengths]
    ids = jnp.asarray(np.repeat([1, 2, 3, 4], lengths))[None]
    tokens = jnp.concatenate(documents, axis=1)
    ctx = Context(segment_ids=ids)
    packed, _ = tiny_model.mtp_hidden(tiny_model.hidden(tokens, ctx)[0], tokens, ctx)
    start = 0
    for document, length in zip(documents, lengths, strict=True):
        alone, _ = tiny_model.mtp_hidden(tiny_model.hidden(document, Context())[0], document, Context())
        for a, b in zip(packed, alone, strict=True):
            np.testing.assert_allclose(a[:, start : start + length], b, rtol=1e-4, atol=1e-5)
        start += length


def test_shift_left_stops_at_borders():
    values = jnp.asarray([[1, 2, 3, 4, 5, 6]])
    ids = jnp.asarray([[1, 1, 1, 2, 2, 1]])
    shifted, inside = shift_left(values, 2, ids)
    np.testing.assert_array_equal(shifted, [[3, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(inside, [[True] + [False] * 5])
    np.testing.assert_array_equal(shift_left(values, 1, None)[0], [[2, 3, 4, 5, 6, 0]])


def test_gradient_reaches_the_backbone_through_mtp(tiny_model, rng):
    graphdef, params, rest = nnx.split(tiny_model, nnx.Param, ...)
    tokens = jnp.asarray(rng.integers(0, 64, (1, 9)), jnp.int32)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        hidden, _, _ = model.hidden(tokens, Context())
        depths, _ = model.mtp_hidden(hidden, tokens, Context())
        return model.token_logprobs(depths[1], tokens).sum()

    gradients = dict(nnx.to_flat_state(jax.grad(loss)(params)))
    for path in (("layers", 0, "mixer", "D"), ("mtp", "eh_proj", "weight"), ("lm_head", "weight")):
        assert np.abs(gradients[path].get_value()).max() > 0


def test_bfloat16_follows_float32(tiny_config, rng):
    """The bfloat16 recipe computes the same function, to its own accuracy, with float32 weights."""
    tokens = jnp.asarray(rng.integers(0, 64, (2, 17)), jnp.int32)
    outs = {name: Nemotron(tiny_config, RECIPES[name], jax.random.key(0))(tokens) for name in RECIPES}
    assert outs["bfloat16"].hidden.dtype == jnp.bfloat16
    assert outs["bfloat16"].logits.dtype == jnp.float32
    a, b = outs["bfloat16"].logits, outs["float32"].logits
    assert 1e-4 < float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 0.05


def test_every_weight_is_counted(tiny_config):
    model = Nemotron(tiny_config, RECIPES["float32"], jax.random.key(0))
    assert sum(tensor_sizes(tiny_config).values()) == sum(x.size for x in jax.tree.leaves(nnx.state(model)))
