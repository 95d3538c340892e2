"""The picture of a run: loss.png from the rows of metrics.jsonl."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib is imported where it is used: it takes half a second, which only the end of a run needs to spend.

TRAINING, VALIDATION, INK, GRID = "#2f6db5", "#e07b39", "#3c4043", "#e6e8eb"
STYLE: Any = {  # rcParams
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b8bcc2",
    "xtick.color": INK,
    "ytick.color": INK,
    "agg.path.chunksize": 20000,  # curves of very many rows exceed Agg's memory for one path
}
SMOOTH_FROM = 30  # losses; fewer are drawn as they are


def loss_png(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws training loss (each row, and smoothed) and validation loss over steps, and tokens where rows have them.

    A loss that is null leaves a gap. The file is replaced as a whole or not at all.

    Args:
      rows: of metrics.jsonl: ``step`` and any of ``loss``, ``validation_loss`` and ``tokens`` (seen so far).
      path: the PNG file to write.

    Returns:
      False, and no file is written, where no row has a loss.
    """
    train = _series(rows, "loss")
    validation = _series(rows, "validation_loss")
    validation = validation[:, np.isfinite(validation[1])]
    if not np.isfinite(train[1]).any() and not validation.size:
        return False

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        bottom, top = _limits(train[1], validation[1])
        _draw(axes, train, validation, top)
        _dress(axes)
        drawn = [name for name, losses in (("training", train), ("validation", validation)) if losses.size]
        axes.set_title(f"{' and '.join(drawn)} loss".capitalize(), loc="left", fontsize=13, fontweight="bold")
        axes.set_xlim(0, 1.02 * max(*train[0], *validation[0], 1))
        axes.set_ylim(bottom, top)
        tokens = _series(rows, "tokens")
        if (tokens[0] > 0).any():
            _add_tokens(axes, tokens)
        partial = path.with_name(f".{path.name}.partial")
        try:
            FigureCanvasAgg(figure).print_png(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return True


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """float64 [2, n]: steps and values of the rows that have a name, in the order of steps; null is NaN."""
    points = sorted((row["step"], row[name] if row[name] is not None else np.nan) for row in rows if name in row)
    return np.array(points, np.float64).reshape(-1, 2).T


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a fiftieth of the values to either side; NaN where the value is.

    The window shrinks towards the start, so that the steep fall there is not lagged behind, and is cut at the end.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(values))
    half = np.minimum(places, max(1, len(values) // 50))
    low, high = places - half, np.minimum(places + half + 1, len(values))
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(known, mean, np.nan)


def _limits(train: np.ndarray, validation: np.ndarray) -> tuple[float, float]:
    """Of the vertical axis: everything but the spikes that rise above both the first loss and 99% of the losses."""
    train = train[np.isfinite(train)]
    tops = [train[0], np.percentile(train, 99)] if train.size else []
    high = max([*tops, *validation])
    low = min([*train, *validation])
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _draw(axes: Axes, train: np.ndarray, validation: np.ndarray, top: float) -> None:
    known = np.isfinite(train[1])
    beside = np.concatenate([[False], known, [False]])
    alone = known & ~beside[:-2] & ~beside[2:]  # between two gaps, where a line has nothing to connect
    if known.sum() >= SMOOTH_FROM:
        smooth = _smooth(np.minimum(train[1], top))  # one enormous spike must not lift everything around it
        axes.plot(*train, color=TRAINING, alpha=0.3, linewidth=0.8)
        axes.plot(*train[:, alone], color=TRAINING, linestyle="none", marker="o", markersize=3)
        axes.plot(train[0], smooth, color=TRAINING, linewidth=1.8, label=_label("training (smoothed)", smooth))
    elif known.any():
        axes.plot(*train, color=TRAINING, linewidth=1.5, marker="o", markersize=3.5, label=_label("training", train[1]))
    if validation.size:
        label = _label("validation", validation[1])
        few: Any = {"marker": "o", "markersize": 5, "markeredgecolor": "white"} if validation.shape[1] <= 100 else {}
        axes.plot(*validation, color=VALIDATION, linewidth=1.5, label=label, **few)


def _label(name: str, losses: np.ndarray) -> str:
    return f"{name}, {losses[np.isfinite(losses)][-1]:.3f} at the end"


def _dress(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=6)
    axes.legend(loc="upper right", edgecolor="none")


def _add_tokens(axes: Axes, tokens: np.ndarray) -> None:
    """A second horizontal axis, above the first. ``tokens`` is [2, n]: steps and tokens seen, one row past step 0."""
    from matplotlib.ticker import EngFormatter

    # Straight lines through the rows, and beyond them as steep as the whole run, far enough for the margins.
    steps, counts = np.unique(np.concatenate([[[0.0], [0.0]], tokens], axis=1), axis=1)
    steps, counts = (np.concatenate([[-ends[-1]], ends, [2 * ends[-1]]]) for ends in (steps, counts))

    def tokens_of(step: Any) -> np.ndarray:
        return np.interp(step, steps, counts)

    def step_of(count: Any) -> np.ndarray:
        return np.interp(count, counts, steps)

    above = axes.secondary_xaxis("top", functions=(tokens_of, step_of))
    above.xaxis.set_major_formatter(EngFormatter(sep=" "))
    above.set_xlabel("tokens")
    above.spines["top"].set_visible(False)
    above.tick_params(length=0)
