"""nemotron_jax.load: from either kind of directory, each device its own part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nemotron_jax
from nemotron_jax.checkpoint.convert import convert
from nemotron_jax.checkpoint.hf_directory import HFDirectory
from nemotron_jax.checkpoint.layer_map import default_layer_map
from nemotron_jax.errors import CheckpointError
from nemotron_jax.parallel.mesh import make_mesh, spec
from nemotron_jax.run_config import ParallelConfig
from tests.checkpoint import hf_files
from tests.checkpoint.test_hf_directory import EVEN
from tests.tiny import TINY


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return hf_files.write(tmp_path_factory.mktemp("load") / "hf", TINY)


def leaves(model):
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def test_weights_are_float32_and_in_place(hf):
    config, model = nemotron_jax.load(str(hf))
    assert config.pattern == TINY.pattern
    source = HFDirectory(hf)
    found = leaves(model)
    assert found.keys() == source.table.shapes.keys()
    for path, variable in found.items():
        value = variable.get_value()
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, source.leaf(path, [slice(None)] * value.ndim).astype(np.float32))
    assert isinstance(found["layers/1/mixer/gate/e_score_correction_bias"], nnx.Variable)


def test_matrices_have_the_dtype_of_their_matmul(hf):
    """Half the memory under bfloat16, and the same logits, bit for bit, as with float32 weights."""
    _, model = nemotron_jax.load(hf, precision="bfloat16")
    found = leaves(model)
    narrow = {path for path, variable in found.items() if variable.get_value().dtype == jnp.bfloat16}
    assert {
        "embeddings/weight",
        "lm_head/weight",
        "layers/0/mixer/in_proj/dt",
        "layers/1/mixer/experts/up_proj",
    } <= narrow
    assert {"layers/0/mixer/out_proj/weight", "mtp/eh_proj/weight"} <= narrow
    assert not narrow & {"layers/1/mixer/gate/weight", "norm_f/weight", "layers/0/mixer/A_log", "layers/0/mixer/D"}
    graphdef, state = nnx.split(model)
    wide = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float32), state))
    tokens = jnp.arange(24).reshape(2, 12) % 64
    np.testing.assert_array_equal(model(tokens).logits, wide(tokens).logits)


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"expert": 4, "tensor": 2}])
def test_each_device_reads_its_own_part(hf, axes, monkeypatch):
    asked = {}
    original = HFDirectory.leaf

    def recorded(self, path, index):
        array = original(self, path, index)
        asked.setdefault(path, []).append(array.size)
        return array

    monkeypatch.setattr(HFDirectory, "leaf", recorded)
    mesh = make_mesh(ParallelConfig(data=1, **axes))
    _, model = nemotron_jax.load(hf, mesh=mesh)
    monkeypatch.undo()
    _, whole = nemotron_jax.load(hf)
    expected = leaves(whole)
    shared = 0
    for path, variable in leaves(model).items():
        value = variable.get_value()
        assert value.sharding.spec == spec(value.shape, variable.axes, mesh)
        shard = value.sharding.shard_shape(value.shape)
        assert set(asked[path]) == {int(np.prod(shard))}, path
        shared += shard != value.shape
        np.testing.assert_array_equal(value, expected[path].get_value())
    assert shared > 20


def test_a_workdir_and_a_hugging_face_directory_are_the_same_model(hf, tmp_path):
    convert(hf, tmp_path / "run")
    ours, theirs = (leaves(nemotron_jax.load(path)[1]) for path in (tmp_path / "run", hf))
    for path, variable in ours.items():
        np.testing.assert_array_equal(variable.get_value(), theirs[path].get_value())


def test_a_workdir_with_quantised_modules_on_a_mesh(tmp_path):
    hf = hf_files.write(tmp_path / "hf", EVEN, quant=default_layer_map(EVEN, "nvfp4"))
    convert(hf, tmp_path / "run")
    mesh = make_mesh(ParallelConfig(data=2, expert=4))
    ours, theirs = leaves(nemotron_jax.load(tmp_path / "run", mesh=mesh)[1]), leaves(nemotron_jax.load(hf)[1])
    for path, variable in ours.items():
        np.testing.assert_array_equal(variable.get_value(), theirs[path].get_value())


def test_what_cannot_be_loaded(hf, tmp_path):
    with pytest.raises(CheckpointError, match="no directory"):
        nemotron_jax.load(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        nemotron_jax.load(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": []}')
    with pytest.raises(CheckpointError, match=r"neither model_type \(Hugging Face\) nor model"):
        nemotron_jax.load(tmp_path / "other")
    with pytest.raises(CheckpointError, match="has no steps"):
        nemotron_jax.load(hf, step=3)
    assert jax.device_count() == 8
