"""What the documentation tells users to run: it exists, and starts."""

import re
import subprocess
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from nemotron_jax import __main__ as front
from nemotron_jax.cli import parse_train_flags
from nemotron_jax.parallel.xla import OPTIONS, compiler_options

ROOT = Path(__file__).parents[1]
SBATCH = (ROOT / "docs/train.sbatch").read_text()


def test_jax_knows_the_options_that_programs_on_several_gpus_are_compiled_with():
    """XLA of the CPU knows the options of GPUs, too, and refuses one that it does not know."""

    def compile_with(options: dict[str, bool | int]) -> None:
        jax.jit(lambda x: x + 1, compiler_options=options)(1.0)

    compile_with(OPTIONS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compile_with(OPTIONS | {"xla_gpu_enable_async_collectives": True})  # one that is gone
    text = (ROOT / "docs/scaling.md").read_text()
    for name, value in OPTIONS.items():
        assert f"`{name}={str(value).lower()}`" in text


def test_options_are_for_several_gpus_and_leave_what_the_user_set(monkeypatch):
    def mesh(platform: str, count: int) -> types.SimpleNamespace:
        devices = np.array([types.SimpleNamespace(platform=platform)] * count)
        return types.SimpleNamespace(devices=devices, size=count)

    assert compiler_options(mesh("gpu", 1)) is None and compiler_options(mesh("cpu", 8)) is None
    assert compiler_options(mesh("gpu", 8)) == OPTIONS
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    assert OPTIONS.keys() - compiler_options(mesh("gpu", 8)).keys() == {"xla_gpu_enable_latency_hiding_scheduler"}


def test_the_job_script_starts_a_run():
    assert subprocess.run(["bash", "-n", ROOT / "docs/train.sbatch"]).returncode == 0
    (command,) = re.findall(r"train\.py ((?:.*\\\n)*.*)$", SBATCH, re.MULTILINE)
    command = command.replace("\\\n", " ").replace('"$@"', "")
    command = re.sub(r'"\$\{(\w+):\?.*?\}"', r"/tmp/\1", command)
    config, workdir, processes = parse_train_flags(command.split())
    assert workdir == Path("/tmp/WORKDIR") and processes.count is None
    assert config.parallel.fsdp * config.parallel.expert == 64


@pytest.mark.parametrize("page", ["README.md", "docs/scaling.md"])
def test_commands_and_files_of_the_pages_exist(page):
    text = (ROOT / page).read_text()
    for command in re.findall(r"python -m nemotron_jax (\w+)", text):
        assert command in front.COMMANDS, command
    for file in re.findall(r"\b(?:docs|configs)/[\w./]+\.\w+", text):
        assert (ROOT / file).exists() or "NAME" in file, file
