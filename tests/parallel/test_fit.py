"""Meshes that a model, a batch or a sequence does not fit: the message names the dimension and what would do."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from nemotron_jax.config import PRESETS
from nemotron_jax.errors import ConfigError
from nemotron_jax.parallel.fit import check_batch, check_model
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.precision.recipe import block_of
from nemotron_jax.run_config import ParallelConfig, PrecisionConfig
from nemotron_jax.training.loop import check_mesh
from tests.tiny import TINY, tiny_run

ROOT = Path(__file__).parents[2]


def mesh(**axes):
    return make_mesh(ParallelConfig(**axes), jax.devices())


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        ({"tensor": 4}, {}, r"parallel\.tensor=4 does not divide model\.mamba\.num_groups \(2\): .* 1, 2\."),
        ({"tensor": 8}, {"pattern": "*", "mtp": None}, r"model\.attention\.num_heads \(4\) .*\(2\): .* 1, 2, 4\."),
        (
            {"expert": 8},
            {"moe": {"num_experts": 12}},
            r"expert=8 .* model\.moe\.num_experts \(12\): .* 1, 2, 3, 4, 6, 12",
        ),
        (
            {"fsdp": 8},
            {"hidden_size": 36},
            r"fsdp=8 .* model\.hidden_size \(36\): it may be one of 1, 2, 3, 4, 6, 9, 12,",
        ),
        (
            {"fsdp": 2, "context": 4},
            {"moe": {"latent_size": 12}},
            r"parallel\.fsdp=2 \* parallel\.context=4 \(8 devices\) does not divide model\.moe\.latent_size \(12\): "
            r"their product may be one of 1, 2, 3, 4, 6, 12\.",
        ),
        (
            {"tensor": 2},
            {"intermediate_size": 49},
            r"tensor=2 .* model\.intermediate_size \(49\): .* one of 1, 7, 49\.",
        ),
        (
            {"tensor": 2},
            {"moe": {"intermediate_size": 25}},
            r"tensor=2 .* model\.moe\.intermediate_size \(25\): .* 1, 5, 25",
        ),
        (
            {"tensor": 2},
            {"moe": {"shared_intermediate_size": 33}},
            r"tensor=2 .* model\.moe\.shared_intermediate_size \(33\): .* 1, 3, 11, 33",
        ),
    ],
)
def test_models_that_do_not_fit(axes, changes, message):
    parts = {k: dataclasses.replace(getattr(TINY, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=message):
        check_model(dataclasses.replace(TINY, **parts), mesh(**axes))


def test_what_a_pattern_has_not_need_not_fit():
    check_model(dataclasses.replace(TINY, pattern="-E", mtp=None), mesh(tensor=8))
    check_model(dataclasses.replace(TINY, pattern="M*", mtp=None, intermediate_size=49), mesh(tensor=2))
    check_model(dataclasses.replace(TINY, vocab_size=65), mesh(fsdp=4, tensor=2))  # stays whole
    check_model(dataclasses.replace(TINY, pattern="*", mtp=None), mesh(tensor=4))  # two key/value heads, four devices


@pytest.mark.parametrize("name", ["nano", "super", "ultra", "quickstart"])
@pytest.mark.parametrize("axes", [{"tensor": 8}, {"expert": 8}, {"tensor": 4, "expert": 2}, {"tensor": 2}])
def test_presets_fit(name, axes):
    check_model(PRESETS[name], mesh(**axes))


@pytest.mark.parametrize(
    ("axes", "rows", "tokens", "message"),
    [
        (
            {"fsdp": 4, "expert": 2},
            12,
            32,
            r"ROWS is 12 .* 8 .* \(data=1, fsdp=4, expert=2\): .* multiple of 8",
        ),
        (
            {"context": 8},
            8,
            12,
            r"TOKENS \(12\) .* parallel\.context \(8\): make it 8 or 16, .* of 1, 2, 3, 4, 6, 12",
        ),
        ({"context": 8}, 8, 16, r"leaves 2 tokens of TOKENS \(16\) .* reads 3 tokens before each: at most 5"),
    ],
)
def test_batches_that_do_not_fit(axes, rows, tokens, message):
    names = {"rows_name": "ROWS", "seq_name": "TOKENS"}
    with pytest.raises(ConfigError, match=message):
        check_batch(TINY, mesh(**axes), rows=rows, seq_len=tokens, **names)
    check_batch(TINY, mesh(**axes), rows=8, seq_len=32, **names)


def test_the_command_says_so_and_exits_2(tmp_path):
    """Before anything is written, on a machine of 8 devices."""

    def train(*flags):
        command = [
            sys.executable,
            "train.py",
            "--config=configs/quickstart.py",
            f"--workdir={tmp_path / 'run'}",
            *flags,
        ]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = train(
        "--config.parallel.expert=8", "--config.model.moe.num_experts=12", "--config.train.global_batch_size=8"
    )
    assert done.returncode == 2
    assert "parallel.expert=8 does not divide model.moe.num_experts (12)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    done = train("--config.parallel.fsdp=3")
    assert done.returncode == 2 and "there are 8" in done.stderr and "such as fsdp=2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_blocks_of_a_quantised_expert_stay_on_a_device():
    """Half of 48 channels is a block and a half of NVFP4."""
    model = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, intermediate_size=48))
    with pytest.raises(
        ConfigError, match=r"tensor=2 .*intermediate_size \(48\) into parts of whole blocks of 16, .* 1, 3"
    ):
        check_model(model, mesh(tensor=2), block_of("nvfp4"))
    check_model(model, mesh(tensor=2), block_of("fp8"))
    check_model(model, mesh(tensor=2), block_of("bfloat16"))
    check_model(model, mesh(fsdp=2), block_of("nvfp4"))
    for precision in (PrecisionConfig("nvfp4"), PrecisionConfig("fp8", switch_at=2, switch_to="nvfp4")):
        with pytest.raises(ConfigError, match="whole blocks of 16"):
            check_mesh(dataclasses.replace(tiny_run(model=model), precision=precision), mesh(tensor=2))
