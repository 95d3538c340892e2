"""configs/ablations: configs of runs that differ in their recipe alone, and the script that compares them."""

import importlib.util
from pathlib import Path

import jax
import pytest

from nemotron_jax.cli import parse_train_flags
from nemotron_jax.errors import UserError
from nemotron_jax.model.counts import count_parameters
from nemotron_jax.model.nemotron import abstract, matmul_paths
from nemotron_jax.precision.recipe import recipe

FOLDER = Path(__file__).parents[1] / "configs/ablations"
CONFIGS = sorted(FOLDER.glob("nvfp4_*.py"))

specification = importlib.util.spec_from_file_location("compare", FOLDER / "compare.py")
compare = importlib.util.module_from_spec(specification)
specification.loader.exec_module(compare)


def parse(file, *flags):
    return parse_train_flags([f"--config={file}", "--workdir=runs/x", *flags])[0]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
@pytest.mark.parametrize("name", compare.RECIPES)
def test_every_recipe_suits_the_model(file, name):
    config = parse(file, f"--config.precision.recipe={name}")
    rules = recipe(name, config.model, config.precision.exclude)
    formats = {precision.format for precision in rules.table(matmul_paths(config.model)).values()}
    abstract(config.model, rules)
    assert ("nvfp4" in formats) == ("nvfp4" in name)
    assert config.log.zero_gradients and config.optimizer.warmup_steps < config.train.steps


def test_the_large_one_is_large_enough():
    config = parse(FOLDER / "nvfp4_h200.py")
    counts = count_parameters(config.model)
    embeddings = 2 * config.model.vocab_size * config.model.hidden_size
    assert counts["active"] - embeddings > 30e6
    assert config.train.steps * config.train.global_batch_size * config.data.seq_len >= 200e6
    assert set(config.model.pattern) == set("ME*")


def rows(loss, zeros, steps=100):
    return [{"step": s, "loss": loss + (s <= 90), "zero_gradients/in_proj": zeros} for s in range(1, steps + 1)] + [
        {"step": steps, "validation_loss": loss + 0.5}
    ]


def test_the_table(tmp_path):
    """Only the last 10 % of the steps count, and each seed is compared with its own."""
    runs = {
        "bfloat16": {0: rows(2.0, 0.01), 1: rows(4.0, 0.01)},
        "nvfp4": {0: rows(2.1, 0.03), 1: rows(4.0, 0.03)},
    }
    table = compare.summary(runs)
    assert [row["relative_gap"] for row in table] == pytest.approx([0, 0, 0.05, 0])
    assert [row["loss"] for row in table] == pytest.approx([2, 4, 2.1, 4])
    assert table[2]["zero_gradients"] == {"in_proj": pytest.approx(0.03)} and table[2]["validation_loss"] == 2.6
    assert "| nvfp4 | 0 | 2.1000 | +5.00% | 2.6000 | 3.00% |" in compare.markdown(table)
    compare.plot(runs, tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--runs=bfloat16,nvfp5", "Did you mean"),
        ("--runs=bfloat16,bfloat16:first", "whole number from 0"),
        ("--runs=bfloat16,nvfp4:1", "add bfloat16:1"),
        ("--runs=bfloat16,nvfp4:0,nvfp4", "named twice"),
        ("--at-once=0", "at-once"),
        ("--config.train.stepz=3", "stepz"),
        ("--recipe=nvfp4", "--recipe"),
        ("--config.model.mamba.num_heads=3", "num_heads"),
    ],
)
def test_bad_flags_stop_it_before_the_first_run(flag, message, tmp_path, monkeypatch):
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    with pytest.raises(UserError, match=message):
        compare.compare([f"--config={CONFIGS[0]}", f"--workdir={tmp_path / 'runs'}", flag])
    assert not list(tmp_path.iterdir())


RUNS = "--runs=bfloat16,nvfp4,bfloat16:1,nvfp4:1"


def flag_of(command, name):
    return next(argument.partition("=")[2] for argument in command if argument.startswith(f"--{name}="))


@pytest.mark.parametrize("at_once", [1, 4])
def test_runs_at_once_have_a_gpu_each_and_the_same_tokens(at_once, tmp_path, monkeypatch):
    """train.py is not run here: what it was given, with which environment, and what its folder held."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)  # commands that other tests call set it
    (tmp_path / "text.txt").write_text("some words of text " * 400)
    seen = []

    def run(command, env, check, stdout=None, stderr=None):
        workdir = Path(flag_of(command, "workdir"))
        tokens = next((workdir / "data").glob("tokens-*")) / "data.bin"
        seen.append((workdir.name, env["CUDA_VISIBLE_DEVICES"], env.get("XLA_PYTHON_CLIENT_MEM_FRACTION"), tokens))
        (workdir / compare.METRICS_FILE).write_text(
            "".join(f'{{"step": {step}, "loss": 2.0, "zero_gradients/in_proj": 0.1}}\n' for step in range(1, 21))
        )
        return compare.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    flags = [f"--config.data.files={tmp_path / 'text.txt'}", "--config.data.seq_len=16", "--config.train.steps=20"]
    flags += [
        "--config.data.validation_fraction=0",
        "--config.train.validate_every=20",
        "--config.data.tokenizer=bpe:300",
    ]
    folder = tmp_path / "runs"
    platforms = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", "cuda,cpu")
        arguments = [f"--config={CONFIGS[1]}", f"--workdir={folder}", RUNS, f"--at-once={at_once}", *flags]
        assert compare.compare(arguments) == 0
        assert jax.config.jax_platforms == "cpu", "GPUs are for the runs"
    finally:
        jax.config.update("jax_platforms", platforms)
    names = [f"{recipe}-seed-{seed}" for seed in (0, 1) for recipe in ("bfloat16", "nvfp4")]
    assert sorted(name for name, *_ in seen) == sorted(names)
    assert sorted(gpu for _, gpu, *_ in seen) == (["4,7"] * 4 if at_once == 1 else ["4", "4", "7", "7"])
    assert {fraction for *_, fraction, _ in seen} == {None if at_once == 1 else "0.45"}
    assert len({tokens.stat().st_ino for *_, tokens in seen}) == 1
    assert len((folder / "table.md").read_text().splitlines()) == 2 + 4


def test_a_failed_run_is_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "tokenise", lambda *_: None)
    failed = compare.subprocess.CompletedProcess([], 3)
    started = []
    monkeypatch.setattr(compare.subprocess, "run", lambda command, **_: started.append(command) or failed)
    assert compare.compare([f"--config={CONFIGS[1]}", f"--workdir={tmp_path}", RUNS]) == 3
    assert len(started) == 1 and not (tmp_path / "table.md").exists()
