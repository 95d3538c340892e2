"""Running GPU kernels on the CPU."""

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


@pytest.fixture
def interpret(capsys):
    """Parameters that make a Mosaic kernel run on the CPU; a race that its detector reports fails the test."""
    yield plgpu.InterpretGPUParams(detect_races=True)
    printed = capsys.readouterr().out  # where the detector reports, kernel by kernel
    assert "RACE" not in printed, printed
