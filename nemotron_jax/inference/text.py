"""From a prompt to text: what is put before the prompt, when to stop, and characters that come in several tokens."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nemotron_jax.checkpoint.companions import GENERATION_CONFIG
from nemotron_jax.checkpoint.load import TOKENIZER_FILE, is_hf, load
from nemotron_jax.checkpoint.store import read_json
from nemotron_jax.config import ModelConfig
from nemotron_jax.data.chat import ChatTemplate
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.errors import CheckpointError, ConfigError
from nemotron_jax.inference.generate import generate
from nemotron_jax.inference.sampling import Sampling
from nemotron_jax.model.nemotron import Nemotron

END_OF_TURN = "<|im_end|>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode a part of a character to


def generate_text(
    checkpoint: Path,
    prompt: str,
    *,
    raw: bool,
    system: str | None,
    thinking: bool,
    tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
) -> Iterator[str]:
    """Streams what the model of a directory says to a prompt.

    With a chat template in the directory the prompt is a user's message, else text that goes on.

    Args:
      checkpoint: training workdir or Hugging Face directory.
      raw: continue the prompt as text in spite of a chat template.
      system: the system message of the chat.
      thinking: False asks the chat template for an answer without reasoning.
      tokens: at most so many new tokens.

    Raises:
      ConfigError: settings out of range, or settings of a chat where there is none.
      CheckpointError: no usable checkpoint, or no tokenizer beside it.
      DataError: a damaged tokenizer or chat template, or one that refuses the messages.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _require_unicode("the prompt", prompt)
    tokenizer = load_tokenizer(checkpoint)
    template = None if raw else ChatTemplate.load(checkpoint)
    if template is None:
        if system is not None or not thinking:
            name = "--no-thinking" if system is None else "--system"
            reason = "--raw continues the prompt as plain text" if raw else f"{checkpoint} has no chat template"
            raise ConfigError(f"{name} is for chats, but {reason}: leave {name} out.")
        # Every document of a training run began with <s>; who made a Hugging Face directory left it to the tokenizer.
        opening = tokenizer.opening_ids if is_hf(checkpoint) else [tokenizer.bos_id]
        ids = text_prompt(tokenizer, prompt, opening)
    else:
        ids = chat_prompt(tokenizer, template, prompt, system=system, thinking=thinking)
    config, model = load(checkpoint)
    stop = stop_ids(checkpoint, tokenizer, config)
    return stream_text(model, tokenizer, ids, tokens, sampling, stop=stop, seed=seed)


def text_prompt(tokenizer: Tokenizer, text: str, opening: Sequence[int]) -> np.ndarray:
    """int32 [tokens]: the opening ids and the text."""
    return np.concatenate([opening, tokenizer.encode(text)]).astype(np.int32)


def chat_prompt(
    tokenizer: Tokenizer, template: ChatTemplate, prompt: str, *, system: str | None, thinking: bool
) -> np.ndarray:
    """int32 [tokens] of a chat with one message of the user, up to where the assistant begins. No ``<s>`` but the
    template's own, as transformers' apply_chat_template does it.

    Raises:
      ConfigError: thinking is unwanted and the template has no such choice, or it renders to nothing.
    """
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        _require_unicode("the system message", system)
        messages.insert(0, {"role": "system", "content": system})
    if thinking:
        text = template.render(messages)  # the template's default, which is to think
    elif "enable_thinking" in template.source:
        text = template.render(messages, enable_thinking=False)
    else:
        raise ConfigError(f"--no-thinking: the chat template of {template.origin} knows no enable_thinking.")
    ids = tokenizer.encode_chat(text)
    if not ids.size:
        raise ConfigError(f"the chat template of {template.origin} makes nothing of the prompt: use --raw.")
    return ids


def stop_ids(checkpoint: Path, tokenizer: Tokenizer, config: ModelConfig) -> frozenset[int]:
    """The tokens that end a text: those of generation_config.json, and where that says nothing, </s> and <|im_end|>.

    Raises:
      CheckpointError: a generation_config.json that cannot be used.
    """
    file = checkpoint / GENERATION_CONFIG
    value = read_json(file, "the settings of generation").get("eos_token_id") if file.exists() else None
    if value is None:
        turn = tokenizer.special_id(END_OF_TURN)
        return frozenset({config.eos_id, tokenizer.eos_id} | (set() if turn is None else {turn}))
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) for number in ids):
        raise CheckpointError(f"{file}: expected eos_token_id to be a token id or a list of them, got {value!r}.")
    return frozenset(ids)


def stream_text(
    model: Nemotron,
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    tokens: int,
    sampling: Sampling,
    *,
    stop: Collection[int],
    seed: int = 0,
) -> Iterator[str]:
    """Yields pieces of the continuation of prompt ids [T], until ``tokens`` tokens or one of ``stop``."""
    made = (int(token) for (token,) in generate(model, [prompt], tokens, sampling, seed=seed))
    return decoded_pieces(tokenizer, itertools.takewhile(lambda token: token not in stop, made))


def decoded_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of tokens as they come; joined, the pieces are the text of all of them.

    A character whose bytes are spread over several tokens is held back until it is whole, or the tokens end.
    """
    # Tokens since the last border of characters, and the token before it: some decoders treat the first token of a
    # text in a way of its own. (Decoding the whole text for each token would take quadratic time.)
    window: list[int] = []
    text, shown = "", 0
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window)
        whole = len(text.rstrip(REPLACEMENT))
        if whole > shown:
            yield text[shown:whole]
            shown = whole
        if whole == len(text):
            window = window[-1:]
            text = tokenizer.decode(window)
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]


SAMPLE_PROMPTS = ("import os\nimport sys\n\n\ndef main():\n", 'class Reader:\n    """', "    def __init__(self,")


def sample_text(model: Nemotron, tokenizer: Tokenizer) -> str:
    """What a run leaves in sample.txt: 100 tokens after each of a few prompts, temperature 0.7, top_p 0.9."""
    sampling = Sampling(temperature=0.7, top_p=0.9)
    stop = {model.config.eos_id, tokenizer.eos_id}
    parts = []
    for seed, prompt in enumerate(SAMPLE_PROMPTS):
        ids = text_prompt(tokenizer, prompt, [tokenizer.bos_id])
        text = "".join(stream_text(model, tokenizer, ids, 100, sampling, stop=stop, seed=seed))
        parts.append(f"--- prompt: {prompt!r}\n{prompt}{text}\n")
    return "\n".join(parts)


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer in a training workdir or Hugging Face directory. Raises CheckpointError where there is none."""
    file = checkpoint / TOKENIZER_FILE
    if not file.exists():
        is_hf(checkpoint)  # says so where it is neither
        raise CheckpointError(
            f"{checkpoint} holds no {TOKENIZER_FILE} (a run on .bin/.idx data has none): work with token ids instead."
        )
    return Tokenizer.load(file)


def _require_unicode(what: str, text: str) -> None:
    """Raises ConfigError for an argument of a command that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} is not valid UTF-8.") from error
