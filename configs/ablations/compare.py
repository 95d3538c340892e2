"""Trains one config in several precision recipes and compares them: table.md, table.json and gaps.png in --workdir.

python configs/ablations/compare.py --config=configs/ablations/nvfp4_small.py --workdir=DIR
    [--runs=bfloat16,bfloat16:1,nvfp4,nvfp4:1] [--at-once=8] [--config.KEY=VALUE ...]

Each run is one of train.py in DIR/RECIPE-seed-N; runs that are finished are not repeated, one that was stopped goes on.
The text is tokenised once, into DIR/data. Others are compared with the first run's recipe, each with its own seed.
Runs at once get one GPU each, where there are GPUs (CUDA_VISIBLE_DEVICES, else all), or a part of one; what they print
goes to DIR/RECIPE-seed-N.log. Exit codes are those of train.py; flags of all runs are read before the first one starts.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # as train.py does by lying there

from nemotron_jax.cli import Parser, main, number, parse_train_flags  # noqa: E402
from nemotron_jax.errors import UserError  # noqa: E402
from nemotron_jax.training.metrics import METRICS_FILE, read_rows  # noqa: E402
from nemotron_jax.training.workdir import DATA_CACHE  # noqa: E402

RECIPES = ("bfloat16", "nvfp4", "nvfp4-no-sr", "nvfp4-no-rht", "nvfp4-1d-weights", "nvfp4-all-layers")
ZEROS = "zero_gradients/"

Rows = Sequence[Mapping[str, Any]]


class Run(NamedTuple):
    """One run of train.py: its recipe, its seed, and the flags of train.py beside --workdir."""

    recipe: str
    seed: int
    flags: Sequence[str]

    @property
    def name(self) -> str:
        return f"{self.recipe}-seed-{self.seed}"


def compare(argv: Sequence[str]) -> int:
    """From flags to the table; returns the exit code."""
    parser = Parser("compare.py", __doc__)
    parser.add_argument("--config", metavar="FILE", help="the config of all runs")
    parser.add_argument("--workdir", metavar="DIR", help="a folder for each run, and the table")
    parser.add_argument(
        "--runs", default=",".join(RECIPES), metavar="RECIPE[:SEED],...", help="seed 0 where none is given"
    )
    parser.add_argument(
        "--at-once",
        type=number(int, least=1, name="a whole number from 1"),
        default=1,
        metavar="N",
        help="runs at a time",
    )
    args, flags = parser.parse_known_args(argv)
    parser.require(args, "config", "workdir")
    folder = Path(args.workdir).absolute()
    runs = planned(args.runs, [f"--config={Path(args.config).absolute()}", *flags])
    import jax  # after the flags: it takes seconds

    jax.config.update("jax_platforms", "cpu")  # of this process, which would take most of a GPU's memory from the runs
    for run in runs:
        check([*run.flags, f"--workdir={folder / run.name}"])
    tokenise(runs[0].flags, folder / DATA_CACHE)
    if code := train(runs, folder, args.at_once):
        return code
    found: dict[str, dict[int, Rows]] = {}
    for run in runs:
        found.setdefault(run.recipe, {})[run.seed] = read_rows(folder / run.name / METRICS_FILE)
    table = summary(found)
    (folder / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    (folder / "table.md").write_text(markdown(table))
    plot(found, folder / "gaps.png")
    print(markdown(table))
    return 0


def planned(names: str, flags: Sequence[str]) -> list[Run]:
    """What --runs lists. UserError for a bad seed, a run named twice, or one without a run to compare it with."""
    runs = []
    for name in names.split(","):
        recipe, _, seed = name.partition(":")
        if not (seed or "0").isascii() or not (seed or "0").isdigit():
            raise UserError(f"--runs: expected RECIPE or RECIPE:SEED with a whole number from 0, got {name!r}.")
        own = [f"--config.precision.recipe={recipe}", f"--config.train.seed={int(seed or 0)}"]
        runs.append(Run(recipe, int(seed or 0), [*flags, *own]))
    for i, run in enumerate(runs):
        if run.name in (other.name for other in runs[:i]):
            raise UserError(f"--runs: {run.recipe}:{run.seed} is named twice.")
        if run.seed not in (other.seed for other in runs if other.recipe == runs[0].recipe):
            raise UserError(
                f"--runs: {run.recipe}:{run.seed} has nothing to be compared with: add {runs[0].recipe}:{run.seed}."
            )
    return runs


def check(arguments: Sequence[str]) -> None:
    """Raises UserError where train.py would refuse the flags, the recipe or the sizes of the model for it."""
    config, _, _ = parse_train_flags(arguments)
    from nemotron_jax.model.nemotron import abstract  # after the flags: JAX takes seconds to import
    from nemotron_jax.precision.recipe import recipe

    abstract(config.model, recipe(config.precision.recipe, config.model, config.precision.exclude))


def tokenise(flags: Sequence[str], cache: Path) -> None:
    """Makes the tokens and the tokenizer of all runs, as train.py would for each of them."""
    from nemotron_jax.data.pipeline import build, load_tokenizer

    config, _, _ = parse_train_flags([*flags, f"--workdir={cache.parent}"])
    sizes = {"vocab_size": config.model.vocab_size}
    tokenizer = load_tokenizer(config.data, cache, **sizes)
    build(config.data, tokenizer, global_batch_size=1, seed=config.train.seed, cache_dir=cache, **sizes)


def train(runs: Sequence[Run], folder: Path, at_once: int) -> int:
    """Runs train.py for each, ``at_once`` of them at a time; the exit code of the first that failed, or 0.

    After a failure none is started any more.
    """
    places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for environment in environments(at_once):
        places.put(environment)
    failed: list[int] = []

    def one(run: Run) -> None:
        if failed:
            return
        workdir = folder / run.name
        if (folder / DATA_CACHE).exists() and not (workdir / DATA_CACHE).exists():
            shutil.copytree(folder / DATA_CACHE, workdir / DATA_CACHE, copy_function=os.link)
        command = [sys.executable, str(ROOT / "train.py"), *run.flags, f"--workdir={workdir}"]
        place = places.get()
        print(*command[1:], flush=True)
        start = functools.partial(subprocess.run, command, env=os.environ | place, check=False)
        if at_once == 1:
            code = start().returncode
        else:
            with open(workdir.with_suffix(".log"), "a") as log:
                code = start(stdout=log, stderr=log).returncode
            print(f"{run.name} ended with exit code {code}", flush=True)
        places.put(place)
        if code:
            failed.append(code)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, runs))
    return failed[0] if failed else 0


def environments(at_once: int) -> list[dict[str, str]]:
    """What is added to the environment of each of the runs at a time: which GPU it has, and how much of its memory."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if "CUDA_VISIBLE_DEVICES" in os.environ else _gpus()
    gpus = [gpu for gpu in gpus if gpu]
    if at_once == 1 or not gpus:
        return [{}] * at_once
    on_one = -(-at_once // len(gpus))
    fraction = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / on_one:.2f}"}
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)], **fraction} for i in range(at_once)]


def _gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return listed.stdout.split() if listed.returncode == 0 else []


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
