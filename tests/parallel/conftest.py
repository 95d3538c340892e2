"""Meshes of the 8 fake devices, and what a compiled program sends."""

import math
import re
from collections import Counter

import jax
import pytest

from nemotron_jax.bench import COLLECTIVES
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.run_config import ParallelConfig


@pytest.fixture
def eight():
    """Axes -> a mesh of all fake devices: ``eight(expert=8)``."""
    return lambda **axes: make_mesh(ParallelConfig(**{"data": 1, **axes}), jax.devices())


def collectives(function, *arguments) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    """(kind, shapes of the results on a device) of each collective of the compiled program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = []
    for results, kind in re.findall(rf"= (\(.*?\)|\S+) ({COLLECTIVES})(?:-start)?\(", text):
        dims = re.findall(r"\w+\[([\d,]*)\]", results)
        found.append((kind, tuple(tuple(map(int, filter(None, shape.split(",")))) for shape in dims)))
    return found


def kinds(found) -> dict[str, int]:
    return dict(Counter(kind for kind, _ in found))


def elements(found, kind: str) -> list[int]:
    """Numbers that each collective of a kind holds on a device, in ascending order."""
    return sorted(sum(math.prod(shape) for shape in shapes) for name, shapes in found if name == kind)
