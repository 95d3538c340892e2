"""The stacked view of the layers: repeating runs of layers as one, scanned.

Unrolled, each layer of a step has its own place in the program, and XLA gathers the weights of many layers before it
needs the first; scanned, one iteration's weights are on the devices at a time, and a unit is compiled once however
often it repeats. Nemotron 3 repeats in two levels: Super's 88 layers have 13 places,

    M   3 x [E M]   2 x [* 4 x [E M]]   4 x [* 5 x [E M]]   2 x [* 4 x [E M]]   E

A Stack says which layers share a place: the first of them stands for all, and its leaves have an axis for each
Repeat around it. Layers share a place only where their kinds are equal (mixer, precision, what is trained); so a
stack is cut where the precision changes. Checkpoints, recipes and rules speak of the canonical list alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

LAYERS, AXIS = "layers", "layers"  # the attribute that holds them in the tree; the logical axis of a stack


@dataclass(frozen=True)
class Repeat:
    """``count`` times the nodes of ``body``."""

    count: int
    body: tuple[Node, ...]


Node = int | Repeat  # an int is a place in the list of layers that are left


@dataclass(frozen=True)
class Stack:
    """Layers as a tree of repeats; places are numbered from 0 in the order of the tree."""

    nodes: tuple[Node, ...]

    @functools.cached_property
    def members(self) -> tuple[np.ndarray, ...]:
        """For each place, the numbers of its layers: an axis for each Repeat around it, the outermost first."""
        found: dict[int, np.ndarray] = {}

        def walk(nodes: tuple[Node, ...], first: int) -> int:
            for node in nodes:
                if isinstance(node, int):
                    found[node] = np.asarray(first)
                    first += 1
                    continue
                length = walk(node.body, first) - first
                for place in _places(node.body):
                    found[place] = np.stack([found[place] + i * length for i in range(node.count)])
                first += node.count * length
            return first

        walk(self.nodes, 0)
        return tuple(found[place] for place in sorted(found))

    @functools.cached_property
    def around(self) -> tuple[tuple[range, ...], ...]:
        """For each layer, the layers of the scans around it, the outermost first; an inner scan is one of many."""
        found: list[tuple[range, ...]] = []

        def walk(nodes: tuple[Node, ...], outer: tuple[range, ...]) -> None:
            for node in nodes:
                if isinstance(node, int):
                    found.append(outer)
                    continue
                scan = range(len(found), len(found) + _length(node))
                for _ in range(node.count):
                    walk(node.body, (*outer, scan))

        walk(self.nodes, ())
        return tuple(found)

    def canonical(self, path: tuple[Any, ...]) -> tuple[Any, ...]:
        """A path of the stacked view -> that of the first layer there."""
        return (LAYERS, int(self.members[path[1]].flat[0]), *path[2:]) if path[0] == LAYERS else path

    def spell(self, letters: str) -> str:
        """``3 x [M E] M * E``, from the canonical pattern."""
        return _spell(self.nodes, [letters[members.flat[0]] for members in self.members])


def _length(node: Node) -> int:
    """Layers of a node."""
    return 1 if isinstance(node, int) else node.count * sum(map(_length, node.body))


def _places(nodes: tuple[Node, ...]) -> Iterator[int]:
    for node in nodes:
        yield from (node,) if isinstance(node, int) else _places(node.body)


def _spell(nodes: tuple[Node, ...], names: list[str]) -> str:
    return " ".join(
        names[node] if isinstance(node, int) else f"{node.count} x [{_spell(node.body, names)}]" for node in nodes
    )


def find_stack(kinds: Sequence[Hashable]) -> Stack:
    """The tree with the fewest places (each is compiled once), and among those the one with the fewest repeats.

    Args:
      kinds: of each layer; layers of equal kinds may share a place.
    """
    best: dict[tuple[int, int], tuple[int, int, tuple[Any, ...]]] = {}
    for length in range(1, len(kinds) + 1):
        for i in range(len(kinds) - length + 1):
            best[i, i + length] = _best(kinds, i, i + length, best)
    place = iter(range(len(kinds)))

    def number(nodes: tuple[Any, ...]) -> tuple[Node, ...]:
        return tuple(Repeat(n.count, number(n.body)) if isinstance(n, Repeat) else next(place) for n in nodes)

    return Stack(number(best[0, len(kinds)][2]) if kinds else ())


def _best(kinds: Sequence[Hashable], i: int, j: int, best: Any) -> tuple[int, int, tuple[Any, ...]]:
    """(places, repeats, nodes) of layers i to j, from those of shorter runs."""
    if j - i == 1:
        return 1, 0, (0,)
    options = []
    for period in range(1, (j - i) // 2 + 1):
        if (j - i) % period == 0 and all(kinds[k] == kinds[k + period] for k in range(i, j - period)):
            places, repeats, body = best[i, i + period]
            options.append((places, repeats + 1, (Repeat((j - i) // period, body),)))
            break  # the shortest period has the fewest places
    split = min(range(i + 1, j), key=lambda k: (best[i, k][0] + best[k, j][0], best[i, k][1] + best[k, j][1]))
    left, right = best[i, split], best[split, j]
    options.append((left[0] + right[0], left[1] + right[1], left[2] + right[2]))
    return min(options, key=lambda option: option[:2])


def scan_layers(
    stack: Stack, leaves: Sequence[Any], carry: Any, apply: Callable[[int, Any, Array, Any], tuple[Any, Any]]
) -> tuple[Any, dict[int, Any]]:
    """Runs all layers in order.

    Args:
      leaves: of each place, stacked.
      apply: (place, leaves of one layer, its number as uint32, carry) -> (carry, what it reports).

    Returns:
      the last carry, and the reports by the number of the layer.
    """

    def run(nodes: tuple[Node, ...], held: dict[int, Any], state: Any) -> tuple[Any, dict[int, Any]]:
        reports: dict[int, Any] = {}
        for node in nodes:
            if isinstance(node, int):
                carry, number = state
                carry, reports[node] = apply(node, held[node], number, carry)
                state = carry, number + 1
            else:
                inner = {place: held[place] for place in _places(node.body)}
                state, of_body = lax.scan(functools.partial(step, node.body), state, inner)
                reports |= of_body
        return state, reports

    def step(nodes: tuple[Node, ...], state: Any, held: dict[int, Any]) -> tuple[Any, dict[int, Any]]:
        return run(nodes, held, state)

    (carry, _), by_place = run(stack.nodes, dict(enumerate(leaves)), (carry, jnp.uint32(0)))
    reports = {
        int(number): jax.tree.map(functools.partial(_at, at), by_place[place])
        for place, numbers in enumerate(stack.members)
        for at, number in np.ndenumerate(numbers)
    }
    return carry, dict(sorted(reports.items()))


def _at(position: tuple[int, ...], report: Array) -> Array:
    return report[position]


def one_layer(leaves: nnx.State) -> nnx.State:
    """The leaves of one layer of a stack, with the logical axes of a layer."""
    return jax.tree.map(
        lambda leaf: leaf.replace(leaf.get_value(), axes=tuple(name for name in leaf.axes if name != AXIS)),
        leaves,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def as_stored(leaves: nnx.State) -> nnx.State:
    """Inside of a scan, the leaves of one layer in the order of their axes.

    An all-gather puts the axis that it joins first. XLA would make that the order of the whole stack, in a float32
    copy of the weights of all layers that lives as long as the step; so it is made for one layer at a time.
    """
    return jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), leaves)


# Trees: every nnx.State in them changes its view; leaves outside of the layers stay as they are.

Join = Callable[[list[Any], tuple[int, ...]], Any]  # the layers of a place, their shape -> the leaf of the place
Cut = Callable[[Any, list[tuple[int, ...]]], list[Any]]  # the leaf of a place, positions in it -> one leaf each


def _join(leaves: list[Any], shape: tuple[int, ...]) -> Array:
    return jnp.stack(leaves).reshape(*shape, *leaves[0].shape)


def _cut(leaf: Any, positions: list[tuple[int, ...]]) -> list[Array]:
    return [leaf[at] for at in positions]


def stacked(stack: Stack, tree: Any, join: Join = _join) -> Any:
    """The canonical view -> the stacked one."""
    place_of = {int(number): place for place, numbers in enumerate(stack.members) for number in numbers.flat}

    def change(state: nnx.State) -> nnx.State:
        flat, parts = [], dict[tuple[Any, ...], dict[int, Any]]()
        for path, variable in _flat(state):
            if path[0] == LAYERS:
                parts.setdefault((LAYERS, place_of[path[1]], *path[2:]), {})[path[1]] = variable
            else:
                flat.append((path, variable))
        for path, by_number in parts.items():
            numbers = stack.members[path[1]]
            variables = [by_number[int(number)] for number in numbers.flat]
            axes = (AXIS,) * numbers.ndim + variables[0].axes
            leaf = join([variable.get_value() for variable in variables], numbers.shape)
            flat.append((path, variables[0].replace(leaf, axes=axes)))
        return nnx.from_flat_state(flat)

    return _each_state(change, tree)


def unstacked(stack: Stack, tree: Any, cut: Cut = _cut) -> Any:
    """The stacked view -> the canonical one."""

    def change(state: nnx.State) -> nnx.State:
        flat = []
        for path, variable in _flat(state):
            if path[0] != LAYERS:
                flat.append((path, variable))
                continue
            numbers = stack.members[path[1]]
            leaves = cut(variable.get_value(), list(np.ndindex(numbers.shape)))
            for number, leaf in zip(numbers.flat, leaves, strict=True):
                axes = variable.axes[numbers.ndim :]
                flat.append(((LAYERS, int(number), *path[2:]), variable.replace(leaf, axes=axes)))
        return nnx.from_flat_state(flat)

    return _each_state(change, tree)


def _flat(state: nnx.State) -> list[tuple[tuple[Any, ...], Any]]:
    return list(nnx.to_flat_state(state))


def _each_state(change: Callable[[nnx.State], nnx.State], tree: Any) -> Any:
    def is_state(node: Any) -> bool:
        return isinstance(node, nnx.State)

    return jax.tree.map(lambda node: change(node) if is_state(node) else node, tree, is_leaf=is_state)


def stack_arrays(stack: Stack, tree: Any) -> Any:
    """`stacked` of arrays on their devices, place by place; each place's parts are deleted once it is there."""

    def join(parts: list[Array], shape: tuple[int, ...]) -> Array:
        sharding = parts[0].sharding
        assert isinstance(sharding, NamedSharding)
        whole = _join_arrays(parts, shape, _with_spec(sharding, (None,) * len(shape) + tuple(sharding.spec)))
        for part in parts:
            part.delete()
        return whole

    return stacked(stack, tree, join)


def unstack_to_host(stack: Stack, tree: Any) -> Any:
    """`unstacked` of arrays, which go to their hosts' memory place by place: no device ever holds a second state."""

    def cut(leaf: Array, positions: list[tuple[int, ...]]) -> list[Array]:
        assert isinstance(leaf.sharding, NamedSharding)
        names = tuple(leaf.sharding.spec)[len(positions[0]) :]
        parts = _cut_arrays(leaf, tuple(positions), _with_spec(leaf.sharding, names))
        hosted = [jax.device_put(part, part.sharding.with_memory_kind("pinned_host")) for part in parts]
        return jax.block_until_ready(hosted)  # or the parts of all places would be on the devices at a time

    return unstacked(stack, tree, cut)


def _with_spec(sharding: NamedSharding, names: tuple[Any, ...]) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*names))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _join_arrays(parts: list[Array], shape: tuple[int, ...], sharding: NamedSharding) -> Array:
    return lax.with_sharding_constraint(_join(parts, shape), sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cut_arrays(leaf: Array, positions: tuple[tuple[int, ...], ...], sharding: NamedSharding) -> list[Array]:
    return [lax.with_sharding_constraint(part, sharding) for part in _cut(leaf, list(positions))]
