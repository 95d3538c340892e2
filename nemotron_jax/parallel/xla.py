"""What programs on several GPUs are compiled with: options of XLA that are not on by themselves, and why."""

from __future__ import annotations

import os

from jax.sharding import Mesh

OPTIONS: dict[str, bool | int] = {
    # Collectives run beside arithmetic that does not need them; without it XLA schedules for memory alone.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # More than one collective may be under way: those of two layers. With one, the weight gradients of experts queue
    # behind each other, and what has no place left to hide is made synchronous.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 16,
    # Not when XLA thinks that they will just be done in time: it takes links for faster than they are. What may start
    # is said by data (parallel/local.py, `after` and `together`).
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
    # No gradient waits for that of another layer to travel with it.
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 1_000_000,
}


def compiler_options(mesh: Mesh) -> dict[str, bool | int] | None:
    """For ``jax.jit`` of a program on this mesh; None without several GPUs. What XLA_FLAGS names is the user's."""
    if mesh.size == 1 or mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return None
    named = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in OPTIONS.items() if name not in named}
