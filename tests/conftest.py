"""Where tests run: on 8 fake CPU devices, so that sharding is tested everywhere, or on the GPU with ``-m gpu``."""

import os
import re
from importlib.metadata import version

import pytest

FAKE_DEVICES = "--xla_force_host_platform_device_count=8"


def pytest_configure(config: pytest.Config) -> None:
    # Before any test file imports jax, which reads these once. Worker processes inherit them.
    os.environ["MPLBACKEND"] = "Agg"
    if re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if FAKE_DEVICES not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAKE_DEVICES}".strip()


def pytest_report_header() -> str:
    return ", ".join(
        f"{name} {version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    )


@pytest.fixture
def one_device_env() -> dict[str, str]:
    """The environment for a command under test: as a user has it, with one CPU device."""
    return os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace(FAKE_DEVICES, "").strip()}
