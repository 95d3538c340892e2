"""What the documentation tells users to run: it exists, and starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_jax import __main__ as front
from nemotron_jax.cli import parse_train_flags

ROOT = Path(__file__).parents[1]
SBATCH = (ROOT / "docs/train.sbatch").read_text()


def test_jax_knows_the_flags_of_the_job_script():
    """XLA of the CPU knows the flags of GPUs, too, and ends the process at one that it does not know."""
    (flags,) = re.findall(r'^export XLA_FLAGS="(.*)"$', SBATCH, re.MULTILINE)
    assert "xla_gpu" in flags

    def start(flags: str) -> int:
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        code = "import jax; jax.devices()"
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode

    assert start(flags) == 0
    assert start(f"{flags} --xla_gpu_enable_async_collectives=true") != 0  # one that is gone


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
