"""Text <-> token ids, through a Hugging Face ``tokenizer.json``; and the training of a small byte-level BPE.

Special tokens in a text are text: a page that happens to contain ``<s>`` or ``<|im_end|>`` is spelled out, so decoding
gives the text back and no document can end itself. Only in the output of a chat template do they mean what they name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nemotron_jax.errors import DataError

# ids 0..13 of the Nemotron 3 tokenizers (as NeMo Safe-Synthesizer's tests list them)
SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    *(f"<SPECIAL_{number}>" for number in range(3, 10)),
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
)
FILE_NAME = "tokenizer.json"
BYTES = 256  # the byte-level alphabet


class Tokenizer:
    """A tokenizer with what training needs to know of it.

    Attributes:
      vocab_size: one more than the largest id.
      bos_id, eos_id: ids that open and close a document; where a tokenizer has one of them only, it does both.
      pad_id: id that stands on padding (never predicted: its loss weight is 0).
      fingerprint: hex digest of everything that encoding depends on.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, names: dict[str, str] | None = None):
        """``names``: bos_token, eos_token, pad_token where the files beside the tokenizer say them."""
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        names = names or {}
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        # Nemotron's chat files name <|im_end|> as the end; the end of a document is </s> all the same.
        bos = self._first_id("<s>", names.get("bos_token"), "<|begin_of_text|>", "<bos>")
        eos = self._first_id("</s>", names.get("eos_token"), "<|end_of_text|>", "<|endoftext|>", "<eos>")
        if bos is None and eos is None:
            raise DataError(
                "the tokenizer has no token that opens or closes a document: expected <s> and </s>, or a "
                "tokenizer_config.json beside it that names bos_token and eos_token."
            )
        self.bos_id: int = eos if bos is None else bos  # type: ignore[assignment]
        self.eos_id: int = bos if eos is None else eos  # type: ignore[assignment]
        pad = self._first_id("<pad>", names.get("pad_token"), "<unk>")
        self.pad_id: int = 0 if pad is None else pad
        self.fingerprint = hashlib.sha256(f"{tokenizer.to_str()}{self.bos_id},{self.eos_id}".encode()).hexdigest()

    def _first_id(self, *names: str | None) -> int | None:
        return next((self._vocabulary[name] for name in names if name in self._vocabulary), None)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Texts -> int32 ids of each, without opening and closing tokens. Uses all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode(self, text: str) -> np.ndarray:
        """One text -> int32 [tokens]."""
        return self.encode_batch([text])[0]

    @property
    def opening_ids(self) -> list[int]:
        """What the tokenizer itself puts in front of a text, by its post-processor in tokenizer.json.

        Of the Nemotron-H tokenizers the dense models' put ``<s>`` there, those of the mixtures of experts nothing (so
        llama.cpp's conversion of NemotronH). One without a post-processor does not say: the opening token.
        """
        if self._tokenizer.post_processor is None:
            return [self.bos_id]
        encoding = self._tokenizer.encode("x", add_special_tokens=True)
        return encoding.ids[: encoding.special_tokens_mask.index(0)]

    def encode_chat(self, text: str) -> np.ndarray:
        """The text of a chat template -> int32 [tokens]; here the names of special tokens are those tokens."""
        return np.asarray(self._chat_tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _chat_tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())  # which is not told to spell out special tokens

    def special_id(self, name: str) -> int | None:
        """The id of a special token such as ``<|im_end|>``; None where there is no special token of this name."""
        number = self._vocabulary.get(name)
        added = self._tokenizer.get_added_tokens_decoder()
        return number if number in added and added[number].special else None

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; special tokens show as their names, bytes that are no UTF-8 as U+FFFD."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of text that each id stands for; 0 for special tokens and unused ids.

        Exact for byte-level BPE (the bytes of a text's tokens add up to the text's), else the bytes of the id's text.
        """
        counts = np.zeros(self.vocab_size, np.int32)
        byte_level = _contains_type(json.loads(self._tokenizer.to_str()).get("decoder"), "ByteLevel")
        added = self._tokenizer.get_added_tokens_decoder()
        for token, number in self._vocabulary.items():
            if number in added:
                counts[number] = 0 if added[number].special else len(added[number].content.encode())
            elif byte_level:
                counts[number] = len(token)  # its alphabet has one character a byte
            elif len(token) == 6 and token.startswith("<0x"):
                counts[number] = 1  # byte fallback: <0xE2>
            else:
                counts[number] = len(self._tokenizer.decode([number]).encode())
        return counts

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, whole or not at all; ``path`` is the file, or a directory to hold it."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(self._tokenizer.to_str(), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a tokenizer.json, or a directory with one. Raises DataError when there is none or it is damaged."""
        given = Path(path).expanduser()
        file = given / FILE_NAME if given.is_dir() else given
        if not file.is_file():
            raise DataError(f"{given}: expected a {FILE_NAME}, or a directory that holds one; there is none.")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{file}: expected a tokenizer of the Hugging Face tokenizers library: {error}.") from error
        return cls(tokenizer, _names_beside(file))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's splitting, no normaliser, no added space: lossless) of at most ``vocab_size`` ids.

    The first ids are SPECIAL_TOKENS, then the 256 bytes, then the merges. The same texts give the same tokenizer.
    """
    smallest = len(SPECIAL_TOKENS) + BYTES
    if vocab_size < smallest:
        raise DataError(
            f"expected a vocabulary of at least {smallest} tokens ({len(SPECIAL_TOKENS)} special tokens and {BYTES} "
            f"bytes), got {vocab_size}. Set data.tokenizer=bpe:N with a larger N."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer)


def _names_beside(file: Path) -> dict[str, str]:
    """bos_token, eos_token and pad_token of the tokenizer_config.json beside a tokenizer.json, where there is one."""
    config = file.with_name("tokenizer_config.json")
    if not config.is_file():
        return {}
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{config}: expected JSON: {error}.") from error
    if not isinstance(values, dict):
        raise DataError(f"{config}: expected a JSON object, got {type(values).__name__}.")
    names = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        value = values.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names


def _contains_type(node: Any, name: str) -> bool:
    if isinstance(node, dict):
        return node.get("type") == name or any(_contains_type(child, name) for child in node.values())
    return isinstance(node, list) and any(_contains_type(child, name) for child in node)
