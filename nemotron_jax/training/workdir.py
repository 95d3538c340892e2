"""The working directory of a run: created, compared with the run that is in it, written to safely."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from nemotron_jax.checkpoint.load import CONFIG_FILE, TOKENIZER_FILE
from nemotron_jax.checkpoint.store import read_json
from nemotron_jax.errors import CheckpointError, ConfigError
from nemotron_jax.run_config import RunConfig, differing_keys, to_dict

DATA_CACHE = "data"  # tokens and tokenizer of the run


@contextlib.contextmanager
def claim(workdir: Path, config: RunConfig, *, write: bool) -> Iterator[None]:
    """Makes the directory, or checks that the run in it is this one; config.json is written at the end of the block.

    ``log.*``, ``checkpoint.*`` and ``parallel.*`` may change between the parts of a run, and ``train.steps`` may grow.
    The block does what may still be refused: where it fails, a directory that was new is left as it was found.

    Args:
      write: whether this process writes (process 0 of a run).

    Raises:
      CheckpointError: the directory cannot be written to.
      ConfigError: the directory holds a run with another config (the message lists the keys), or is on another disk
        than that of process 0.
    """
    values = json.loads(json.dumps(to_dict(config)))
    file = workdir / CONFIG_FILE
    known = file.exists()
    if not write and not known:  # process 0, whose turn was before, has written it
        raise ConfigError(
            f"--workdir={workdir}: what process 0 has written there is not to be seen from process "
            f"{jax.process_index()}: it must be on a disk that all processes share."
        )
    if known:
        _compare(workdir, read_json(file, "the config of a training run"), values)
    existed = workdir.is_dir()
    made_here = [name for name in (DATA_CACHE, TOKENIZER_FILE) if not (workdir / name).exists()]
    with writing(workdir):
        if write:
            workdir.mkdir(parents=True, exist_ok=True)
            write_atomically(workdir / ".writable", "")
            (workdir / ".writable").unlink()
    try:
        yield
    except BaseException:
        if write and not known:
            if DATA_CACHE in made_here:
                shutil.rmtree(workdir / DATA_CACHE, ignore_errors=True)
            if TOKENIZER_FILE in made_here:
                (workdir / TOKENIZER_FILE).unlink(missing_ok=True)
            if not existed:
                with contextlib.suppress(OSError):  # not empty: somebody else's files
                    workdir.rmdir()
        raise
    if write:
        with writing(workdir):
            write_atomically(file, json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Turns an OSError (no permission, no room) into a CheckpointError that names the directory."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"--workdir={workdir} cannot be written to ({error.strerror}): make room there, or choose another one."
        ) from error


def _compare(workdir: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    old_steps = old.get("train", {}).get("steps", 0)
    lines = [line for line in differing_keys(old, new) if not line.startswith(("log.", "checkpoint.", "parallel."))]
    if new["train"]["steps"] > old_steps:
        lines = [line for line in lines if not line.startswith("train.steps:")]
    if lines:
        raise ConfigError(
            f"--workdir={workdir} holds a run with another config; these keys differ (old -> new):\n  "
            + "\n  ".join(lines)
            + "\nUse the old values, or a new --workdir. "
            "Only log.*, checkpoint.*, parallel.* and a longer train.steps may change."
        )


def write_atomically(file: Path, text: str) -> None:
    """Replaces a file as a whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
