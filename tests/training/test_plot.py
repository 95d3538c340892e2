"""loss.png is drawn from any rows that a run may leave."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nemotron_jax.training import plot
from nemotron_jax.training.plot import loss_png

ROOT = Path(__file__).parents[2]


def run_rows(steps: int) -> list[dict]:
    """A falling loss with a little noise, and a validation row every 50 steps."""
    noise = np.random.default_rng(0).normal(size=steps + 1) * 0.1
    rows = []
    for step in range(1, steps + 1):
        loss = 2 + 6 * np.exp(-step / 40)
        rows.append({"step": step, "loss": loss + noise[step], "tokens": 512 * step})
        if step % 50 == 0:
            rows.append({"step": step, "validation_loss": loss + 0.1})
    return rows


def pixels_of(path: Path, colour: str) -> int:
    """Pixels below the legend that have a colour as it is, without any blending."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    image = np.round(matplotlib.image.imread(path)[..., :3] * 255).astype(int)
    return int((image[len(image) // 3 :] == wanted).all(-1).sum())


def test_both_losses_are_drawn(tmp_path):
    path = tmp_path / "loss.png"
    assert loss_png(run_rows(300), path)
    height, width, _ = matplotlib.image.imread(path).shape
    assert 1000 <= width <= 2000 and 500 <= height <= 1200
    assert pixels_of(path, plot.TRAINING) > 1000 and pixels_of(path, plot.VALIDATION) > 500
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    "rows, training, validation",
    [
        ([{"step": 1, "loss": 9.0, "tokens": 64}], True, False),
        ([{"step": 0, "loss": 9.0, "tokens": 0}], True, False),
        ([{"step": 5, "validation_loss": 3.0}], False, True),
        ([{"step": 1, "loss": 9.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 8}], True, False),
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}, {"step": 2, "validation_loss": None}], True, False),
        ([{"step": step, "loss": None if step % 2 else 3.0} for step in range(99)], True, False),
    ],
    ids=["one row", "step zero", "validation only", "a null", "all the same", "every other null"],
)  # fmt: skip
def test_few_rows_and_gaps(tmp_path, rows, training, validation):
    assert loss_png(rows, tmp_path / "loss.png")
    if training:
        assert pixels_of(tmp_path / "loss.png", plot.TRAINING) > 20
    assert (pixels_of(tmp_path / "loss.png", plot.VALIDATION) > 20) == validation


@pytest.mark.parametrize("rows", [[], [{"step": 1}], [{"step": 1, "loss": None}], [{"step": 1, "learning_rate": 0.1}]])
def test_nothing_to_draw(tmp_path, rows):
    assert not loss_png(rows, tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_smoothing_follows_a_line_and_averages_noise():
    line = np.linspace(5, 1, 500)
    smooth = plot._smooth(line)
    np.testing.assert_allclose(smooth[:-10], line[:-10], atol=1e-9)  # no lag, the steep start included
    noise = np.random.default_rng(1).normal(size=2000)
    assert plot._smooth(noise)[100:].std() < 0.25
    holes = np.where(np.arange(500) % 7 == 0, np.nan, line)
    smooth = plot._smooth(holes)
    assert (np.isnan(smooth) == np.isnan(holes)).all()
    np.testing.assert_allclose(
        smooth[20:-10][~np.isnan(smooth[20:-10])], line[20:-10][~np.isnan(holes[20:-10])], atol=0.02
    )


def test_a_spike_does_not_squeeze_the_rest():
    losses = np.linspace(9, 2, 1000)
    losses[700] = 1e6
    bottom, top = plot._limits(losses, np.array([2.1, np.nan][:1]))
    assert 1 < bottom < 2 and 9 < top < 10


def test_rows_out_of_order_are_sorted():
    rows = [{"step": 3, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 9}]
    np.testing.assert_array_equal(plot._series(rows, "loss"), [[1, 2, 3], [3.0, np.nan, 1.0]])


def test_a_failure_leaves_the_picture_before(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    path.write_bytes(b"before")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        loss_png(run_rows(3), path)
    assert path.read_bytes() == b"before" and [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_importing_leaves_matplotlib_alone_and_drawing_leaves_pyplot_alone(tmp_path):
    code = f"""
import sys
from pathlib import Path
from nemotron_jax.training.plot import loss_png
before = "matplotlib" in sys.modules
loss_png([{{"step": 1, "loss": 1.0}}], Path({str(tmp_path / "loss.png")!r}))
print(before, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
