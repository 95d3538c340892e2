"""Trains a model: python train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.KEY=VALUE ...]

The same command goes on with a run that was stopped. Exit codes: 0 done, 2 bad config or input, 3 diverged,
75 stopped by a signal after saving (run the same command again).
"""

from __future__ import annotations

from collections.abc import Sequence

from nemotron_jax.cli import main, parse_train_flags


def train(argv: Sequence[str]) -> int:
    """From flags to a finished run; returns the exit code."""
    config, workdir = parse_train_flags(argv, __doc__)
    # After the flags: JAX takes seconds to import.
    from nemotron_jax.inference.text import sample_text
    from nemotron_jax.training.loop import pretrain

    return pretrain(config, workdir, sampler=sample_text)


if __name__ == "__main__":
    main(train)
