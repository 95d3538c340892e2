"""kill -9 at random moments: the same command goes on, and every loss is bit for bit that of an undisturbed run."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import QUICK_FLAGS

ROOT = Path(__file__).parents[1]
STEPS = 24
FLAGS = QUICK_FLAGS | {"train.steps": STEPS, "train.validate_every": 6, "checkpoint.every": 3}


class Command:
    """``python train.py`` as a user starts it, in a working directory."""

    def __init__(self, environment, text, workdir, **flags):
        self.environment, self.workdir = environment, workdir
        flags = FLAGS | {"data.files": f"{text}/*.txt"} | flags
        self.arguments = [
            sys.executable,
            "train.py",
            "--config=configs/quickstart.py",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in flags.items()),
        ]

    def start(self):
        return subprocess.Popen(
            self.arguments, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self):
        process = self.start()
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def losses(self):
        rows = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        keys = ("loss", "validation_loss", "mtp_loss_1", "grad_norm")
        return [(row["step"], {key: row[key] for key in keys if key in row}) for row in rows]

    def logged_steps(self):
        file = self.workdir / "metrics.jsonl"
        return file.read_bytes().count(b'"loss"') if file.exists() else 0

    def saving(self):
        folder = self.workdir / "checkpoints"
        found = folder.iterdir() if folder.is_dir() else ()
        return any(path.is_dir() and not (path / "commit_success.txt").exists() for path in found)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    for number in range(40):
        words = generator.choices("def return import class for in if else while try".split(), k=80)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    import os

    environment = os.environ | {"XLA_FLAGS": ""}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = Command(environment, text, tmp_path_factory.mktemp("runs") / "undisturbed")
    code, output = command.finish()
    assert code == 0, output
    return command


def wait_until(process, condition):
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.slow
def test_kill_9_at_random_moments(text, undisturbed, tmp_path, one_device_env):
    """Six kills of one run: before the first step, four at random steps, and one in the middle of a save."""
    command = Command(one_device_env, text, tmp_path / "run")
    seed = random.randrange(10**6)
    generator = random.Random(seed)
    moments = sorted(generator.sample(range(1, STEPS), 5))
    in_a_save = generator.randrange(1, 5)
    killed = []
    for number, moment in enumerate([0, *moments]):
        process = command.start()
        if number == 0:
            time.sleep(generator.uniform(0.5, 6))  # importing, reading data, compiling
            reached = process.poll() is None
        elif number == in_a_save:
            reached = wait_until(process, command.saving)
        else:
            reached = wait_until(process, lambda moment=moment: command.logged_steps() >= moment)
            time.sleep(generator.uniform(0, 0.05))
        process.kill()
        output, _ = process.communicate()
        assert reached or process.returncode == -signal.SIGKILL, (seed, output)
        killed.append(command.logged_steps())
    code, output = command.finish()
    assert code == 0, (seed, output)
    assert command.losses() == undisturbed.losses(), (seed, killed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75(number, text, undisturbed, tmp_path, one_device_env):
    command = Command(one_device_env, text, tmp_path / "run", **{"checkpoint.every": 1000})
    process = command.start()
    assert wait_until(process, lambda: command.logged_steps() >= 4)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert number.name in output and "Run the same command again" in output
    code, output = command.finish()
    assert code == 0, output
    assert command.losses() == undisturbed.losses()


@pytest.mark.slow
def test_bad_input_of_the_whole_command(text, tmp_path, one_device_env):
    """One message, exit 2, no traceback, nothing half-written: through the real command."""
    cases = {
        "data.files": ("/nowhere/*.txt", "nowhere"),
        "model.pattern": ("ME?", "position 2"),
        "model.attention.num_kv_heads": (3, "multiple"),
        "model.mamba.num_groups": (3, "multiple"),
        "model.vocab_size": (300, "400"),
        "train.trainable": ("-nothing/*", "matches no parameter"),
        "parallel.tensor": (3, "devices"),
    }
    for key, (value, message) in cases.items():
        workdir = tmp_path / key
        code, output = Command(one_device_env, text, workdir, **{key: value}).finish()
        assert code == 2, (key, output)
        assert "error: " in output and message in output and "Traceback" not in output, (key, output)
        assert not workdir.exists(), key


@pytest.mark.slow
def test_a_full_disk_during_a_save(text, tmp_path, one_device_env):
    """The run ends with a message and exit 2; with room again, it goes on from the checkpoint before."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        command = Command(one_device_env, text, disk / "run", **{"checkpoint.keep": 100})
        code, output = command.finish()
        assert code == 2, output
        assert "The disk is full" in output and "Traceback" not in output
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        code, output = command.finish()
        assert code == 0, output
        assert "damaged" not in output
        assert [step for step, _ in command.losses()] == sorted(step for step, _ in command.losses())
    finally:
        subprocess.run(["umount", disk], check=True)
