"""The door: command lines and config files become frozen dataclasses, and users' mistakes become one line and exit 2.

Nothing here imports JAX, so that a mistyped flag is answered at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nemotron_jax.config import PRESETS, ModelConfig
from nemotron_jax.errors import ConfigError, UserError, did_you_mean
from nemotron_jax.run_config import GROUPS, MODEL_SECTIONS, ParallelConfig, Processes, RunConfig, field_types, from_dict

if TYPE_CHECKING:
    from ml_collections import ConfigDict

PREFIX = "config."  # of the flags that set a key of the config


def main(run: Callable[[Sequence[str]], int]) -> NoReturn:
    """Ends the process with what ``run(arguments)`` returns; a UserError is its message on stderr and exit code 2.

    Any other exception is a bug and keeps its traceback.
    """
    try:
        code = run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse with spelled-out flags only, and UserError (with a suggestion for an unknown flag) for every mistake."""

    def __init__(self, prog: str, description: str | None, **settings: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=formatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The values by name. Which flags a command needs is for ``require`` to say: unknown flags come first."""
        values, left = self.parse_known_args(args, namespace)
        left = [argument for argument in left if argument != "--"]
        for argument in left:
            if argument.startswith("--"):
                raise UserError(self._unknown(argument.partition("=")[0]))
        if left:
            raise UserError(f"unexpected argument {left[0]!r}: flags are --name=value. {self.prog} --help lists them.")
        return values

    def require(self, values: argparse.Namespace, *names: str, what: str = "") -> None:
        """Raises UserError unless these flags were given, and not as empty text."""
        flags = {action.dest: action for action in self._actions}
        missing = [flags[name] for name in names if getattr(values, name, None) in (None, "")]
        if missing:
            shown = " and ".join(f"{action.option_strings[0]}={action.metavar} ({action.help})" for action in missing)
            raise UserError(f"{what or self.prog} needs {shown}.")

    def _unknown(self, flag: str) -> str:
        known = [name for action in self._actions for name in action.option_strings]
        tail = "." + flag.removeprefix("--")  # --steps and --train.steps mean --config.train.steps
        meant = min((name for name in known if name.endswith(tail)), key=len, default=flag)
        hint = did_you_mean(meant, known)
        what = f"config key {flag.removeprefix(f'--{PREFIX}')}" if flag.startswith(f"--{PREFIX}") else f"flag {flag}"
        return f"unknown {what}.{hint or f' {self.prog} --help lists the known ones.'}"


def number(kind: type, *, least: float, name: str) -> Callable[[str], Any]:
    """An argparse type: ``name`` says in words what is accepted."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:
            raise argparse.ArgumentTypeError(f"expected {name}, got {text!r}")
        return value

    return parse


def one_of(*known: str) -> Callable[[str], str]:
    """An argparse type: a word of a list, with a suggestion for a mistyped one."""

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(
                f"expected one of {', '.join(known)}, got {text!r}.{did_you_mean(text, known)}"
            )
        return text

    return parse


def mesh_axes(text: str) -> dict[str, int]:
    """An argparse type: ``fsdp=4,expert=2`` -> the size of each axis given (-1: the devices that are left)."""
    known = [name for name, kind in field_types(ParallelConfig).items() if kind is int]
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in known or not size.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(
                f"expected AXIS=N,... with axes of {', '.join(known)}, got {text!r}.{did_you_mean(axis, known)}"
            )
        sizes[axis] = int(size)
    return sizes


def target(text: str) -> tuple[str, int]:
    """An argparse type: ``h200:64`` -> a GPU to compile for, and how many of them (1 unless said)."""
    name, _, count = text.partition(":")
    known = ("h200", "b200")
    sizes = (*range(1, 9), *range(16, 4097, 8))
    if name not in known or (count and not count.isdecimal()) or int(count or 1) not in sizes:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(known)}, and after a colon 1 to 8 devices or a multiple of 8, got {text!r}"
        )
    return name, int(count or 1)


def existing_path(text: str) -> Path:
    """An argparse type; that it holds what it should is for its reader to say."""
    path = Path(text).expanduser()
    if not text or not os.path.exists(path):  # Path.exists raises for names that are too long
        raise argparse.ArgumentTypeError(f"there is no {text!r}")
    return path


def output_file(text: str) -> Path:
    """An argparse type: a file that can be written, so that hours of work are not lost for want of a folder."""
    path = Path(text).expanduser()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return path


def address(text: str) -> str:
    """An argparse type: ``HOST:PORT``."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, such as node1:12345, got {text!r}")
    return text


def parse_train_flags(argv: Sequence[str], description: str | None = None) -> tuple[RunConfig, Path, Processes]:
    """The run, the working directory and the processes that the arguments of train.py name.

    ``--help`` prints and exits 0.

    Raises:
      UserError: unknown or missing flags, values of the wrong type, a config file that does not load, or sizes that do
        not fit together.
    """
    keys = config_keys()
    parser = Parser("train.py", description, epilog=_keys_help(keys))
    parser.add_argument("--config", metavar="FILE", help="a Python file with get_config(), see configs/")
    parser.add_argument("--workdir", metavar="DIR", help="where the run keeps everything; the same one resumes it")
    where = "where process 0 listens; with --processes and --process, for many processes without a launcher"
    parser.add_argument("--coordinator", type=address, metavar="HOST:PORT", help=where)
    positive, natural = (number(int, least=least, name=f"a whole number from {least}") for least in (1, 0))
    parser.add_argument("--processes", type=positive, metavar="N", help="how many there are (1: no others)")
    parser.add_argument("--process", type=natural, metavar="I", help="which of them this is, from 0")
    for key, (kind, _) in keys.items():
        optional: dict[str, Any] = {"nargs": "?", "const": True} if kind is bool else {}
        default = argparse.SUPPRESS
        parser.add_argument(f"--{PREFIX}{key}", type=PARSERS[kind], default=default, help=argparse.SUPPRESS, **optional)
    given = parser.parse_args(argv)
    parser.require(given, "config", "workdir")
    values = load_config_file(given.config)
    for key in keys:
        if f"{PREFIX}{key}" in given:
            _set(values, key, getattr(given, f"{PREFIX}{key}"))
    processes = Processes(given.coordinator, given.processes, given.process)
    return from_dict(values), Path(given.workdir).expanduser(), processes


def load_config_file(name: str) -> dict[str, Any]:
    """What ``get_config()`` of a Python file returns, as nested dicts.

    Raises:
      ConfigError: the file is missing, fails, or has no get_config() that returns a ConfigDict.
    """
    from ml_collections import ConfigDict

    path = Path(name).expanduser()
    try:
        source = path.read_bytes()
    except OSError as error:
        known = sorted(file.as_posix() for folder in {path.parent, Path("configs")} for file in folder.glob("*.py"))
        raise ConfigError(f"--config={name} cannot be read: {error.strerror}.{did_you_mean(name, known)}") from error
    # Not imported: that would leave compiled files behind, and could find an older one.
    module = types.ModuleType("config_file")
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
        get_config = getattr(module, "get_config", None)
        config = get_config() if callable(get_config) else None
    except UserError:
        raise
    except Exception as error:  # whatever a user's file may do
        raise ConfigError(f"{_where(error, path)}: {type(error).__name__}: {_one_line(error)}") from error
    if not callable(get_config):
        raise ConfigError(f"{path} has no function get_config(): see configs/quickstart.py for one.")
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path}: get_config() must return a ConfigDict, best that of nemotron_jax.cli.base_config(), "
            f"got {type(config).__name__}."
        )
    return config.to_dict()


def _where(error: Exception, path: Path) -> str:
    """``file:line``, with the innermost line of the config file itself."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            line = step.tb_lineno
        step = step.tb_next
    return str(path) if line is None else f"{path}:{line}"


def _one_line(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, AttributeError):  # of a ConfigDict: a quoted message, with a list of keys in its middle
        text = text.strip("'").replace("\\'", "'").replace("\\n", " ")
        text = re.sub(r"\s+Other fields present: .*?(?=\s+Did you mean|$)", "", text, flags=re.DOTALL)
    return " ".join(text.split())


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        if not isinstance(values.get(group), dict):  # a config file need not have every group
            values[group] = {}
        values = values[group]
    values[last] = value


def config_keys() -> dict[str, tuple[type, Any]]:
    """(type, default) of every key of a config by its dotted name; None: as the preset has it."""
    keys: dict[str, tuple[type, Any]] = {"model.preset": (str, None)}
    for name, kind in field_types(ModelConfig).items():
        if name in MODEL_SECTIONS:
            keys |= {f"model.{name}.{key}": (inner, None) for key, inner in field_types(MODEL_SECTIONS[name]).items()}
        elif name != "hf_extra":  # what a Hugging Face config.json brought along; nothing to choose
            keys[f"model.{name}"] = (kind, None)
    for group, cls in GROUPS.items():
        defaults = cls()
        keys |= {f"{group}.{key}": (kind, getattr(defaults, key)) for key, kind in field_types(cls).items()}
    return keys


def base_config() -> ConfigDict:
    """Every key with its default, for a config file to change: a misspelt key or a value of another type raises.

    Keys of ``model`` are empty: what is not set is as in the preset that ``model.preset`` names.
    """
    from ml_collections import config_dict

    values: dict[str, Any] = {}
    for key, (kind, default) in config_keys().items():
        _set(values, key, config_dict.placeholder(kind) if default is None else default)
    return config_dict.ConfigDict(values).lock()


def _truth(text: str) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return words[text.lower()]


PARSERS: dict[type, Callable[[str], Any]] = {
    bool: _truth,
    int: number(int, least=float("-inf"), name="a whole number"),
    float: number(float, least=float("-inf"), name="a number"),
    str: str,
}


def _keys_help(keys: dict[str, tuple[type, Any]]) -> str:
    lines = [
        "Every key of the config is a flag. The defaults are those of a key that the config file does not set.",
        f"model.preset is one of {', '.join(PRESETS)}; other keys of the model are as in the preset by default.\n",
    ]
    for key, (kind, default) in keys.items():
        lines.append(f"  --{PREFIX}{key}={kind.__name__.upper() if default is None else default}")
    return "\n".join(lines)
