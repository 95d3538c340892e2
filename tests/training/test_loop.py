"""Whole runs in one process: resuming, ending, refusing. Real kills are in test_kills.py."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import nemotron_jax
from nemotron_jax.checkpoint.convert import convert
from nemotron_jax.data.tokenizer import train_bpe
from nemotron_jax.errors import CheckpointError, ConfigError, DataError
from nemotron_jax.evaluation.likelihood import perplexity, score
from nemotron_jax.inference.generate import generate_tokens
from nemotron_jax.inference.text import sample_text
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.training import loop, step
from nemotron_jax.training.loop import DIVERGED, DONE, STOPPED, pretrain
from nemotron_jax.training.state import TrainSetup
from tests.tiny import TINY, tiny_run

WORDS = "def return import class for in if else while try lambda yield".split()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """TINY with room for a 300-token BPE, on 40 small documents."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for number in range(40):
        text = " ".join(rng.choice(WORDS, rng.integers(5, 60)))
        (folder / f"{number}.txt").write_text(text)
    return tiny_run(
        model=dataclasses.replace(TINY, vocab_size=320, pattern="ME*"),
        data={"files": f"{folder}/*.txt", "tokenizer": "bpe:300"},
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run of 8 steps that was never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert pretrain(config, workdir, sampler=sample_text) == DONE
    return workdir


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], key): row[key] for row in rows for key in ("loss", "validation_loss") if key in row}


class Killed(BaseException):
    pass


def kill_at(monkeypatch, number):
    """The run dies, without any goodbye of its own, when it asks for batch ``number``."""
    original = loop.global_batch
    calls = iter(range(1, 10**6))

    def dying(setup, batch):
        if next(calls) == number:
            raise Killed
        return original(setup, batch)

    monkeypatch.setattr(loop, "global_batch", dying)
    return lambda: monkeypatch.setattr(loop, "global_batch", original)


def test_finished_run(finished, config, capsys):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "loss.png", "sample.txt", "tokenizer.json"} <= names
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 9))
    assert {"learning_rate", "grad_norm", "tokens_per_second", "mtp_loss_2", "max_vio"} <= training[0].keys()
    validation = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in validation] == [4, 8]
    assert all("validation_bits_per_byte" in row for row in validation)
    assert training[-1]["loss"] < training[0]["loss"]
    assert "def main():" in (finished / "sample.txt").read_text()
    before = (finished / "metrics.jsonl").read_bytes()
    assert pretrain(config, finished, sampler=sample_text) == DONE  # a finished run is done, and stays as it is
    assert (finished / "metrics.jsonl").read_bytes() == before
    shown = capsys.readouterr()
    assert "eval.py --checkpoint=" in shown.err + shown.out


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_killed_run_goes_on_bit_for_bit(at, finished, config, tmp_path, monkeypatch):
    revive = kill_at(monkeypatch, at)
    with pytest.raises(Killed):
        pretrain(config, tmp_path / "run")
    revive()
    assert pretrain(config, tmp_path / "run") == DONE
    assert losses(tmp_path / "run") == losses(finished)


def test_signal_saves_and_stops(finished, config, tmp_path, monkeypatch, capsys):
    original = loop.global_batch
    calls = iter(range(1, 10**6))

    def signalling(setup, batch):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(setup, batch)

    monkeypatch.setattr(loop, "global_batch", signalling)
    assert pretrain(config, tmp_path / "run") == STOPPED
    shown = capsys.readouterr()
    assert "SIGTERM" in shown.err + shown.out
    assert (tmp_path / "run/checkpoints/3").is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(loop, "global_batch", original)
    assert pretrain(config, tmp_path / "run") == DONE
    assert losses(tmp_path / "run") == losses(finished)


def test_another_config_is_refused(finished, config):
    before = (finished / "config.json").read_bytes()
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, peak_lr=0.5))
    with pytest.raises(ConfigError, match=r"optimizer\.peak_lr: 0\.01 -> 0\.5"):
        pretrain(other, finished)
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    with pytest.raises(ConfigError, match=r"train\.steps"):
        pretrain(shorter, finished)
    assert (finished / "config.json").read_bytes() == before


def test_more_steps_logs_and_checkpoints_may_change(finished, config, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    longer = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=10),
        log=dataclasses.replace(config.log, every=5),
        checkpoint=dataclasses.replace(config.checkpoint, keep=1),
    )
    assert pretrain(longer, tmp_path / "run") == DONE
    assert max(step for step, _ in losses(tmp_path / "run")) == 10
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["steps"] == 10


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# TensorStore drops coroutines of the reads that it gives up.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_falls_back(harm, finished, config, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    file = largest_file(tmp_path / "run/checkpoints/8/params")
    content = bytearray(file.read_bytes())
    if harm == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "flip":
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    else:
        file.unlink()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))
    assert pretrain(longer, tmp_path / "run") == DONE
    shown = capsys.readouterr()
    assert "checkpoint 8" in shown.err + shown.out and "damaged" in shown.err + shown.out
    assert losses(tmp_path / "run") == losses(finished)  # steps 7 and 8 were trained again


def test_only_damaged_checkpoints(finished, config, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for step_folder in (tmp_path / "run/checkpoints").iterdir():
        shutil.rmtree(step_folder / "optimizer")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        pretrain(config, tmp_path / "run")


def test_divergence_is_given_up(config, tmp_path, monkeypatch, capsys):
    """Non-finite losses from step 4 on: skipped twice, then exit code 3 with the step and the last good checkpoint."""
    original = step.totals

    def poisoned(batch, model):
        return original(batch, model) * np.nan

    config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_skipped_steps=2))
    monkeypatch.setattr(step, "totals", poisoned)
    assert pretrain(config, tmp_path / "run") == DIVERGED
    shown = capsys.readouterr()
    assert "step 2" in shown.err + shown.out and "no checkpoint yet" in shown.err + shown.out


def test_init_from_another_run(finished, config, tmp_path):
    """Parameters come along; step, optimizer and data start anew; another model is refused."""
    start = dataclasses.replace(
        config,
        checkpoint=dataclasses.replace(config.checkpoint, init_from=str(finished)),
        train=dataclasses.replace(config.train, steps=2, seed=5),
        optimizer=dataclasses.replace(config.optimizer, peak_lr=1e-9, min_lr=0.0),
    )
    assert pretrain(start, tmp_path / "run") == DONE
    first = losses(tmp_path / "run")[(1, "loss")]
    assert first < 0.9 * losses(finished)[(1, "loss")]
    other = dataclasses.replace(start, model=dataclasses.replace(config.model, norm_eps=1e-6))
    with pytest.raises(ConfigError, match="norm_eps"):
        pretrain(other, tmp_path / "other")
    missing = dataclasses.replace(start, checkpoint=dataclasses.replace(start.checkpoint, init_from="/nowhere"))
    with pytest.raises(CheckpointError, match="no directory"):
        pretrain(missing, tmp_path / "missing")


def test_init_from_a_hugging_face_directory(finished, config, tmp_path):
    """The same start as from the run itself; what an export will need comes along."""
    convert(finished, tmp_path / "hf")
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages }}")

    def start(source):
        return dataclasses.replace(
            config,
            checkpoint=dataclasses.replace(config.checkpoint, init_from=str(source)),
            train=dataclasses.replace(config.train, steps=1, seed=5),
        )

    assert pretrain(start(finished), tmp_path / "a") == DONE
    assert pretrain(start(tmp_path / "hf"), tmp_path / "b") == DONE
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    convert(tmp_path / "b", tmp_path / "out", format="bf16")
    assert (tmp_path / "out/chat_template.jinja").exists() and (tmp_path / "out/tokenizer.json").exists()
    other = start(tmp_path / "hf")
    other = dataclasses.replace(other, model=dataclasses.replace(config.model, norm_eps=1e-6))
    with pytest.raises(ConfigError, match="norm_eps"):
        pretrain(other, tmp_path / "other")
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        pretrain(start(tmp_path / "hf"), tmp_path / "missing")
    assert not (tmp_path / "other").exists() and not (tmp_path / "missing").exists()


def test_evaluation_of_a_hugging_face_directory(finished, tmp_path):
    convert(finished, tmp_path / "hf")
    np.save(tmp_path / "in.npy", np.random.default_rng(0).integers(0, 64, (3, 9)))
    for name in ("hf", "run"):
        score(finished if name == "run" else tmp_path / "hf", tmp_path / "in.npy", tmp_path / f"{name}.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "hf.npy"), np.load(tmp_path / "run.npy"))
    (tmp_path / "text.txt").write_text("def main():\n    pass\n")
    ours, theirs = (perplexity(path, str(tmp_path / "text.txt")) for path in (finished, tmp_path / "hf"))
    assert ours["tokens"] == theirs["tokens"] and theirs["bits_per_byte"] > 0


def test_refused_data_leave_nothing_behind(config, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": 1}\n')
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, files=str(bad)))
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        pretrain(wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_refused_data_delete_nothing_of_the_user(config, tmp_path):
    """A project folder as workdir, with its own data/ and tokenizer.json: both stay when the run is refused."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/bad.jsonl").write_text("{")
    (tmp_path / "tokenizer.json").write_text("mine")
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, files=str(tmp_path / "data/bad.jsonl")))
    with pytest.raises(DataError):
        pretrain(wrong, tmp_path)
    assert (tmp_path / "data/bad.jsonl").read_text() == "{"
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


def test_a_tokenizer_left_by_another_attempt_is_not_used(finished, config, tmp_path):
    """Killed during its set-up, another config left a tokenizer: it is moved aside, and the run's own is kept."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    train_bpe(["some other text " * 50], 280).save(workdir / "tokenizer.json")
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1))
    assert pretrain(short, workdir) == DONE
    assert (workdir / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()
    assert (workdir / "tokenizer.json.old").exists()


def test_a_diverged_run_diverges_again(config, tmp_path):
    """Started anew, it does not pass for finished."""
    huge = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=3, max_skipped_steps=2),
        optimizer=dataclasses.replace(config.optimizer, peak_lr=1e30, warmup_steps=0),
    )
    assert pretrain(huge, tmp_path / "run") == DIVERGED
    assert pretrain(huge, tmp_path / "run") == DIVERGED


def test_a_workdir_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        pretrain(config, tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match="cannot be written"):
        pretrain(config, tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


def test_batches_must_fit_the_mesh(config):
    rows = dataclasses.replace(config.train, global_batch_size=12, microbatches=3)
    parallel = dataclasses.replace(config.parallel, data=4, expert=2)
    with pytest.raises(ConfigError, match="multiple of 8"):
        loop.check_mesh(dataclasses.replace(config, train=rows), make_mesh(parallel, jax.devices()))
    with pytest.raises(ConfigError, match=r"data\.seq_len"):
        mesh = make_mesh(dataclasses.replace(config.parallel, context=8), jax.devices())
        loop.check_mesh(dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=12)), mesh)


def test_load_score_and_generate(finished, tmp_path):
    """What a user does with a finished run; scores are the log-softmax of the logits."""
    config, model = nemotron_jax.load(finished)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 9)).astype(np.int32)
    np.save(tmp_path / "in.npy", tokens)
    score(finished, tmp_path / "in.npy", tmp_path / "out.npy")
    scored = np.load(tmp_path / "out.npy")
    logits = np.asarray(model(tokens).logits, np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    assert scored.dtype == np.float32 and scored.shape == (3, 8)
    np.testing.assert_allclose(scored, expected, rtol=1e-4, atol=1e-5)

    greedy = {"tokens": 5, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    generate_tokens(finished, tmp_path / "in.npy", tmp_path / "made.npy", **greedy)
    made = np.load(tmp_path / "made.npy")
    sequence = tokens
    for position in range(5):
        following = np.asarray(model(sequence).logits)[:, -1].argmax(-1)
        np.testing.assert_array_equal(made[:, position], following)
        sequence = np.concatenate([sequence, following[:, None]], axis=1).astype(np.int32)


def test_perplexity_of_a_file(finished, tmp_path):
    """Against the model called on the one document alone."""
    text = "def return"
    (tmp_path / "text.txt").write_text(text)
    result = perplexity(finished, str(tmp_path / "text.txt"))
    _, model = nemotron_jax.load(finished)
    tokenizer = loop.Tokenizer.load(finished / "tokenizer.json")
    ids = np.concatenate([[1], tokenizer.encode(text), [2]]).astype(np.int32)[None]
    assert result["tokens"] == ids.shape[1] - 1
    assert result["perplexity"] == pytest.approx(np.exp(result["nll_per_token"]))
    nll = result["nll_per_token"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nll / np.log(2) / len(text))
    if ids.shape[1] <= 17:  # one row of 16 tokens
        logprobs = np.asarray(model.token_logprobs(model(ids[:, :-1]).hidden, ids[:, 1:]))
        assert nll == pytest.approx(-logprobs.sum(), rel=1e-4)
    else:
        pytest.fail(f"the text should fit one row, it has {ids.shape[1]} tokens")


def test_the_start_says_which_weights_no_axis_cuts():
    """A vocabulary that the devices of tensor do not divide."""

    def lines(vocab_size):
        config = tiny_run(model=dataclasses.replace(TINY, vocab_size=vocab_size), parallel={"fsdp": 4, "tensor": 2})
        return loop._whole_on_each_device(TrainSetup(config, make_mesh(config.parallel)))

    assert lines(20_000) == {}
    embeddings_and_head = 2 * 20_001 * TINY.hidden_size * 4 / 1e6
    assert lines(20_001) == {
        "whole on each device": f"along vocab, which tensor does not divide: weights of {embeddings_and_head:.1f} MB"
    }
