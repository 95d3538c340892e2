"""Measures a checkpoint.

python eval.py --checkpoint=runs/quickstart --task=perplexity --data=FILE[,FILE...]
    prints one JSON object: nll_per_token (natural log), perplexity, bits_per_byte, tokens
python eval.py --checkpoint=runs/quickstart --task=score --tokens=IN.npy --out=OUT.npy
    integers [B, T] -> float32 [B, T-1]: log p(token t+1 given tokens up to t), natural log

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemotron_jax.cli import Parser, existing_path, main, number, output_file
from nemotron_jax.errors import UserError, did_you_mean


def perplexity(flags: Namespace) -> None:
    """Prints the result as the last line of stdout."""
    from nemotron_jax.evaluation import likelihood  # after the flags: JAX takes seconds to import

    print(json.dumps(likelihood.perplexity(flags.checkpoint, flags.data, step=flags.step)))


def score(flags: Namespace) -> None:
    """Writes the log-probabilities of given tokens to a file."""
    from nemotron_jax.evaluation import likelihood

    likelihood.score(flags.checkpoint, flags.tokens, flags.out, step=flags.step)


@dataclass(frozen=True)
class Task:
    run: Callable[[Namespace], None]
    needs: tuple[str, ...]  # flags of its own


TASKS = {
    "perplexity": Task(perplexity, needs=("data",)),
    "score": Task(score, needs=("tokens", "out")),
}


def evaluate(argv: Sequence[str]) -> int:
    """From flags to a result; returns the exit code."""
    parser = Parser("eval.py", __doc__)
    parser.add_argument("--checkpoint", type=existing_path, metavar="DIR", help="a training workdir or an HF directory")
    parser.add_argument("--task", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--step", type=number(int, least=0, name="a step"), metavar="N", help="default: the last one")
    parser.add_argument("--data", metavar="FILES", help="text: comma-separated paths and globs")
    parser.add_argument("--tokens", type=existing_path, metavar="IN.npy", help="integers [B, T]")
    parser.add_argument("--out", type=output_file, metavar="OUT.npy", help="where the result goes")
    flags = parser.parse_args(argv)
    parser.require(flags, "checkpoint", "task")
    if flags.task not in TASKS:
        hint = did_you_mean(flags.task, TASKS)
        raise UserError(f"--task must be one of {', '.join(TASKS)}, got {flags.task!r}.{hint}")
    task = TASKS[flags.task]
    parser.require(flags, *task.needs, what=f"--task={flags.task}")
    for name in {name for other in TASKS.values() for name in other.needs if name not in task.needs}:
        if getattr(flags, name) is not None:
            raise UserError(f"--task={flags.task} has no use for --{name}: it takes --{' and --'.join(task.needs)}.")
    task.run(flags)
    return 0


if __name__ == "__main__":
    main(evaluate)
