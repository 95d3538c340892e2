"""precision.switch_at: another recipe from some step on."""

import dataclasses
import json

import numpy as np
import pytest

from nemotron_jax.errors import ConfigError
from nemotron_jax.run_config import PrecisionConfig
from nemotron_jax.training import loop
from nemotron_jax.training.loop import DONE, pretrain
from tests.tiny import TINY, tiny_run

SWITCH = PrecisionConfig("fp8", switch_at=5, switch_to="bfloat16")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        words = np.random.default_rng(number).choice(["def", "return", "class", "for"], 50)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return tiny_run(
        model=dataclasses.replace(TINY, vocab_size=320, pattern="ME"),
        data={"files": f"{folder}/*.txt", "tokenizer": "bpe:300"},
    )


def losses(config, workdir):
    assert pretrain(config, workdir) == DONE
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["loss"] for row in rows if "loss" in row])


class Killed(BaseException):
    pass


# Checkpoints at 2 and 6: before the switch and after it.
@pytest.mark.parametrize("killed_at", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_a_switch_is_exact_on_resuming(config, tmp_path, monkeypatch, killed_at):
    whole = losses(dataclasses.replace(config, precision=SWITCH), tmp_path / "whole")
    before = losses(dataclasses.replace(config, precision=PrecisionConfig("fp8")), tmp_path / "before")
    np.testing.assert_array_equal(whole[:5], before[:5])
    assert (whole[5:] != before[5:]).all()

    place = loop.global_batch
    asked = []

    def dies(setup, batch):
        asked.append(batch)
        if len(asked) == killed_at:
            raise Killed
        return place(setup, batch)

    switched = dataclasses.replace(config, precision=SWITCH, train=dataclasses.replace(config.train, validate_every=8))
    monkeypatch.setattr(loop, "global_batch", dies)
    with pytest.raises(Killed):
        pretrain(switched, tmp_path / "killed")
    monkeypatch.setattr(loop, "global_batch", place)
    np.testing.assert_array_equal(losses(switched, tmp_path / "killed"), whole)


def test_the_start_shows_both(config, tmp_path, capsys):
    far = dataclasses.replace(SWITCH, switch_at=3)
    losses(dataclasses.replace(config, precision=far, train=dataclasses.replace(config.train, steps=4)), tmp_path)
    said = capsys.readouterr().err
    first, _, second = said.partition("precision from step 4 on\n")
    assert "matmuls in fp8" in first and "matmuls in bfloat16" in second and "matmuls in fp8" not in second


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"switch_at": -1}, "precision.switch_at must be 0"),
        ({"switch_at": 3, "recipe": "fp8", "switch_to": "fp8"}, "switches from fp8 to the same recipe"),
        ({"switch_at": 3, "switch_to": "mxfp9"}, "precision.switch_to must be one of .*Did you mean 'mxfp8'"),
        ({"switch_at": 3, "switch_to": "mxfp8"}, "mxfp8 needs a multiple of 32"),
        ({"recipe": "fp8", "exclude": "*/out_prj"}, "'\\*/out_prj' of the precision recipe matches no matmul"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(config, tmp_path, precision, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(dataclasses.replace(config, precision=PrecisionConfig(**precision)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
