"""Quantised weights loaded as they are stored: the same model in a fraction of the memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nemotron_jax
from nemotron_jax.checkpoint.convert import convert
from nemotron_jax.checkpoint.hf_directory import HFDirectory
from nemotron_jax.checkpoint.layer_map import default_layer_map
from nemotron_jax.checkpoint.modelopt import QuantConfig, Scheme
from nemotron_jax.model.context import Context
from nemotron_jax.model.nemotron import split_model
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.run_config import ParallelConfig
from pallas_kernels.packed import Packed
from tests.checkpoint import hf_files
from tests.tiny import TINY

MOE = dataclasses.replace(TINY.moe, intermediate_size=32, shared_intermediate_size=48)
SUPER = dataclasses.replace(TINY, pattern="ME*", moe=MOE)
NANO = dataclasses.replace(TINY, pattern="MEM*-", moe=dataclasses.replace(MOE, latent_size=0), mtp=None)
CASES = {
    "nvfp4 super": (SUPER, default_layer_map(SUPER, "nvfp4")),
    "nvfp4 nano": (NANO, default_layer_map(NANO, "nvfp4")),
    "fp8 super": (SUPER, default_layer_map(SUPER, "fp8")),
    "weights alone": (NANO, QuantConfig("W4A16_NVFP4")),
}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    config, quant = CASES[request.param]
    return quant, hf_files.write(tmp_path_factory.mktemp("packed") / "hf", config, quant=quant)


def leaves(model):
    """{path: array or Packed} of the parameters."""
    flat = nnx.to_flat_state(split_model(model)[1])
    return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def test_the_same_model_in_less_memory(case):
    quant, directory = case
    config, dense = nemotron_jax.load(directory, precision="float32")
    _, packed = nemotron_jax.load(directory, precision="float32", packed=True)
    np.testing.assert_allclose(packed(TOKENS).logits, dense(TOKENS).logits, atol=2e-5)
    # and in bfloat16, where codes are exact but dequantised weights are rounded
    _, halved = nemotron_jax.load(directory, precision="bfloat16", packed=True)
    assert float(jnp.abs(halved(TOKENS).logits - dense(TOKENS).logits).max()) < 0.3
    if config.mtp is not None:
        hidden, _, _ = packed.hidden(TOKENS, Context())
        assert np.isfinite(packed.mtp_hidden(hidden, TOKENS, Context())[0][0]).all()
    whole, small = (sum(leaf.nbytes for leaf in jax.tree.leaves(split_model(model)[1])) for model in (dense, packed))
    assert small < whole * (0.85 if quant.algo == "MIXED_PRECISION" else 0.75)


def test_what_is_packed_has_the_bytes_of_the_file(case):
    quant, directory = case
    _, model = nemotron_jax.load(directory, packed=True)
    source = HFDirectory(directory)
    found = leaves(model)
    packed = {name for name, leaf in found.items() if isinstance(leaf, Packed)}
    for path, entries in source.table.of_leaf.items():
        quantised = all(quant.scheme(entry.module) is not None for entry in entries)
        assert (path in packed) == (quantised and path.startswith("layers/")), path
    assert packed
    for path in packed:
        entries, leaf = source.table.of_leaf[path], found[path]
        assert leaf.shape == source.table.shapes[path]
        before = sum(entries[0].rows[: entries[0].leaves.index(path)])
        rows = slice(before, before + leaf.shape[-1])
        for place, entry in enumerate(entries):
            one = leaf[place] if entry.expert is not None else leaf
            stored = source.module(entry)
            np.testing.assert_array_equal(as_bytes(one.codes), as_bytes(stored["weight"].rows()[rows]))
            scale = stored["weight_scale_2"] if one.block_scales is not None else stored["weight_scale"]
            assert np.asarray(one.scale).tobytes() == scale.rows().tobytes() and one.scale.shape == ()
            if one.block_scales is not None:
                np.testing.assert_array_equal(as_bytes(one.block_scales), as_bytes(stored["weight_scale"].rows()[rows]))
            dense = source.leaf(path, [slice(None)] * len(leaf.shape))
            np.testing.assert_array_equal(leaf.dequantize(), dense)


def as_bytes(array):
    return np.ascontiguousarray(array).view(np.uint8)


def test_on_a_mesh(case):
    _, directory = case
    mesh = make_mesh(ParallelConfig(data=1, fsdp=2, expert=2, tensor=2))
    _, one = nemotron_jax.load(directory, precision="float32", packed=True)
    _, many = nemotron_jax.load(directory, precision="float32", packed=True, mesh=mesh)
    for path, leaf in leaves(many).items():
        if isinstance(leaf, Packed) and "experts/" in path:
            assert len(leaf.codes.sharding.device_set) == 8 and not leaf.codes.sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda model, tokens: model(tokens).logits)(many, TOKENS)
    np.testing.assert_allclose(logits, one(TOKENS).logits, atol=2e-5)


def test_from_a_workdir(case, tmp_path):
    """convert keeps quantised modules beside the checkpoint."""
    _, directory = case
    convert(directory, tmp_path / "workdir")
    _, there = nemotron_jax.load(directory, precision="float32", packed=True)
    _, back = nemotron_jax.load(tmp_path / "workdir", precision="float32", packed=True)
    assert jax.tree.structure(split_model(there)[1]) == jax.tree.structure(split_model(back)[1])
    np.testing.assert_array_equal(there(TOKENS).logits, back(TOKENS).logits)


def test_experts_that_differ_are_dequantised(tmp_path):
    layers = {f"backbone.layers.1.mixer.experts.{e}.up_proj": Scheme("NVFP4") for e in range(7)}
    quant = QuantConfig("MIXED_PRECISION", layers=layers)
    directory = hf_files.write(tmp_path / "hf", SUPER, quant=quant)
    _, packed = nemotron_jax.load(directory, precision="float32", packed=True)
    _, dense = nemotron_jax.load(directory, precision="float32")
    assert not [leaf for leaf in leaves(packed).values() if isinstance(leaf, Packed)]
    np.testing.assert_array_equal(packed(TOKENS).logits, dense(TOKENS).logits)
