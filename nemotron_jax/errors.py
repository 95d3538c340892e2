"""Errors that are the user's to mend: entry points print their message, without a traceback, and exit 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad config or input. The message says what was expected, what came and what to do."""


class ConfigError(UserError):
    """A flag, a config key or a config.json that does not make sense."""


class DataError(UserError):
    """A data file, blend or tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or working directory that cannot be used."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with the closest known name, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
