"""What a GPU did during a few steps, from a profile that JAX wrote: time of each kernel, and of collectives alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_jax.errors import UserError

COLLECTIVE = re.compile(r"nccl|ragged.?all.?to.?all|all.?reduce|all.?gather|collective", re.IGNORECASE)
LISTED = 40  # kernels of the summary


@dataclass(frozen=True)
class Event:
    """A kernel or copy that ran on a device, in nanoseconds."""

    device: str
    name: str
    start: float
    end: float


def read(folder: Path) -> list[Event]:
    """Every kernel and copy of the newest profile below ``folder``.

    Raises:
      UserError: there is no profile, or no GPU in it.
    """
    from jax.profiler import ProfileData

    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"no profile (*.xplane.pb) was written below {folder}")
    events = [
        Event(plane.name, event.name, event.start_ns, event.start_ns + event.duration_ns)
        for plane in ProfileData.from_file(str(files[-1])).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    if not events:
        raise UserError(f"{files[-1]} has no work of a GPU: profiles are taken on NVIDIA GPUs only")
    return events


def summary(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """Milliseconds of a step on the first device.

    Returns:
      busy_ms: while anything ran. collective_ms: while a collective ran; exposed_collective_ms: and nothing else.
      kernels: those that took longest, each {name, ms, calls of a step}.
    """
    device = min(event.device for event in events)
    events = [event for event in events if event.device == device]
    collectives = [event for event in events if COLLECTIVE.search(event.name)]
    others = [event for event in events if not COLLECTIVE.search(event.name)]
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        times[event.name].append(event.end - event.start)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:LISTED]

    def milliseconds(nanoseconds: float) -> float:
        return round(nanoseconds / steps / 1e6, 3)

    busy, computing = covered(events), covered(others)
    return {
        "busy_ms": milliseconds(busy),
        "collective_ms": milliseconds(covered(collectives)),
        "exposed_collective_ms": milliseconds(busy - computing),
        "kernels": [
            {"name": name[:120], "ms": milliseconds(sum(each)), "calls": round(len(each) / steps, 1)}
            for name, each in longest
        ],
    }


def covered(events: Iterable[Event]) -> float:
    """Nanoseconds in which at least one of the events ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total
