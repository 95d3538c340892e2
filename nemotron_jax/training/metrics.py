"""What a run writes down: a row of metrics.jsonl and a TensorBoard event for each logged step.

Both are appended with one unbuffered write a row, so what log() has written is in the hands of the operating system:
killing the process loses none of it, at the price of one system call. Nothing is synced to the disk (that could stall
a step by tens of milliseconds on a network file system), so a power cut may cost the last seconds of the log.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import time
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


class MetricsLog:
    """The log of one run in its working directory, as rows of metrics.jsonl and TensorBoard scalars.

    A resumed run first takes out the rows of the steps that it is going to repeat. A run that starts anew
    (``resume_step`` 0) has no rows yet, so whatever an attempt that never reached a checkpoint has left goes as well.
    """

    def __init__(self, workdir: Path, *, resume_step: int, write: bool) -> None:
        """
        Args:
          resume_step: step of the restored checkpoint, 0 for a new run.
          write: whether this process logs (process 0 of a run); otherwise log() does nothing.

        Raises:
          OSError: the directory cannot be written to.
        """
        self._folder = workdir / TENSORBOARD_DIR
        self._resume_step = resume_step
        self._rows: io.FileIO | None = None  # stays None in the processes that write nothing
        self._events: io.FileIO | None = None
        if write:
            workdir.mkdir(parents=True, exist_ok=True)
            _remove_rows_after(workdir / METRICS_FILE, resume_step)
            self._rows = io.FileIO(workdir / METRICS_FILE, "ab")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Writes one row: ``{"step": step, **values}``.

        JSON has no word for a number that is not finite: it becomes null, and the key ``non_finite`` lists the names
        of the values that were (or hold) such a number. TensorBoard gets the scalars, as they are.

        Args:
          values: numbers, lists of numbers, text or None, by name; arrays of numpy and jax count as what they hold.

        Raises:
          TypeError: a value that JSON cannot hold.
          ValueError: log() after close().
          OSError: no room left on the disk, say. What was logged before stays whole.
        """
        if self._rows is None:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        row = {"step": int(step)} | {name: _finite(value) for name, value in plain.items()}
        if non_finite := [name for name, value in plain.items() if row[name] != value]:
            row["non_finite"] = non_finite
        _append(self._rows, json.dumps(row, allow_nan=False).encode() + b"\n")
        scalars = {name: value for name, value in plain.items() if isinstance(value, int | float)}
        if self._events is None:  # not before there is something to say: the import costs a tenth of a second
            self._events = _open_events(self._folder, self._resume_step)
        _append(self._events, _scalars_event(row["step"], scalars))

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        for file in (self._rows, self._events):
            if file is not None:
                file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in the order of the file; none where there is no file.

    A line that is no row (what a kill or a power cut has left of one) is passed over.
    """
    try:
        with open(path, "rb") as file:
            return [row for line in file if (row := _parse(line)) is not None]
    except FileNotFoundError:
        return []


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row that a line of the file holds; None where it is no whole row."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # not JSON, or not even UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _remove_rows_after(path: Path, step: int) -> None:
    """Takes out the rows after a step (all of them for step 0), and what is no row; the others stay byte for byte.

    The file is replaced as a whole or not at all.
    """
    if not path.exists():
        return
    partial = path.with_name(f".{path.name}.partial")
    removed = False
    try:
        with open(path, "rb") as old, open(partial, "wb") as new:
            for line in old:
                row = _parse(line)
                if row is not None and 0 < step >= row["step"]:
                    new.write(line)
                else:
                    removed = True
            new.flush()
            os.fsync(new.fileno())
        if removed:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _append(file: io.FileIO, data: bytes) -> None:
    """Writes all of the data or none of it: half a row would spoil the next one, too."""
    start = file.tell()
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(start)
        raise


def _plain(value: Any) -> Any:
    """Python numbers and lists in place of the numbers and arrays of numpy and jax; floats keep their exact value."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# TensorBoard. tensorboardX gives the message types and the checksum. Its SummaryWriter is not used: it hands events to
# a thread through a short queue, which loses up to two minutes of them in a kill, and stops the run for ever once the
# thread has died of a full disk. An event file is a sequence of: length (uint64), checksum of these 8 bytes (uint32),
# message, checksum of the message (uint32), little-endian.


def _open_events(folder: Path, resume_step: int) -> io.FileIO:
    """A new event file; TensorBoard drops what the files before it say about the steps after ``resume_step``."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(exist_ok=True)
    now = time.time()
    # TensorBoard reads the files of a folder in the order of their names.
    file = io.FileIO(folder / f"events.out.tfevents.{time.time_ns()}", "xb")
    _append(file, _record(Event(wall_time=now, file_version="brain.Event:2")))
    first_replaced = resume_step + 1 if resume_step else 0  # START drops the events of its own step, too
    start = SessionLog(status=SessionLog.START)
    _append(file, _record(Event(wall_time=now, step=first_replaced, session_log=start)))
    return file


def _scalars_event(step: int, scalars: dict[str, float]) -> bytes:
    from tensorboardX.proto.event_pb2 import Event

    event = Event(wall_time=time.time(), step=step)
    for name, value in scalars.items():
        event.summary.value.add(tag=name, simple_value=value)
    return _record(event)


def _record(event: Any) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))
