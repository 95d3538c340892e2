"""GPUs that are not there: programs compiled for them on any machine, all the way to machine code.

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt (no GPU, driver or CUDA), which `make compile-gpu` keeps apart
from .venv: jax would look for a GPU if it saw them. What XLA measures on a GPU (autotuning, cuDNN's plans) is left out.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from pallas_kernels import dispatch

# Descriptions of GPUs in XLA's GpuTargetConfigProto (as openxla/xla keeps them in
# xla/backends/gpu/target_config/specs/), by name, and the architecture that Mosaic kernels are compiled for.
TARGETS = {"h200": "sm_90a", "b200": "sm_100a"}
_FOLDER = Path(__file__).parent / "targets"


def devices(target: str, count: int = 1) -> list[Any]:
    """``count`` devices of a target, in hosts of 8, to make a mesh of; programs can be compiled for them, not run.

    Raises:
      ValueError: an unknown target, or a count that is neither at most 8 nor a multiple of 8.
      RuntimeError: the wheels of this file's docstring are not installed.
    """
    if target not in TARGETS:
        raise ValueError(f"the target must be one of {', '.join(TARGETS)}, got {target!r}")
    if count < 1 or (count > 8 and count % 8):
        raise ValueError(f"a target has 1 to 8 devices or a multiple of 8, got {count}")
    hosts, each = (1, count) if count <= 8 else (count // 8, 8)
    description = (_FOLDER / f"{target}.txtpb").read_text()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=description, topology=f"1x{hosts}x{each}"
        )
    except Exception as error:
        raise RuntimeError(
            f"no compiler for {target} here ({type(error).__name__}: {error}). It comes with the wheels "
            "jax-cuda13-plugin and jax-cuda13-pjrt, which `make compile-gpu` installs into .cache/gpu-compiler: run "
            "with PYTHONPATH=.cache/gpu-compiler JAX_PLATFORMS=cpu"
        ) from error
    return list(topology.devices)


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Ops choose what runs on the target, and Pallas lowers for it."""
    with dispatch.compiling_for(TARGETS[target]):
        yield
