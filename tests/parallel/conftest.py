"""Meshes of the 8 fake devices, and what a compiled program sends."""

import re
from collections import Counter

import jax
import pytest

from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.run_config import ParallelConfig

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|ragged-all-to-all|reduce-scatter"


@pytest.fixture
def eight():
    """Axes -> a mesh of all fake devices: ``eight(expert=8)``."""
    return lambda **axes: make_mesh(ParallelConfig(**{"data": 1, **axes}), jax.devices())


def collectives(function, *arguments) -> list[tuple[str, tuple[int, ...]]]:
    """(kind, shape on a device) of each operand of each collective of the compiled program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = []
    for results, kind in re.findall(rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\(", text):
        shapes = [tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", results)]
        found += [(kind, shape) for shape in shapes]
    return found


def kinds(found) -> dict[str, int]:
    return dict(Counter(kind for kind, _ in found))
