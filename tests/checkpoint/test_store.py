"""Saving, restoring, keeping, and every way in which a checkpoint can be bad."""

import asyncio
import contextlib
import gc
import os
import resource
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemotron_jax.checkpoint import store as stores
from nemotron_jax.checkpoint.store import CheckpointStore, named_leaves
from nemotron_jax.errors import CheckpointError

# TensorStore drops coroutines of the reads and writes that it gives up.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]


def items(seed, size=64):
    rng = np.random.default_rng(seed)
    weights = jnp.asarray(rng.normal(size=(size, 8)), jnp.float32)
    return {
        "params": nnx.State({"layers": {0: {"w": nnx.Param(weights, axes=("embed", "mlp"))}}}),
        "buffers": {"seed": jnp.uint32(seed), "half": weights.astype(jnp.bfloat16)},
        "optimizer": {"step": jnp.int32(seed), "moments": (weights * 2, [weights[0]])},
    }


def shapes(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(CheckpointStore(tmp_path / "checkpoints", keep=2, keep_every=4)) as opened:
        yield opened


def fill(store, steps):
    for step in steps:
        store.save(step, items(step), {"next_batch": step})
    store.wait()


def test_round_trip_and_what_is_kept(store):
    fill(store, range(1, 8))
    assert store.steps() == [4, 6, 7]  # the two newest, and those divisible by 4
    restored = store.restore(shapes(items(0)))
    assert restored.step == 7 and restored.data == {"next_batch": 7}
    assert_equal(restored.items, items(7))


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        CheckpointStore(tmp_path / "checkpoints")


def test_no_checkpoint(store):
    assert store.restore(shapes(items(0))) is None


def test_a_part_can_be_read(store):
    fill(store, [3])
    template = shapes(items(0))
    assert_equal(store.read({"params": template["params"]}).items["params"], items(3)["params"])
    with pytest.raises(CheckpointError, match="no checkpoint of step 2"):
        store.read(template, step=2)


def test_names_on_disk_are_paths():
    assert list(named_leaves(items(0)["params"])) == ["layers/0/w"]
    assert list(named_leaves(items(0)["optimizer"])) == ["moments/0", "moments/1/0", "step"]


def test_wrong_content_is_found_by_checksums(store, monkeypatch):
    """A step whose bytes are readable but wrong is passed over, reported and removed."""
    warnings = []
    store._warn = warnings.append
    fill(store, [1])
    original = stores._checksums
    monkeypatch.setattr(stores, "_checksums", lambda tree: {k: v ^ ("w" in k) for k, v in original(tree).items()})
    fill(store, [2])
    monkeypatch.setattr(stores, "_checksums", original)
    restored = store.restore(shapes(items(0)))
    assert restored.step == 1
    assert len(warnings) == 1 and "checkpoint 2" in warnings[0] and "checksums" in warnings[0]
    assert store.steps() == [1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32])
def test_checksum_sees_bits_and_order(dtype):
    base = jnp.arange(24).reshape(4, 6).astype(dtype)
    variants = [base, base.at[2, 3].add(1), base[::-1], base[:, ::-1], base.reshape(6, 4).T]
    sums = {int(stores._checksum(variant)) for variant in variants}
    assert len(sums) == len(variants)
    assert int(stores._checksum(base)) == int(stores._checksum(base + 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8])
@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (4, 5, 6)])
def test_checksums_of_blocks_add_up(dtype, shape):
    rng = np.random.default_rng(0)
    leaf = jnp.asarray(rng.normal(size=shape) * 100).astype(dtype)
    blocks = [()]
    for size in shape:
        blocks = [(*block, part) for block in blocks for part in (slice(0, size // 3), slice(size // 3, size))]
    host = np.asarray(leaf)
    total = sum(stores.block_checksum(host[block], [part.start for part in block], shape) for block in blocks)
    assert total % 2**32 == int(stores._checksum(leaf))
    assert stores._checksum(leaf) == stores._checksum(leaf.astype(jnp.float32)) or dtype in (jnp.int32, jnp.uint8)


def test_checksum_does_not_depend_on_the_sharding():
    value = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(value, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
    assert stores._checksums({"x": {"w": value}}) == stores._checksums({"x": {"w": spread}})


@contextlib.contextmanager
def file_size_limit(size):
    """Writes beyond the limit fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_leaves_the_one_before_whole(store):
    fill(store, [1])
    with file_size_limit(20_000), pytest.raises(CheckpointError, match="run the same command again"):
        store.save(2, items(2, size=50_000), {})
        store.wait()
    assert [path.name for path in store.directory.iterdir()] == ["1"]
    assert_equal(store.restore(shapes(items(0))).items, items(1))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        with contextlib.closing(CheckpointStore(disk / "checkpoints", keep=2)) as store:
            fill(store, [1])
            with pytest.raises(CheckpointError, match="The disk is full"):
                store.save(2, items(2, size=50_000), {})
                store.wait()
            assert_equal(store.restore(shapes(items(0))).items, items(1))
            assert store.steps() == [1]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_read_given_up_says_nothing_and_another_error_is_reported(store, monkeypatch):
    """Orbax's readers turn the GeneratorExit of a dropped coroutine into an error; where it lands is chance."""
    told = []
    monkeypatch.setattr(stores, "_REPORT", [told.append])

    async def read(translate):
        try:
            await asyncio.get_running_loop().create_future()
        except BaseException as error:
            raise Exception("while reading") from (error if translate else None)

    async def drop(translate):
        task = read(translate)
        task.send(None)

    asyncio.run(drop(translate=True))
    gc.collect()
    assert not told
    asyncio.run(drop(translate=False))
    gc.collect()
    assert len(told) == 1
