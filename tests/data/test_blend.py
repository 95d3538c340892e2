import json

import pytest

from nemotron_jax.data import blend
from nemotron_jax.errors import DataError

# As published for Super 3's pre-training, with local paths.
PUBLISHED = {
    "_comment": "Super3 pretrain Phase 1 blend. Weights are unnormalized; the pipeline normalizes at runtime.",
    "_missing_categories": {"code": {"weight": 14.0, "description": "Code data."}},
    "datasets": [
        {"name": "math", "path": "math/*.parquet", "subset": "4plus", "text_field": "text", "weight": 2.2},
        {"name": "code", "path": "stdlib", "split": "train", "weight": 1.0},
        {"name": "tokens", "path": "/data/tokens", "text_field": "body"},
        {"name": "left-out", "path": "x.txt", "weight": 0},
    ],
}


def write(tmp_path, values) -> str:
    path = tmp_path / "blend.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def test_published_form(tmp_path):
    assert blend.read(write(tmp_path, PUBLISHED)) == [
        blend.Part("math", "math/*.parquet", "text", 2.2 / 4.2),
        blend.Part("code", "stdlib", "text", 1 / 4.2),
        blend.Part("tokens", "/data/tokens", "body", 1 / 4.2),
    ]


def one(**changes) -> dict:
    return {"datasets": [{"name": "a", "path": "a.txt", "weight": 1.0} | changes]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", r"blend\.json: expected a blend in JSON"),
        ([], r"blend\.json: expected a JSON object, got \[\]"),
        ({}, r"the key 'datasets' is missing"),
        ({"dataset": []}, r"unknown key 'dataset'; known are datasets\. Did you mean 'datasets'"),
        ({"train": [], "valid": []}, r"unknown key 'train'"),
        ({"datasets": []}, r"at least one data set, got \[\]"),
        ({"datasets": ["a"]}, r"data set 1: expected a JSON object, got 'a'"),
        ({"datasets": [{"path": "a"}]}, r"data set 1: the key 'name' is missing"),
        ({"datasets": [{"name": "a"}]}, r"data set 1: the key 'path' is missing"),
        (one(wieght=2.0), r"data set 1: unknown key 'wieght'; .*Did you mean 'weight'"),
        (one(path=""), r'expected text for "path", got \'\''),
        (one(text_field=3), r'expected text for "text_field", got 3'),
        (one(weight=-0.5), r'\(a\): expected a "weight" of 0 or more, got -0\.5'),
        (one(weight="1"), r'expected a "weight" of 0 or more, got \'1\''),
        (one(weight=True), r'expected a "weight" of 0 or more, got True'),
        ('{"datasets": [{"name": "a", "path": "b", "weight": NaN}]}', r"got nan"),
        (one(weight=0), r"expected a weight above 0 for at least one data set"),
        ({"datasets": one()["datasets"] * 2}, r"a name of its own for each data set, got \['a'\] twice"),
        (
            one(path="hf://nvidia/Nemotron-CC-v2", subset="High-Quality"),
            r"\(a\): expected a local path, got hf://nvidia/Nemotron-CC-v2\. .*hf download nvidia/Nemotron-CC-v2 .*"
            r'"DIR/High-Quality/\*\*/\*\.parquet"',
        ),
        (one(path="s3://bucket/x"), r"expected a local path, got s3://bucket/x\. .*download the data first and"),
    ],
)
def test_bad_blends(tmp_path, values, message):
    with pytest.raises(DataError, match=message):
        blend.read(write(tmp_path, values))


def test_no_blend(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: the blend cannot be read: No such file"):
        blend.read(tmp_path / "none.json")
