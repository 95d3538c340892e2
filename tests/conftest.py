"""Where tests run: on 8 fake CPU devices, so that sharding is tested everywhere, or on the GPU with ``-m gpu``."""

import os
import re
import socket
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE_DEVICES = "--xla_force_host_platform_device_count=8"
# LLVM's optimisation is half of the time that small programs take to compile, and they run in milliseconds anyway.
QUICK_COMPILE = "--xla_backend_optimization_level=0"


def _prepare_environment() -> None:
    """Before anything imports jax, which reads these once: on loading this file, since other conftest files follow."""
    os.environ["MPLBACKEND"] = "Agg"
    if any(re.search(r"(?<!not )\bgpu\b", argument) for argument in sys.argv[1:]):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Tests share what they compile, also between worker processes and from one run of the suite to the next.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    for flag in (FAKE_DEVICES, QUICK_COMPILE):
        if flag not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


_prepare_environment()


def pytest_report_header() -> str:
    return ", ".join(
        f"{name} {version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    )


@pytest.fixture
def unused_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def one_device_env() -> dict[str, str]:
    """The environment for a command under test: as a user has it, with one CPU device."""
    flags = os.environ.get("XLA_FLAGS", "").replace(FAKE_DEVICES, "").replace(QUICK_COMPILE, "")
    environment = os.environ | {"XLA_FLAGS": flags.strip()}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return environment
