"""Real processes on this host: the same losses as one process, checkpoints, signals, and lost peers.

On CPUs they talk through gloo; with ``-m gpu``, on two GPUs, through NCCL.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import nemotron_jax
from nemotron_jax.checkpoint.load import CHECKPOINTS
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.run_config import ParallelConfig
from tests.conftest import FAKE_DEVICES
from tests.tiny import QUICK_FLAGS

ROOT = Path(__file__).parents[1]
STEPS = 12
FLAGS = QUICK_FLAGS | {
    "train.steps": STEPS,
    "train.validate_every": 4,
    "optimizer.warmup_steps": 2,
    "checkpoint.every": 4,
}
ON_GPUS = {"precision.recipe": "float32"}  # bfloat16 would hide what is wrong by less than it rounds


class Run:
    """``python train.py`` in several processes of one CPU device each, in a working directory."""

    def __init__(self, text: Path, workdir: Path, port: int, count: int, **flags):
        self.workdir, self.port, self.count = workdir, port, count
        self.flags = FLAGS | {"data.files": f"{text}/*.txt"} | flags
        # As in conftest.py, what is compiled is quick to compile, and shared.
        self.environment = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace(FAKE_DEVICES, "")}
        self.processes: list[subprocess.Popen] = []

    def start(self) -> "Run":
        shared = [f"--config.{key}={value}" for key, value in self.flags.items()]
        for index in range(self.count):
            mine = ["--coordinator", f"127.0.0.1:{self.port}", f"--processes={self.count}", f"--process={index}"]
            arguments = ["train.py", "--config=configs/quickstart.py", f"--workdir={self.workdir}", *mine, *shared]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    env=self.environment_of(index),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return self

    def environment_of(self, index: int) -> dict[str, str]:
        return self.environment

    def wait_for_step(self, step: int) -> "Run":
        while all(process.poll() is None for process in self.processes):
            if any(row >= step for row in self.losses()):
                return self
            time.sleep(0.05)
        raise AssertionError(self.finish())

    def finish(self, seconds: float = 600) -> list[tuple[int, str]]:
        """(exit code, output) of each process."""
        try:
            outputs = [process.communicate(timeout=seconds)[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, output) for process, output in zip(self.processes, outputs, strict=True)]

    def losses(self) -> dict[int, float]:
        file = self.workdir / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        assert len({(row["step"], "loss" in row) for row in rows}) == len(rows), "a step is logged twice"
        return {row["step"]: row["loss"] for row in rows if "loss" in row}


class RunOnGPUs(Run):
    """One GPU a process; the tests' own process may hold most of their memory."""

    def environment_of(self, index: int) -> dict[str, str]:
        return self.environment | {"CUDA_VISIBLE_DEVICES": str(index), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    for number in range(40):
        words = generator.choices("def return import class for in if else while try".split(), k=80)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def run(text, workdir, port, count, kind=Run, **flags) -> Run:
    made = kind(text, workdir, port, count, **flags).start()
    for code, output in made.finish():
        assert code == 0, output
    return made


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The losses of an undisturbed run of one process."""
    losses = run(text, tmp_path_factory.mktemp("runs") / "alone", 1, 1).losses()
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def close(losses: dict[int, float], expected: dict[int, float]) -> bool:
    return losses.keys() == expected.keys() and np.allclose(
        list(losses.values()), [expected[step] for step in losses], rtol=0, atol=2e-5
    )


def test_two_processes_train_and_stop_together(text, tmp_path, unused_port):
    """Of a short run: one log, one set of files; a signal to process 1 saves, and both exit with 75."""
    short = {"model.pattern": "M", "model.mtp.depth": 0, "data.seq_len": 16}
    made = Run(text, tmp_path / "run", unused_port, 2, **short, **{"train.steps": 2000, "checkpoint.every": 10**6})
    made.start().wait_for_step(2)
    made.processes[1].send_signal(signal.SIGTERM)
    (first, shown), (second, silent) = made.finish()
    assert (first, second) == (75, 75), (shown, silent)
    assert "SIGTERM received: saved step" in shown and "2 process(es)" in shown
    assert "step" not in silent
    (saved,) = (tmp_path / "run" / CHECKPOINTS).iterdir()
    assert int(saved.name) == max(made.losses())


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(text, alone, tmp_path, unused_port):
    made = run(text, tmp_path / "run", unused_port, 2)
    assert close(made.losses(), alone)
    assert {"sample.txt", "loss.png", "tokenizer.json"} <= {path.name for path in made.workdir.iterdir()}
    assert len(list((made.workdir / "tensorboard").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "expert", "context", "tensor"])
def test_an_axis_may_go_over_processes(axis, text, alone, tmp_path, unused_port):
    made = run(text, tmp_path / "run", unused_port, 2, **{f"parallel.{axis}": 2})
    assert close(made.losses(), alone)


@pytest.mark.slow
def test_four_processes_save_and_others_go_on(text, alone, tmp_path, unused_port):
    """Stopped by a signal to one of four; one process and two, on other meshes, go on from the same bits."""
    four = {"parallel.fsdp": 2, "parallel.expert": 2, "checkpoint.every": 1000}
    made = Run(text, tmp_path / "four", unused_port, 4, **four).start().wait_for_step(3)
    made.processes[2].send_signal(signal.SIGINT)
    ends = made.finish()
    assert [code for code, _ in ends] == [75] * 4, ends
    (saved,) = (tmp_path / "four" / CHECKPOINTS).iterdir()
    step = int(saved.name)
    assert step < STEPS and json.loads((saved / "meta/metadata").read_text())["data"]["next_batch"] == step

    _, whole = nemotron_jax.load(tmp_path / "four")
    _, parts = nemotron_jax.load(tmp_path / "four", mesh=make_mesh(ParallelConfig(data=1, fsdp=2, tensor=4)))
    for left, right in zip(*(jax.tree.leaves(jax.device_get(_state(model))) for model in (whole, parts)), strict=True):
        np.testing.assert_array_equal(left, right)

    for count, flags in ((1, {}), (2, {"parallel.tensor": 2})):
        workdir = tmp_path / f"on {count}"
        shutil.copytree(tmp_path / "four", workdir)
        # Restoring compares the checksum of every tensor with that of the four processes.
        on = Run(text, workdir, unused_port, count, **flags, **{"checkpoint.every": 1000}).start()
        for code, output in on.finish():
            assert code == 0 and "damaged" not in output, output
        assert close(on.losses(), alone), (step, count)


@pytest.mark.slow
def test_a_part_of_a_checkpoint_is_damaged(text, tmp_path, unused_port):
    """Only one process reads that part; all of them go back to the step before."""
    made = run(text, tmp_path / "run", unused_port, 2, **{"parallel.fsdp": 2})
    before = made.losses()
    folder = made.workdir / CHECKPOINTS / str(STEPS) / "params/ocdbt.process_1/d"
    for file in folder.iterdir():
        os.truncate(file, 1000)
    again = Run(text, tmp_path / "run", unused_port, 2, **{"parallel.fsdp": 2}).start()
    (code, shown), (other, _) = again.finish(seconds=300)
    assert code == other == 0 and f"checkpoint {STEPS} in" in shown and "is damaged" in shown, shown
    assert again.losses() == before


def _state(model):
    from flax import nnx

    return nnx.state(model)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim, text, tmp_path, unused_port):
    """Within 60 s, with a message; and the same command goes on, bit for bit as if nothing had happened."""
    undisturbed = run(text, tmp_path / "undisturbed", unused_port, 2)
    made = Run(text, tmp_path / "run", unused_port, 2).start().wait_for_step(6)
    made.processes[victim].kill()
    started = time.monotonic()
    ends = made.finish(seconds=60)
    assert time.monotonic() - started < 60
    code, output = ends[1 - victim]
    assert code not in (0, 2, 3, 75), output
    assert "has lost another process" in output or "another task died" in output, output
    again = run(text, tmp_path / "run", unused_port, 2)
    assert again.losses() == undisturbed.losses()


@pytest.mark.slow
def test_a_stopped_process_is_noticed(text, tmp_path, unused_port):
    """It keeps its connections and says nothing: heartbeats find it."""
    made = Run(text, tmp_path / "run", unused_port, 2, **{"train.steps": 10000}).start().wait_for_step(3)
    made.processes[1].send_signal(signal.SIGSTOP)
    code = made.processes[0].wait(timeout=75)
    made.processes[1].kill()
    ((_, output), _) = made.finish()
    assert code not in (0, 2, 3, 75) and "died" in output, output


@pytest.mark.slow
def test_bad_data_end_all_processes(text, tmp_path, unused_port):
    """What process 0 finds is an error of all, and nothing is left behind."""
    made = Run(text, tmp_path / "run", unused_port, 2, **{"data.files": "/nowhere/*.txt"}).start()
    ends = made.finish()
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("nowhere" in output and "Traceback" not in output for _, output in ends), ends
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def alone_on_a_gpu(text, tmp_path_factory):
    if jax.default_backend() != "gpu" or jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    workdir = tmp_path_factory.mktemp("runs") / "alone on a GPU"
    return run(text, workdir, 1, 1, RunOnGPUs, **ON_GPUS).losses()


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["data", "fsdp", "expert"])
def test_two_gpus_of_two_processes_have_the_losses_of_one(axis, text, alone_on_a_gpu, tmp_path, unused_port):
    """Sums of a GPU are taken in another order, and twelve steps of Adam enlarge the difference."""
    flags = ON_GPUS | {f"parallel.{axis}": 2}
    made = RunOnGPUs(text, tmp_path / "run", unused_port, 2, **flags).start()
    (first, shown), (second, silent) = made.finish()
    assert (first, second) == (0, 0), (shown, silent)
    assert "2 process(es)" in shown and "NVIDIA" in shown
    losses, expected = made.losses(), alone_on_a_gpu
    assert losses.keys() == expected.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(losses[1], expected[1], rtol=1e-5)
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-3)
