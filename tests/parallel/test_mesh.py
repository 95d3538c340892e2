"""The sharding table."""

import dataclasses
import math

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from nemotron_jax.checkpoint.store import named_leaves
from nemotron_jax.config import PRESETS
from nemotron_jax.errors import ConfigError
from nemotron_jax.model.nemotron import abstract
from nemotron_jax.parallel.mesh import AXES, RULES, describe, kept_whole, make_mesh, shardings, shards, spec
from nemotron_jax.precision.recipe import RECIPES
from nemotron_jax.run_config import ParallelConfig
from nemotron_jax.training.state import TrainSetup
from tests.tiny import TINY, tiny_run


def test_mesh_always_has_all_axes():
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert tuple(mesh.axis_names) == AXES
    assert describe(mesh) == "data=2, fsdp=2, tensor=2"
    assert describe(make_mesh(ParallelConfig(), jax.devices()[:1])) == "one device"
    assert shards("heads") == shards("batch") == 1
    with jax.set_mesh(mesh):
        assert (shards("heads"), shards("batch"), shards("norm")) == (2, 4, 1)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 3}, r"data=-1, .*tensor=3 needs 3 devices or a multiple, .* there are 8: .*, such as tensor=2\."),
        ({"data": 4}, r"data=4, .* needs 4 devices, .* there are 8: change .* devices, such as data=8 or fsdp=2 or"),
        ({"data": 1, "fsdp": 16}, r"needs 16 devices, .* there are 8: .*, such as fsdp=8\."),
        ({"fsdp": 16}, r"data=-1, fsdp=16, .* needs 16 devices or a multiple, .* such as fsdp=8\."),
        ({"fsdp": 3, "tensor": 5}, r"needs 15 devices or a multiple, .* to the number of devices\."),
    ],
)
def test_meshes_that_do_not_fit(axes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(ParallelConfig(**axes))


def test_what_stays_whole_is_known():
    """Matrices that an axis should cut and does not divide, in bytes; neither vectors nor axes of one device."""

    def whole(vocab_size, **axes):
        model = dataclasses.replace(TINY, vocab_size=vocab_size)
        _, variables = nnx.split(abstract(model, RECIPES["float32"]))
        return kept_whole(variables, make_mesh(ParallelConfig(data=1, **axes)))

    assert whole(64, fsdp=4, tensor=2) == {} == whole(65, fsdp=2, context=4)
    assert whole(65, fsdp=4, tensor=2) == {"vocab": 2 * 65 * TINY.hidden_size * 4}  # embeddings and head


def test_spec_follows_the_rules():
    mesh = make_mesh(ParallelConfig(data=1, fsdp=2, expert=2, tensor=2))
    whole_row = ("fsdp", "context")  # the devices that share the width of a weight
    assert spec((64, 32), ("embed", "mlp"), mesh) == P(whole_row, ("tensor",))
    experts = ("expert_weights", "embed", "expert_mlp")
    assert spec((8, 64, 32), experts, mesh) == P(("expert", "fsdp", "context"), None, ("tensor",))
    assert spec((6, 64, 32), experts, mesh) == P(("expert",), whole_row, ("tensor",))  # 4 does not divide 6
    assert spec((64, 3), ("embed", "kv_heads"), mesh) == P(whole_row, None)  # 3 does not divide
    assert spec((64, 64), ("embed", "latent"), mesh) == P(whole_row, None)  # an axis is used once
    assert spec((4, 16, 8), ("batch", "time", "norm"), mesh) == P(("data", "fsdp", "expert"), ("context",), None)


@pytest.mark.parametrize("axes", [{"context": 8}, {"fsdp": 2, "context": 4}, {"fsdp": 8}])
def test_a_device_holds_an_eighth_of_each_matrix_and_its_moments(axes):
    """Also where the devices share one row of tokens: only vectors and the taps of convolutions are whole."""
    setup = TrainSetup(tiny_run(), make_mesh(ParallelConfig(data=1, **axes)))
    state = setup.abstract_state()
    for path, leaf in named_leaves((state.params, state.opt_state)).items():
        if leaf.ndim >= 2 and "conv1d" not in path:
            part = leaf.sharding.shard_shape(leaf.shape)
            assert math.prod(part) * 8 == math.prod(leaf.shape), path


@pytest.mark.parametrize("name", PRESETS)
def test_every_weight_has_known_axes_and_the_large_ones_are_sharded(name):
    """On a mesh of all axes no device holds more than an eighth of a matrix (and a bit, for odd sizes)."""
    mesh = make_mesh(ParallelConfig(data=1, fsdp=2, expert=2, tensor=2))
    _, variables = nnx.split(abstract(PRESETS[name], RECIPES["float32"]))
    placed = dict(nnx.to_flat_state(shardings(variables, mesh)))
    for path, variable in nnx.to_flat_state(variables):
        shape = variable.get_value().shape
        assert len(variable.axes) == len(shape) and set(variable.axes) <= RULES.keys(), path
        part = placed[path].get_value().shard_shape(shape)
        if "up_proj" in path and "experts" in path:
            assert [whole // piece for whole, piece in zip(shape, part, strict=True)] == [4, 1, 2]  # whole experts
        elif len(shape) == 2 and "conv1d" not in path and "gate" not in path:
            assert tuple(part) != tuple(shape), path


def test_quickstart_fits_every_mesh_of_eight():
    """Axes that are powers of two: heads, groups, experts, widths and the vocabulary divide by 8."""
    config = PRESETS["quickstart"]
    sizes = [config.hidden_size, config.vocab_size, config.mamba.num_heads, config.mamba.num_groups]
    sizes += [config.moe.num_experts, config.moe.intermediate_size, config.moe.latent_size, config.attention.num_heads]
    assert all(size % 8 == 0 for size in sizes)
