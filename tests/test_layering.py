"""Imports point one way (the table below), files stay short, and nothing is called utils."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part may import of the project, beside itself. A part is a package or module directly in nemotron_jax/.
CONFIG = {"config", "hf_config", "run_config", "errors"}
BELOW_MODEL = CONFIG | {"pallas_kernels", "precision", "parallel"}
BELOW_DISK = BELOW_MODEL | {"model"}
BELOW_RUNS = BELOW_DISK | {"checkpoint", "data"}
LAYERS: dict[str, set[str] | None] = {
    "pallas_kernels": set(),
    "errors": set(),
    "config": {"errors"},
    "hf_config": {"config", "errors"},
    "run_config": {"config", "hf_config", "errors"},
    "precision": CONFIG | {"pallas_kernels"},
    "parallel": CONFIG | {"pallas_kernels"},
    "model": BELOW_MODEL,
    "checkpoint": BELOW_DISK,
    "data": BELOW_DISK,
    "training": BELOW_RUNS,
    "inference": BELOW_RUNS,
    "evaluation": BELOW_RUNS | {"inference"},
    "rl": BELOW_RUNS | {"training", "inference"},
    "trace": {"errors"},
    "bench": BELOW_RUNS | {"training", "inference", "trace"},
    "cli": CONFIG,
    "__main__": None,  # an entry point: anything
    "__init__": None,  # anything, but inside functions: importing config must not import jax
}
# What each may import of other people's, beside the standard library. A part that is not listed: anything but
# absl flags and ConfigDict, which stop at the door (cli.py, entry points and configs/).
LIBRARIES = {part: set() for part in CONFIG} | {
    "pallas_kernels": {"jax", "numpy"},
    "cli": {"absl", "ml_collections"},
}
ONLY_AT_THE_DOOR = {"absl.app", "absl.flags", "ml_collections"}


def source_files() -> list[Path]:
    return sorted(path for folder in ("nemotron_jax", "pallas_kernels") for path in (ROOT / folder).rglob("*.py"))


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in `source`, wherever it stands; `package` resolves the relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


def part_of(module: str) -> str | None:
    """The part that a dotted module name belongs to; None for a library."""
    top, *rest = module.split(".")
    if top == "pallas_kernels":
        return top
    if top == "nemotron_jax":
        return rest[0] if rest and rest[0] in LAYERS else "__init__"
    return None


def violations(source: str, module: str, package: str) -> list[str]:
    part = part_of(module) if module != "nemotron_jax" else "__init__"
    allowed = LAYERS[part]
    if allowed is None:
        return []
    found = []
    for line, name in imported_modules(source, package):
        target, library = part_of(name), name.partition(".")[0]
        if target is not None:
            if target != part and target not in allowed:
                found.append(f"{module}:{line} imports {name}: {part} may import {sorted(allowed)} of this project")
        elif part in LIBRARIES:
            if library not in LIBRARIES[part] | sys.stdlib_module_names:
                found.append(
                    f"{module}:{line} imports {name}: {part} may import the standard library, {LIBRARIES[part]}"
                )
        elif any(f"{name}.".startswith(f"{door}.") for door in ONLY_AT_THE_DOOR):
            found.append(f"{module}:{line} imports {name}: flags and ConfigDict stop at the entry points")
    return found


def test_imports_point_one_way():
    found = []
    for path in source_files():
        names = path.relative_to(ROOT).with_suffix("").parts
        package = ".".join(names[:-1])
        module = package if names[-1] == "__init__" else ".".join(names)
        top_level_part = names[0] == "pallas_kernels" or names[1] in LAYERS
        assert top_level_part, f"{path.relative_to(ROOT)} is in no layer: put it into one, or add it to LAYERS"
        found += violations(path.read_text(), module, package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("nemotron_jax.model.mamba2", "from nemotron_jax.training.step import train_step", False),
        ("nemotron_jax.model.mamba2", "def f():\n    import nemotron_jax.training", False),
        ("nemotron_jax.model.mamba2", "if TYPE_CHECKING:\n    from nemotron_jax import training", False),
        ("nemotron_jax.model.mamba2", "from ..training import step", False),
        ("nemotron_jax.model.mamba2", "from .. import data", False),
        ("nemotron_jax.model.mamba2", "importlib.import_module('nemotron_jax.data')", False),
        ("nemotron_jax.model.mamba2", "import nemotron_jax", False),
        ("nemotron_jax.model.mamba2", "from nemotron_jax import load", False),
        ("nemotron_jax.model.mamba2", "from ml_collections import ConfigDict", False),
        ("nemotron_jax.model.mamba2", "from absl import flags", False),
        (
            "nemotron_jax.model.mamba2",
            "from . import linear\nfrom ..precision import matmul\nfrom absl import logging",
            True,
        ),
        (
            "nemotron_jax.model.mamba2",
            "import jax, pallas_kernels.ssd\nfrom nemotron_jax.config import ModelConfig",
            True,
        ),
        ("nemotron_jax.precision.matmul", "from nemotron_jax.parallel import mesh", False),
        ("nemotron_jax.checkpoint.hf", "from nemotron_jax.data import batch", False),
        ("nemotron_jax.training.loop", "from nemotron_jax.inference import decode", False),
        ("nemotron_jax.evaluation.score", "from nemotron_jax.inference import decode", True),
        ("nemotron_jax.evaluation.score", "from nemotron_jax.training import step", False),
        ("nemotron_jax.config", "import numpy", False),
        ("nemotron_jax.config", "import json, dataclasses\nfrom nemotron_jax.errors import ConfigError", True),
        ("nemotron_jax.errors", "from nemotron_jax.config import preset", False),
        ("nemotron_jax.cli", "import jax", False),
        ("nemotron_jax.cli", "from nemotron_jax.training import loop", False),
        (
            "nemotron_jax.cli",
            "from ml_collections import ConfigDict\nfrom nemotron_jax.run_config import RunConfig",
            True,
        ),
        ("nemotron_jax.training.loop", "from nemotron_jax import cli", False),
        ("pallas_kernels.ssd", "import flax", False),
        ("pallas_kernels.ssd", "from nemotron_jax.config import ModelConfig", False),
        ("pallas_kernels.ssd", "import jax.numpy as jnp\nfrom pallas_kernels.dispatch import choose", True),
        ("nemotron_jax.__main__", "from absl import app\nfrom nemotron_jax.training import loop", True),
    ],
)
def test_the_check_finds_a_violation(module, source, allowed):
    assert bool(violations(source, module, module.rpartition(".")[0])) != allowed


def test_config_and_command_line_import_no_jax_at_run_time():
    modules = ", ".join(f"nemotron_jax.{name}" for name in sorted(CONFIG | {"cli"}))
    code = f"import sys, {modules}; print(*sorted({{'jax', 'numpy', 'absl'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_files_are_short_and_say_what_they_hold():
    checked = [path for folder in ("configs", "tests") for path in (ROOT / folder).rglob("*.py")]
    checked += [*source_files(), *ROOT.glob("*.py")]
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in checked}
    assert not {name: count for name, count in lines.items() if count > 500}, "split them where a reader would"
    assert not [name for name in lines if name.rpartition("/")[2] in ("utils.py", "helpers.py", "common.py", "misc.py")]
