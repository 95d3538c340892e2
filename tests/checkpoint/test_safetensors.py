"""The format: round trips, and every way in which a header can be wrong."""

import json

import ml_dtypes
import numpy as np
import pytest

from nemotron_jax.checkpoint.safetensors import DTYPES, INDEX_FILE, SINGLE_FILE, SafetensorsFile, ShardWriter, Tensor
from nemotron_jax.errors import CheckpointError


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_every_dtype_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for name, dtype in DTYPES.items():
        raw = rng.integers(0, 2 if name == "BOOL" else 255, (3, 5, dtype.itemsize), np.uint8)
        arrays[f"a.{name}"] = raw.view(dtype)[..., 0]
    arrays |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float16)}
    names = {dtype: name for name, dtype in DTYPES.items()}
    writer = ShardWriter(tmp_path, [Tensor(name, names[x.dtype], x.shape) for name, x in arrays.items()])
    for name, array in arrays.items():
        writer.write(name, array)
    writer.finish()
    file = SafetensorsFile(tmp_path / SINGLE_FILE)
    assert file.tensors.keys() == arrays.keys() and file.metadata == {"format": "pt"}
    for name, array in arrays.items():
        read = file.array(name)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert file.tensors[name].begin % array.dtype.itemsize == 0  # torch cannot view unaligned data
        file.release(name)
        assert read.tobytes() == array.tobytes()
    assert file.array("a.BF16", 1, 3).tobytes() == arrays["a.BF16"][1:3].tobytes()


def test_the_layout_is_that_of_the_specification(tmp_path):
    """A file written byte by byte by hand reads right, and what we write is laid out the same."""
    data = np.array([[1, 2], [3, 4]], ml_dtypes.bfloat16)
    text = b'{"w":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}  '
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data.tobytes())
    assert SafetensorsFile(path).array("w").tolist() == [[1, 2], [3, 4]]
    writer = ShardWriter(tmp_path, [Tensor("w", "BF16", (2, 2))])
    writer.write("w", data[1:], offset=2)
    writer.write("w", data[:1])
    writer.finish()
    raw = (tmp_path / SINGLE_FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0 and raw[8 + length :] == data.tobytes()
    assert json.loads(raw[8 : 8 + length])["w"] == {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}


def test_shards_and_index(tmp_path):
    tensors = [Tensor(f"t{i}", "F32", (10,)) for i in range(7)] + [Tensor("large", "F32", (40,))]
    writer = ShardWriter(tmp_path, tensors, max_shard=100)
    for tensor in tensors:
        writer.write(tensor.name, np.full(tensor.shape, len(tensor.name), np.float32))
    writer.finish()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 4 * (70 + 40)
    for name in files:
        held = SafetensorsFile(tmp_path / name)
        assert {index["weight_map"][tensor] for tensor in held.tensors} == {name}
        assert len(held.tensors) == 1 or sum(tensor.nbytes for tensor in held.tensors.values()) <= 100
    assert index["weight_map"].keys() == {tensor.name for tensor in tensors}


def test_a_tensor_that_never_came_is_noticed(tmp_path):
    writer = ShardWriter(tmp_path, [Tensor("w", "F32", (4,))])
    writer.write("w", np.zeros(3, np.float32))
    with pytest.raises(AssertionError, match="'w'"):
        writer.finish()
    writer.close()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "corrupt header"),
        (b"\xff\xfe", b"", "corrupt header"),
        (b"[]", b"", "a JSON object was expected"),
        ({"a": 3}, b"", "a must have dtype, shape and data_offsets"),
        ({"a": entry() | {"x": 1}}, b"0" * 8, "a must have dtype"),
        ({"a": entry("F99")}, b"0" * 8, "unknown dtype 'F99'"),
        ({"a": entry() | {"dtype": ["F32"]}}, b"0" * 8, r"unknown dtype \['F32'\]"),
        ({"a": entry(shape=(1,) * 66 + (2,))}, b"0" * 8, "67 axes"),
        ({"a": entry(shape=(-2,))}, b"0" * 8, "whole numbers were expected"),
        ({"a": entry(shape=(2.0,))}, b"0" * 8, "whole numbers were expected"),
        ({"a": entry(offsets=(8, 0))}, b"0" * 8, r"\[begin, end\] were expected"),
        ({"a": entry(offsets=(0, 4))}, b"0" * 8, r"4 bytes of data, but F32 \[2\] takes 8"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, b"0" * 20, "b leaves a gap behind a"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"0" * 12, "b overlaps with a"),
        ({"a": entry(offsets=(4, 12))}, b"0" * 12, "a leaves a gap behind the header"),
        ({"a": entry()}, b"0" * 7, "truncated: .* its tensors end at"),
        ({"a": entry()}, b"0" * 9, "1 bytes behind a belong to no tensor"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
         b"0", "names a twice"),
    ],
)  # fmt: skip
def test_bad_headers(tmp_path, header, data, message):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith("x.safetensors")


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8, (100).to_bytes(8, "little") + b"{}"])
def test_truncated_files(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is truncated"):
        SafetensorsFile(path)


def test_all_faults_of_a_header_are_told(tmp_path):
    path = write_raw(tmp_path / "x", {"a": entry("F99"), "b": entry(shape=(3,)), "c": entry(offsets=(8, 16))})
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert [line.split()[1] for line in str(caught.value).splitlines()] == ["a", "b"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "x.safetensors")
