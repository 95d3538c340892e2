"""Trains a model: python train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.KEY=VALUE ...]

The same command goes on with a run that was stopped. Under srun, mpirun or an indexed Kubernetes Job it is the command
of every process; without a launcher each also needs --coordinator=HOST:PORT --processes=N --process=I.

Exit codes: 0 done, 2 bad config or input, 3 diverged, 75 stopped by a signal after saving (run the same command again).
A process that has lost another one ends with a code above 0 and a message: the same command goes on, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemotron_jax.cli import main, parse_train_flags


def train(argv: Sequence[str]) -> int:
    """From flags to a finished run; returns the exit code."""
    config, workdir, others = parse_train_flags(argv, __doc__)
    # After the flags: JAX takes seconds to import.
    from nemotron_jax.inference.text import sample_text
    from nemotron_jax.parallel import processes
    from nemotron_jax.training.loop import pretrain

    with processes.joined(others):
        return pretrain(config, workdir, sampler=sample_text)


if __name__ == "__main__":
    main(train)
