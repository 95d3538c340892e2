"""metrics.jsonl and TensorBoard: whole rows, at once, and no step twice."""

import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from nemotron_jax.training.metrics import MetricsLog, read_rows

ROOT = Path(__file__).parents[2]


def write_run(workdir: Path, steps: range, *, resume_step: int = 0, loss: float = 1.0) -> None:
    log = MetricsLog(workdir, resume_step=resume_step, write=True)
    for step in steps:
        log.log(step, {"loss": loss + step})
    log.close()


def steps_of(workdir: Path) -> list[int]:
    return [row["step"] for row in read_rows(workdir / "metrics.jsonl")]


def events_in(file: Path) -> list[Event]:
    """The messages of an event file, whose checksums must be right."""
    data, events = file.read_bytes(), []
    while data:
        (length,), (length_sum,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        message, (message_sum,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert (length_sum, message_sum) == (masked_crc32c(data[:8]), masked_crc32c(message))
        events.append(Event.FromString(message))
        data = data[16 + length :]
    return events


def tensorboard_shows(workdir: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} after TensorBoard's rule: a START event drops all that came before from its step on."""
    shown: dict[str, dict[int, float]] = {}
    for file in sorted((workdir / "tensorboard").iterdir()):
        first, *events = events_in(file)
        assert first.file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                shown = {tag: {s: v for s, v in points.items() if s < event.step} for tag, points in shown.items()}
            for value in event.summary.value:
                assert event.step not in shown.get(value.tag, {}), "a step twice"
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


def test_a_row_is_plain_json_with_exact_values(tmp_path):
    log = MetricsLog(tmp_path / "new", resume_step=0, write=True)
    log.log(np.int64(3), {
        "loss": np.float32(0.1), "grad_norm": jnp.float32(0.3), "skipped": jnp.int32(2), "learning_rate": 1e-3,
        "expert_load": jnp.array([[0.25, 0.75]]), "half": jnp.bfloat16(1.5), "note": "warm-up", "mfu": None,
    })  # fmt: skip
    text = (tmp_path / "new" / "metrics.jsonl").read_text()
    assert text.endswith("\n") and text.count("\n") == 1
    row = json.loads(text)
    assert list(row) == ["step", "loss", "grad_norm", "skipped", "learning_rate", "expert_load", "half", "note", "mfu"]
    assert (
        row["step"] == 3 and row["loss"] == float(np.float32(0.1)) and np.float32(row["grad_norm"]) == np.float32(0.3)
    )
    assert row["skipped"] == 2 and isinstance(row["skipped"], int) and row["expert_load"] == [[0.25, 0.75]]
    assert row["half"] == 1.5 and row["note"] == "warm-up" and row["mfu"] is None
    log.close()


def test_numbers_that_are_not_finite(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0, write=True)
    log.log(1, {"loss": jnp.float32(jnp.nan), "fine": 1.0, "load": [1.0, math.inf], "grad_norm": -math.inf})
    log.log(2, {"loss": 2.0})
    log.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first, parse_constant=refuse) == {
        "step": 1, "loss": None, "fine": 1.0, "load": [1.0, None], "grad_norm": None,
        "non_finite": ["loss", "load", "grad_norm"],
    }  # fmt: skip
    assert json.loads(second) == {"step": 2, "loss": 2.0}
    shown = tensorboard_shows(tmp_path)
    assert math.isnan(shown["loss"][1]) and shown["grad_norm"][1] == -math.inf and "load" not in shown


def test_tensorboard_holds_the_scalars(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0, write=True)
    log.log(10, {"loss": 2.5, "tokens": 4096, "note": "text", "expert_load": [1.0, 2.0], "mfu": None})
    log.log(20, {"validation_loss": jnp.float32(2.25)})
    assert tensorboard_shows(tmp_path) == {  # before close(): nothing waits in a buffer
        "loss": {10: 2.5},
        "tokens": {10: 4096.0},
        "validation_loss": {20: 2.25},
    }
    log.close()


def test_a_resumed_run_replaces_the_rows_after_its_checkpoint(tmp_path):
    write_run(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    write_run(tmp_path, range(5, 7), resume_step=4, loss=100.0)
    after = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert after[:4] == before[:4]
    assert [json.loads(line) for line in after[4:]] == [{"step": 5, "loss": 105.0}, {"step": 6, "loss": 106.0}]
    assert tensorboard_shows(tmp_path)["loss"] == {1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0, 5: 105.0, 6: 106.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_rows_that_stay_keep_their_bytes(tmp_path):
    kept = b'{ "loss":1e0,"step":2 }\n{"step": 2, "validation_loss": 1.50}\n'
    lost = b'{"step": 3, "loss": 1.0}\n\0\0\0\n[1, 2]\n{"loss": 1}\n\xff\n'
    (tmp_path / "metrics.jsonl").write_bytes(lost + kept + lost + b'{"step": 1, "los')
    MetricsLog(tmp_path, resume_step=2, write=True).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept


def test_a_torn_last_line_is_removed_even_where_it_could_be_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2}')  # its newline, and maybe more, never arrived
    assert [row["step"] for row in read_rows(file)] == [1]
    write_run(tmp_path, range(3, 4), resume_step=2)
    assert steps_of(tmp_path) == [1, 3]


def test_a_new_run_starts_with_an_empty_log(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0, write=True)
    for step in (0, 1, 2):
        log.log(step, {"loss": 1.0})
    log.close()
    write_run(tmp_path, range(2))
    assert steps_of(tmp_path) == [0, 1]
    assert tensorboard_shows(tmp_path)["loss"] == {0: 1.0, 1: 2.0}


def test_nothing_to_replace_leaves_the_file_alone(tmp_path):
    write_run(tmp_path, range(1, 4))
    file = tmp_path / "metrics.jsonl"
    before = file.stat()
    events = sorted((tmp_path / "tensorboard").iterdir())
    MetricsLog(tmp_path, resume_step=3, write=True).close()  # as when a finished run is started again
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted((tmp_path / "tensorboard").iterdir()) == events


def test_a_failure_while_rows_are_removed_leaves_them_all(tmp_path, monkeypatch):
    write_run(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        MetricsLog(tmp_path, resume_step=2, write=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_other_processes_write_nothing(tmp_path):
    write_run(tmp_path, range(1, 4))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    log = MetricsLog(tmp_path, resume_step=1, write=False)
    log.log(2, {"loss": 1.0})
    log.close()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_after_close(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0, write=True)
    log.close()
    log.close()
    with pytest.raises(ValueError, match="close"):
        log.log(1, {"loss": 1.0})


def test_no_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_full_disk_leaves_whole_rows(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0, write=True)
    log.log(1, {"loss": 1.0})
    file = tmp_path / "metrics.jsonl"
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 500, limits[1]))  # room for a part of the next row
    try:
        with pytest.raises(OSError):
            log.log(2, {"load": [0.125] * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    log.log(3, {"loss": 3.0})
    log.close()
    assert steps_of(tmp_path) == [1, 3]


def test_kill_9_loses_no_row(tmp_path):
    code = f"""
import itertools
from pathlib import Path
from nemotron_jax.training.metrics import MetricsLog
log = MetricsLog(Path({str(tmp_path)!r}), resume_step=0, write=True)
for step in itertools.count(1):
    log.log(step, {{"loss": 1 / step, "load": [0.5] * 100}})
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 200:
            process.send_signal(signal.SIGKILL)
            break
    logged = int((process.stdout.read().split() or [line])[-1])
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    steps = steps_of(tmp_path)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= logged
    # Up to a last event that the kill may have cut.
    file = next((tmp_path / "tensorboard").iterdir())
    whole = 0
    while len(data := file.read_bytes()[whole:]) > 12 and len(data) >= 16 + struct.unpack("<Q", data[:8])[0]:
        whole += 16 + struct.unpack("<Q", data[:8])[0]
    os.truncate(file, whole)
    assert set(range(1, logged + 1)) <= set(tensorboard_shows(tmp_path)["loss"])
    write_run(tmp_path, range(151, 161), resume_step=150)
    assert steps_of(tmp_path) == list(range(1, 161))


def test_importing_costs_little():
    code = "import sys, nemotron_jax.training.metrics; print({'tensorboardX', 'numpy', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
