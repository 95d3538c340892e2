"""NVIDIA's blend files: which data sets a run draws from, and how much from each.

  {"datasets": [{"name": "code", "path": "/data/code/*.parquet", "subset": "", "text_field": "text", "weight": 2.2}]}

The keys are those of NVIDIA's Nemotron recipes (src/nemotron/data_prep/blend.py); keys that begin with "_" are
comments, as in the published Super 3 blends. ``path`` is what data.files takes: a file, a glob, a .bin/.idx prefix or
``stdlib``. ``subset`` and ``split`` speak of the Hugging Face hub and do not matter to a local path. Weights are
shares of the tokens, in any unit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from nemotron_jax.errors import DataError, did_you_mean

REQUIRED = ("name", "path")
DEFAULTS = {"weight": 1.0, "split": None, "subset": None, "text_field": "text"}


@dataclasses.dataclass(frozen=True)
class Part:
    """One data set of a blend; the weights of a blend's parts add up to 1."""

    name: str
    path: str
    text_field: str
    weight: float


def read(path: str | os.PathLike[str]) -> list[Part]:
    """The parts of a blend file, those of weight 0 left out.

    Raises:
      DataError: no such file, not this JSON, an unknown or missing key, a data set still on the hub, bad weights.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: the blend cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{path}: expected a blend in JSON: {error}.") from error
    _check_keys(str(path), values, ("datasets",), {})
    entries = values["datasets"]
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{path}: expected "datasets" to be a list of at least one data set, got {entries!r}.')
    parts = [_part(f"{path}, data set {number}", entry) for number, entry in enumerate(entries, start=1)]
    names = [part.name for part in parts]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path}: expected a name of its own for each data set, got {sorted(doubled)} twice.")
    total = sum(part.weight for part in parts)
    if total <= 0:
        raise DataError(f"{path}: expected a weight above 0 for at least one data set, got only zeros.")
    return [dataclasses.replace(part, weight=part.weight / total) for part in parts if part.weight > 0]


def _part(where: str, entry: Any) -> Part:
    _check_keys(where, entry, REQUIRED, DEFAULTS)
    values = DEFAULTS | entry
    for key in ("name", "path", "text_field"):
        if not isinstance(values[key], str) or not values[key]:
            raise DataError(f'{where}: expected text for "{key}", got {values[key]!r}.')
    weight = values["weight"]
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight) or weight < 0:
        raise DataError(f'{where} ({values["name"]}): expected a "weight" of 0 or more, got {weight!r}.')
    if "://" in values["path"]:
        raise _not_local(where, values)
    return Part(values["name"], values["path"], values["text_field"], float(weight))


def _not_local(where: str, values: dict[str, Any]) -> DataError:
    scheme, _, rest = values["path"].partition("://")
    how = f" (hf download {rest} --repo-type dataset --local-dir DIR)" if scheme == "hf" else ""
    files = "/".join(("DIR", *((values["subset"],) if values["subset"] else ()), "**", "*.parquet"))
    return DataError(
        f"{where} ({values['name']}): expected a local path, got {values['path']}. Training reads local files only: "
        f'download the data first{how} and set "path" to its files, e.g. "{files}".'
    )


def _check_keys(where: str, values: Any, required: tuple[str, ...], optional: dict[str, Any]) -> None:
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected a JSON object, got {values!r}.")
    known = (*required, *optional)
    for key in values:
        if key not in known and not key.startswith("_"):
            raise DataError(f"{where}: unknown key {key!r}; known are {', '.join(known)}.{did_you_mean(key, known)}")
    for key in required:
        if key not in values:
            raise DataError(f"{where}: the key {key!r} is missing.")
