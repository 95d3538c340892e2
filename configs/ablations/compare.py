"""Trains one config in several precision recipes and compares them: table.md, table.json and gaps.png in --workdir.

python configs/ablations/compare.py --config=configs/ablations/nvfp4_small.py --workdir=DIR
    [--seeds=0,1] [--recipes=bfloat16,nvfp4] [--config.KEY=VALUE ...]

Each run is one of train.py in DIR/RECIPE-seed-N; runs that are finished are not repeated, one that was stopped goes on.
The first recipe is what the others are compared with. Exit codes are those of train.py; flags of all runs are read
before the first one starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # as train.py does by lying there

from nemotron_jax.cli import Parser, main, number, parse_train_flags  # noqa: E402
from nemotron_jax.training.metrics import METRICS_FILE, read_rows  # noqa: E402

RECIPES = ("bfloat16", "nvfp4", "nvfp4-no-sr", "nvfp4-no-rht", "nvfp4-1d-weights", "nvfp4-all-layers")
ZEROS = "zero_gradients/"

Rows = Sequence[Mapping[str, Any]]


def compare(argv: Sequence[str]) -> int:
    """From flags to the table; returns the exit code."""
    parser = Parser("compare.py", __doc__)
    parser.add_argument("--config", metavar="FILE", help="the config of all runs")
    parser.add_argument("--workdir", metavar="DIR", help="a folder for each run, and the table")
    seed_of = number(int, least=0, name="a whole number from 0")

    def seeds_of(text: str) -> list[int]:
        return [seed_of(part) for part in text.split(",")]

    parser.add_argument("--seeds", type=seeds_of, default=[0], metavar="N,...", help="of each recipe (default: 0)")
    parser.add_argument("--recipes", default=",".join(RECIPES), metavar="NAME,...", help="the first is the baseline")
    args, flags = parser.parse_known_args(argv)
    parser.require(args, "config", "workdir")
    folder = Path(args.workdir).absolute()
    planned: list[tuple[str, int, Path, list[str]]] = []
    for recipe in args.recipes.split(","):
        for seed in args.seeds:
            workdir = folder / f"{recipe}-seed-{seed}"
            arguments = [f"--config={Path(args.config).absolute()}", f"--workdir={workdir}"]
            arguments += [f"--config.precision.recipe={recipe}", f"--config.train.seed={seed}", *flags]
            check(arguments)
            planned.append((recipe, seed, workdir, arguments))
    runs: dict[str, dict[int, Rows]] = {}
    for recipe, seed, workdir, arguments in planned:
        print("train.py", *arguments, flush=True)
        if code := subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], check=False).returncode:
            return code
        runs.setdefault(recipe, {})[seed] = read_rows(workdir / METRICS_FILE)
    table = summary(runs)
    (folder / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    (folder / "table.md").write_text(markdown(table))
    plot(runs, folder / "gaps.png")
    print(markdown(table))
    return 0


def check(arguments: Sequence[str]) -> None:
    """Raises UserError where train.py would refuse the flags, the recipe or the sizes of the model for it."""
    config, _, _ = parse_train_flags(arguments)
    from nemotron_jax.model.nemotron import abstract  # after the flags: JAX takes seconds to import
    from nemotron_jax.precision.recipe import recipe

    abstract(config.model, recipe(config.precision.recipe, config.model, config.precision.exclude))


def last_tenth(rows: Rows, key: str) -> float:
    """The mean of a logged number over the last 10 % of the steps."""
    last = max(row["step"] for row in rows)
    return float(np.mean([row[key] for row in rows if key in row and row["step"] > 0.9 * last]))


def summary(runs: Mapping[str, Mapping[int, Rows]]) -> list[dict[str, Any]]:
    """One row for each recipe and seed: loss of the last 10 % of the steps, its gap to the first recipe, zeros."""
    first = next(iter(runs.values()))
    table = []
    for recipe, seeds in runs.items():
        for seed, rows in seeds.items():
            loss, base = last_tenth(rows, "loss"), last_tenth(first[seed], "loss")
            names = [key for key in rows[-1] | rows[0] if key.startswith(ZEROS)]
            zeros = {key.removeprefix(ZEROS): last_tenth(rows, key) for key in names}
            validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
            table.append(
                {
                    "recipe": recipe,
                    "seed": seed,
                    "loss": loss,
                    "relative_gap": loss / base - 1,
                    "validation_loss": validation[-1] if validation else None,
                    "zero_gradients": zeros,
                }
            )
    return table


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The table with one column of zero gradients for each kind of weight."""
    names = list(table[0]["zero_gradients"])
    lines = ["| recipe | seed | loss | gap | validation loss | " + " | ".join(f"zeros in {n}" for n in names) + " |"]
    lines.append("|---" * (5 + len(names)) + "|")
    for row in table:
        validation = "" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}"
        cells = [row["recipe"], str(row["seed"]), f"{row['loss']:.4f}", f"{row['relative_gap']:+.2%}", validation]
        cells += [f"{row['zero_gradients'][name]:.2%}" for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(runs: Mapping[str, Mapping[int, Rows]], path: Path) -> None:
    """The relative gap of each run to the first recipe's over steps, averaged over a tenth of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    base, *others = runs
    for recipe in others:
        for seed, rows in runs[recipe].items():
            theirs = {row["step"]: row["loss"] for row in runs[base][seed] if "loss" in row}
            ours = {row["step"]: row["loss"] for row in rows if "loss" in row}
            steps = np.array(sorted(theirs.keys() & ours.keys()))
            window = max(1, len(steps) // 10)
            smooth = [
                np.convolve([losses[step] for step in steps], np.ones(window) / window, "valid")
                for losses in (ours, theirs)
            ]
            axes.plot(steps[window - 1 :], 100 * (smooth[0] / smooth[1] - 1), label=f"{recipe}, seed {seed}")
    axes.set(xlabel="step", ylabel=f"loss above that of {base}, %")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    main(compare)
