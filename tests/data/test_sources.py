import argparse
import gzip
import json
import os
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from nemotron_jax.data import sources
from nemotron_jax.data.sources import Skipped, documents, resolve
from nemotron_jax.errors import DataError

TEXTS = ["first line\nsecond\r\n", "naïve ∑ 🎉", "  x"]


def read(files: str, text_field: str = "text") -> tuple[list[tuple[str, str]], Skipped]:
    texts, prefixes = resolve(files, text_field)
    assert not prefixes
    skipped = Skipped()
    return list(documents(texts, skipped)), skipped


def jsonl(*texts: str, field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, column: pyarrow.Array) -> None:
    parquet.write_table(pyarrow.table({"id": list(range(len(column))), "text": column}), path)


COMPRESS = {".jsonl": lambda data: data, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + jsonl(*TEXTS) + b"\n \n" + jsonl("no newline").rstrip()))
    found, skipped = read(str(path))
    assert [text for _, text in found] == [*TEXTS, "no newline"]
    assert [origin for origin, _ in found] == [f"{path}, line {number}" for number in (1, 2, 3, 6)]
    assert skipped == Skipped()


def test_jsonl_longer_than_a_chunk(tmp_path):
    texts = [letter * 700_000 for letter in "abcdef"]
    for suffix, compress in COMPRESS.items():
        (tmp_path / f"a{suffix}").write_bytes(compress(jsonl(*texts)))
        assert [text for _, text in read(str(tmp_path / f"a{suffix}"))[0]] == texts


def test_zst_of_many_frames(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(jsonl(text)) for text in TEXTS))
    assert [text for _, text in read(str(tmp_path / "a.jsonl.zst"))[0]] == TEXTS


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(TEXTS),
        pyarrow.array(TEXTS, pyarrow.large_string()),
        pyarrow.array(TEXTS).dictionary_encode(),
        pyarrow.array([text.encode() for text in TEXTS]),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet(tmp_path, column):
    write_parquet(tmp_path / "a.parquet", column)
    found, _ = read(str(tmp_path / "a.parquet"))
    assert found == [(f"{tmp_path}/a.parquet, row {row}", text) for row, text in enumerate(TEXTS, start=1)]


def test_text_is_one_document_a_file(tmp_path):
    for name, text in zip(("b.py", "a.txt", "c"), TEXTS, strict=True):
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"unzipped"))
    found, _ = read(f"{tmp_path}/b.py, {tmp_path}/*.txt,{tmp_path}/c,{tmp_path}/*.gz")
    assert found == [
        (f"{tmp_path}/{name}", text)
        for name, text in zip(("b.py", "a.txt", "c", "d.txt.gz"), [*TEXTS, "unzipped"], strict=True)
    ]


def test_globs_are_sorted_descend_and_count_a_file_once(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.txt", "x[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found, _ = read(f"{tmp_path}/x[1].txt,{tmp_path}/**/*.txt,{tmp_path}/a.txt")
    assert [text for _, text in found] == ["x[1].txt", "a.txt", "b.txt", "deep/d.txt", "deep/er/c.txt"]


def test_what_is_not_utf8_or_empty_is_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "\\ud800"}\n{"text": ""}\n{"text": "good"}\n')
    write_parquet(tmp_path / "d.parquet", pyarrow.array([b"\xff", b"fine"]))
    found, skipped = read(f"{tmp_path}/*")
    assert [text for _, text in found] == ["good", "fine"]
    assert skipped == Skipped(not_utf8=4, empty=2)


def test_stdlib():
    files, _ = resolve("stdlib")
    names = [file.name for file in files]
    assert names == sorted(names)
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py", "stdlib/pydoc_data/topics.py"} <= set(names)
    assert not [name for name in names if {"test", "site-packages", "tkinter"} & set(name.split("/"))]
    skipped = Skipped()
    found = dict(documents(files, skipped))
    assert found["stdlib/argparse.py"] == Path(argparse.__file__).read_text(encoding="utf-8")
    assert "assert" in found["stdlib/pydoc_data/topics.py:assert"]
    assert "\\n" not in found["stdlib/pydoc_data/topics.py:bltin-null-object"]
    assert sum(map(len, found.values())) > 5_000_000
    assert skipped.empty > 0  # package markers: nobody named them, so they are no mistake


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


LONG = jsonl(*(os.urandom(64).hex() for _ in range(100)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: expected text, but the file is empty"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": \n',
            r"a\.jsonl, line 2: expected one JSON object a line, got '\{\"text\":'",
        ),
        ("a.jsonl", b"\n[1]\n", r"a\.jsonl, line 2: expected a JSON object, got list"),
        (
            "a.jsonl",
            b'{"test": "x", "b": 1}\n',
            r"line 1: no field 'text'; the fields are 'test', 'b'\. .*Did you mean 'test'",
        ),
        ("a.jsonl", b'{"text": ["x"]}\n', r"line 1: expected text in the field 'text', got list"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: expected text in the field 'text', got NoneType"),
        ("a.jsonl.gz", jsonl("x"), r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", cut(gzip.compress(LONG)), r"a\.jsonl\.gz: cannot be read: Compressed file ended"),
        ("a.jsonl.zst", jsonl("x"), r"a\.jsonl\.zst: expected zstandard data"),
        ("a.jsonl.zst", cut(zstandard.compress(LONG)), r"a\.jsonl\.zst: .*truncated"),
        ("a.parquet", b"PAR1 not really PAR1", r"a\.parquet: expected a Parquet file"),
        ("nothing/*.txt", None, r"nothing/\*\.txt: the glob matches no file"),
        ("ab.txt", None, r"ab\.txt: no such file\. Did you mean 'abc\.txt'"),
        ("missing/ab.txt", None, r"ab\.txt: no such file\. The directory .*missing does not exist"),
        ("folder", None, r"folder: expected a file, but it is a directory\. Name its files"),
    ],
)
def test_bad_input(tmp_path, name, content, message):
    (tmp_path / "abc.txt").write_text("near")
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(f"{tmp_path}/{name}")


def test_bad_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", pyarrow.array(["x", None]))
    write_parquet(tmp_path / "b.parquet", pyarrow.array([1, 2]))
    for field, file, message in (
        ("texts", "a", r"a\.parquet: no column 'texts'; the columns are 'id', 'text'\. .*Did you mean 'text'"),
        ("text", "a", r"a\.parquet, row 2: expected text in 'text', got null"),
        ("text", "b", r"b\.parquet: expected text in the column 'text', got int64"),
    ):
        with pytest.raises(DataError, match=message):
            read(f"{tmp_path}/{file}.parquet", field)


def test_unreadable(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "loop.txt").symlink_to("loop.txt")

    def refused(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(sources, "open", refused, raising=False)  # root, who may run this, can read everything
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
        read(f"{tmp_path}/a.txt")
    with pytest.raises(DataError, match=r"loop\.txt: no such file"):
        read(f"{tmp_path}/loop.txt")


def test_empty_list():
    with pytest.raises(DataError, match="expected at least one data file"):
        resolve(" , ")
