import struct

import numpy as np
import pytest

from nemotron_jax.data import megatron
from nemotron_jax.errors import DataError

DOCUMENTS = [[5, 6, 7], [], [65000], list(range(100))]


def write(path, documents=DOCUMENTS, dtype=np.int32):
    with megatron.Writer(path, dtype) as writer:
        for document in documents:
            writer.add(document)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("name", ["data", "data.bin", "data.idx"])
def test_round_trip(tmp_path, dtype, name):
    write(tmp_path / "data.v1.bin", dtype=dtype)
    store = megatron.read(tmp_path / f"data.v1{name[4:]}" if name != "data" else tmp_path / "data.v1.bin")
    assert isinstance(store.tokens, np.memmap)
    assert store.tokens.dtype == dtype
    assert store.documents == len(DOCUMENTS)
    for number, document in enumerate(DOCUMENTS):
        assert store.tokens[store.offsets[number] : store.offsets[number + 1]].tolist() == document


def test_bytes_on_disk(tmp_path):
    """The format, spelled out: what other programs write and read."""
    write(tmp_path / "a", [[1, 2], [3]], np.uint16)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<3H", 1, 2, 3)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    assert (tmp_path / "a.idx").read_bytes() == header + struct.pack("<2i2q3q", 2, 1, 0, 4, 0, 1, 2)


def test_documents_of_several_sequences_and_modes(tmp_path):
    """Two documents of 2 and 1 sentences, as Megatron writes them with --split-sentences; then with modes."""
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    index = header + struct.pack("<3i3q3q", 1, 2, 1, 0, 4, 12, 0, 2, 3)
    (tmp_path / "a.bin").write_bytes(struct.pack("<4i", 9, 8, 7, 6))
    for content in (index, index + b"\x00\x01\x00"):
        (tmp_path / "a.idx").write_bytes(content)
        store = megatron.read(tmp_path / "a")
        assert store.offsets.tolist() == [0, 3, 4]
        assert store.tokens.tolist() == [9, 8, 7, 6]


def test_no_tokens(tmp_path):
    write(tmp_path / "a", [])
    assert megatron.read(tmp_path / "a").documents == 0


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            ".bin",
            lambda data: data[:-6],
            r"a\.bin: expected 416 bytes \(a\.idx lists 104 int32 tokens\), found 410: .*trunc",
        ),
        (".bin", lambda data: data + b"\0\0", r"a\.bin: expected 416 bytes .*, found 418: .*damaged"),
        (
            ".idx",
            lambda data: data[:-1],
            r"a\.idx: expected 122 bytes \(its header names 4 sequences.*found 121: .*trunc",
        ),
        (".idx", lambda data: data[:20], r"a\.idx: expected an index of at least 34 bytes, found 20"),
        (".idx", lambda data: b"x" + data[1:], r"a\.idx: expected a Megatron index"),
        (".idx", lambda data: data[:17] + b"\x07" + data[18:], r"expected the dtype code of tokens .*, got 7"),
        (".idx", lambda data: data[:34] + b"\x04" + data[35:], r"lengths and positions disagree"),
        (".idx", lambda data: data[:-8] + b"\x03" + data[-7:], r"expected documents that cover sequences 0 to 4"),
        (".bin", None, r"a\.bin: no such file; a\.idx needs it"),
        (".idx", None, r"a\.idx: no such file; a\.bin needs it"),
    ],
)
def test_damage(tmp_path, file, change, message):
    write(tmp_path / "a")
    path = tmp_path / f"a{file}"
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        megatron.read(tmp_path / "a")


def test_nothing_appears_unless_it_is_whole(tmp_path):
    with pytest.raises(ZeroDivisionError), megatron.Writer(tmp_path / "a") as writer:
        writer.add([1, 2])
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", [65536, -1])
def test_a_token_that_does_not_fit(tmp_path, token):
    with pytest.raises(DataError, match=f"from 0 to 65535 .uint16., got {token}"):
        write(tmp_path / "a", [[1, token]], np.uint16)


def test_smallest_dtype():
    assert megatron.smallest_dtype(8192) == np.uint16
    assert megatron.smallest_dtype(131072) == np.int32
