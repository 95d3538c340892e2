"""Conversion of a checkpoint of several gigabytes in little memory: `pytest -m slow -s` prints the figures."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemotron_jax.checkpoint.convert import dry_run
from nemotron_jax.checkpoint.safetensors import DTYPES, SafetensorsFile, ShardWriter
from nemotron_jax.config import preset
from nemotron_jax.hf_config import to_hf

ROOT = Path(__file__).parents[2]
CONFIG = dataclasses.replace(preset("nano"), pattern="MEM*E")  # widths of Nano: 6.8 GB
LIMIT = 3e9  # bytes of memory


def make(directory: Path) -> int:
    """Random finite weights of CONFIG; returns their bytes."""
    directory.mkdir()
    random = (np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02).astype(DTYPES["BF16"])
    writer = ShardWriter(directory, tensors := dry_run(CONFIG, None, None))
    for number, tensor in enumerate(tensors):
        size = int(np.prod(tensor.shape))
        for first in range(0, size, len(random)):
            part = np.roll(random[: size - first], number)
            writer.write(tensor.name, part.astype(DTYPES[tensor.dtype], copy=False), first)
    writer.finish()
    (directory / "config.json").write_text(json.dumps(to_hf(CONFIG)))
    return sum(tensor.nbytes for tensor in tensors)


def run(*arguments: object) -> int:
    """Runs the command; returns its peak memory in bytes."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "nemotron_jax", "convert", *map(str, arguments)], cwd=ROOT, env=environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    peak = usage.ru_maxrss * 1024
    print(f"peak memory {peak / 1e9:.2f} GB")
    return peak


def same(a: Path, b: Path) -> bool:
    """Whether two directories hold the same tensors, looked at one by one."""

    def places(directory: Path):
        files = [SafetensorsFile(path) for path in directory.glob("*.safetensors")]
        return {name: (file, tensor.dtype) for file in files for name, tensor in file.tensors.items()}

    ours, theirs = places(a), places(b)
    return ours.keys() == theirs.keys() and all(
        dtype == theirs[name][1] and file.array(name).tobytes() == theirs[name][0].array(name).tobytes()
        for name, (file, dtype) in ours.items()
    )


@pytest.mark.slow
def test_peak_memory_both_ways(tmp_path):
    if shutil.disk_usage(tmp_path).free < 22e9:
        pytest.skip("needs 22 GB of disk")
    assert make(tmp_path / "hf") > 6e9
    try:
        assert run(tmp_path / "hf", tmp_path / "run") < LIMIT
        assert run(tmp_path / "run", tmp_path / "back") < LIMIT
        assert same(tmp_path / "hf", tmp_path / "back")
    finally:
        for name in ("hf", "run", "back"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
