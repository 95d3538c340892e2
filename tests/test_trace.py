"""What is said of a profile."""

import jax
import jax.numpy as jnp
import pytest

from nemotron_jax.errors import UserError
from nemotron_jax.trace import Event, covered, read, summary

GPU = "/device:GPU:0"


def event(name: str, start: float, end: float, device: str = GPU) -> Event:
    return Event(device, name, 1e6 * start, 1e6 * end)


def test_times_are_those_of_a_step_on_the_first_device():
    events = [
        event("gemm", 0, 4),
        event("ncclDevKernel_AllGather", 3, 7),  # 4 to 5 alone, then beside the copy
        event("copy", 5, 6),
        event("gemm", 10, 12),
        event("gemm", 0, 100, "/device:GPU:1"),
    ]
    found = summary(events, steps=2)
    assert (found["busy_ms"], found["collective_ms"], found["exposed_collective_ms"]) == (4.5, 2.0, 1.0)
    assert found["kernels"][0] == {"name": "gemm", "ms": 3.0, "calls": 1.0}
    assert sum(kernel["ms"] for kernel in found["kernels"]) == 5.5


def test_events_inside_others_count_once():
    assert covered([event("a", 0, 10), event("b", 2, 3), event("c", 9, 11)]) == 11e6


def test_a_profile_without_a_gpu_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no profile"):
        read(tmp_path)
    with jax.profiler.trace(str(tmp_path)):
        jnp.ones(3).block_until_ready()
    with pytest.raises(UserError, match="no work of a GPU"):
        read(tmp_path)
