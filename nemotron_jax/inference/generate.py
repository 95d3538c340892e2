"""Generation of token ids: prefill the prompts, then one token at a time.

Shapes: B batch, T time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from nemotron_jax.checkpoint.load import load
from nemotron_jax.errors import ConfigError, DataError
from nemotron_jax.inference.sampling import Sampling, sample
from nemotron_jax.model.context import Context
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.state import DecodeState


def generate(
    model: Nemotron, prompts: list[np.ndarray], tokens: int, sampling: Sampling, *, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yields [B] int32, the next token of every prompt, ``tokens`` times. Rows do not influence each other.

    Raises:
      ConfigError: no prompt, an empty one, a token that is not in the vocabulary, or more tokens than the model holds.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("generate needs at least one prompt, and no empty ones: begin with the <s> token.")
    vocab = model.config.vocab_size
    worst = max(int(prompt.max()) for prompt in prompts)
    if worst >= vocab or min(int(prompt.min()) for prompt in prompts) < 0:
        raise ConfigError(
            f"a prompt must hold token ids from 0 to {vocab - 1}, the model's vocabulary; its largest is {worst}: "
            "the ids, or the tokenizer, are those of another model."
        )
    if not 0 <= seed < 2**32:
        raise ConfigError(f"the seed must be in [0, 2^32), got {seed}.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if tokens < 1:
        raise ConfigError(f"the number of new tokens must be positive, got {tokens}.")
    if int(lengths.max()) + tokens > model.config.max_positions:
        raise ConfigError(
            f"the model holds {model.config.max_positions} tokens, old and new ones together; got a prompt of "
            f"{lengths.max()} and {tokens} new tokens: shorten the prompt or ask for fewer."
        )
    # Powers of two: a new prompt rarely means a new compilation.
    padded = np.zeros((len(prompts), 1 << int(lengths.max() - 1).bit_length()), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    graphdef, variables = nnx.split(model)
    state = model.init_state(len(prompts), 1 << int(lengths.max() + tokens - 1).bit_length())
    key = jax.random.key(seed)
    step = functools.partial(_step, graphdef, variables, sampling=sampling)
    next_tokens, state = step(padded, state, jax.random.fold_in(key, 0), new_tokens=lengths)
    for number in range(1, tokens + 1):
        yield np.asarray(next_tokens)
        if number < tokens:
            next_tokens, state = step(next_tokens[:, None], state, jax.random.fold_in(key, number), new_tokens=None)


@functools.partial(jax.jit, static_argnums=0, static_argnames="sampling", donate_argnums=3)
def _step(
    graphdef: nnx.GraphDef,
    variables: Any,
    tokens_BT: Array,
    state: DecodeState,
    key: Array,
    *,
    new_tokens: Array | None,
    sampling: Sampling,
) -> tuple[Array, DecodeState]:
    """Advances the state by the new tokens and draws the one after the last of them."""
    model = nnx.merge(graphdef, variables)
    hidden_BTD, new_state, _ = model.hidden(tokens_BT, Context(new_tokens=new_tokens), state)
    last = tokens_BT.shape[1] - 1 if new_tokens is None else new_tokens - 1
    hidden_BD = hidden_BTD[jnp.arange(hidden_BTD.shape[0]), last]
    return sample(model.logits(hidden_BD), key, sampling), new_state


def generate_tokens(
    checkpoint: Path,
    prompt_tokens: Path,
    out: Path,
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
) -> None:
    """Continues every row of an int [B, T] .npy file; writes int32 [B, tokens].

    Raises:
      DataError: the file is no such array.
    """
    sampling = Sampling(temperature, top_k, top_p)
    prompts = read_tokens(prompt_tokens)
    _, model = load(checkpoint)
    made = list(generate(model, list(prompts), tokens, sampling, seed=seed))
    write_array(out, np.stack(made, axis=1))


def write_array(path: Path, values: np.ndarray) -> None:
    """A .npy file. Raises DataError where it cannot be written."""
    opened = False
    try:
        with open(path, "wb") as file:
            opened = True
            np.save(file, values)
    except OSError as error:
        if opened and path.is_file():
            path.unlink()  # it holds a part
        raise DataError(f"{path} cannot be written ({error.strerror or error}): choose another place.") from error


def read_tokens(path: Path) -> np.ndarray:
    """int32 [B, T] from a .npy file. Raises DataError saying what it holds instead."""
    try:
        with open(path, "rb") as file:
            values = np.load(file, allow_pickle=False)
    except Exception as error:  # of a damaged file: EOFError, BadZipFile, TokenError, MemoryError, ...
        raise DataError(f"{path} cannot be read as a NumPy array: {error}.") from error
    if not isinstance(values, np.ndarray):
        raise DataError(f"{path} must be a .npy file with one array of integers [B, T], got an archive of arrays.")
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer) or not values.size:
        raise DataError(f"{path} must hold integers [B, T], got {values.dtype} {list(values.shape)}.")
    if values.max() > np.iinfo(np.int32).max or values.min() < 0:
        raise DataError(f"{path} must hold token ids, got values from {values.min()} to {values.max()}.")
    return values.astype(np.int32)
