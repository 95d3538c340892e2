"""Likelihood of text and of tokens under a checkpoint.

Shapes: B batch, T time.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from nemotron_jax.checkpoint.load import is_hf, load, run_config
from nemotron_jax.data.pipeline import evaluation_batches
from nemotron_jax.errors import DataError
from nemotron_jax.inference.generate import read_tokens, write_array
from nemotron_jax.inference.text import load_tokenizer
from nemotron_jax.model.context import Context
from nemotron_jax.run_config import DataConfig

ROWS = 8  # rows scored at a time


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(graphdef: nnx.GraphDef, variables: Any, tokens_BT: Array, targets_BT: Array, segments: Any) -> Array:
    model = nnx.merge(graphdef, variables)
    hidden_BTD, _, _ = model.hidden(tokens_BT, Context(segment_ids=segments))
    return model.token_logprobs(hidden_BTD, targets_BT)


def perplexity(checkpoint: Path, data: str, *, step: int | None = None) -> dict[str, Any]:
    """How well a checkpoint predicts the documents of some files.

    Each document is ``<s> text </s>`` in rows of the training length (of a Hugging Face directory: 8192, or what the
    model holds); every token but ``<s>`` is predicted once, from what precedes it in its row.

    Args:
      data: comma-separated paths, globs or "stdlib", as in ``data.files``.

    Returns:
      nll_per_token (natural log), perplexity, bits_per_byte (all of the nll over the bytes of the text; None where
      some of the data are tokens whose text is not known), tokens.
    """
    tokenizer = load_tokenizer(checkpoint)
    config, model = load(checkpoint, step=step)
    settings = DataConfig() if is_hf(checkpoint) else run_config(checkpoint).data
    batches, abouts = evaluation_batches(
        data,
        tokenizer,
        seq_len=min(settings.seq_len, config.max_positions),
        batch_size=ROWS,
        vocab_size=config.vocab_size,
        text_field=settings.text_field,
    )
    sizes = [about.text_bytes for about in abouts]
    graphdef, variables = nnx.split(model)
    nll, tokens = 0.0, 0
    for batch in batches:
        logprobs = np.asarray(_logprobs(graphdef, variables, batch.tokens, batch.targets, batch.segment_ids))
        nll -= float((batch.loss_weights * logprobs).sum(dtype=np.float64))
        tokens += int(batch.loss_weights.sum())
    if not tokens:
        raise DataError(f"{data} holds nothing to score.")
    text_bytes = None if None in sizes else sum(size or 0 for size in sizes)
    return {
        "nll_per_token": nll / tokens,
        "perplexity": math.exp(nll / tokens),
        "bits_per_byte": nll / math.log(2) / text_bytes if text_bytes else None,
        "tokens": tokens,
    }


def score(checkpoint: Path, tokens: Path, out: Path, *, step: int | None = None) -> None:
    """int32 [B, T] in a .npy file -> float32 [B, T-1]: log p(token t+1 given tokens up to t), natural log.

    Raises:
      DataError: the file is no such array, or holds ids outside of the vocabulary.
    """
    values = read_tokens(tokens)
    config, model = load(checkpoint, step=step)
    if values.shape[1] < 2 or values.min() < 0 or values.max() >= config.vocab_size:
        raise DataError(
            f"{tokens} must hold rows of at least 2 token ids in [0, {config.vocab_size}), got shape "
            f"{list(values.shape)} with ids from {values.min()} to {values.max()}."
        )
    graphdef, variables = nnx.split(model)
    scored = [
        np.asarray(_logprobs(graphdef, variables, jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:]), None))
        for rows in (values[i : i + ROWS] for i in range(0, len(values), ROWS))
    ]
    write_array(out, np.concatenate(scored).astype(np.float32))
