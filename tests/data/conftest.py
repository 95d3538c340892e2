"""A tiny tokenizer, and tiny files to read with it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from nemotron_jax.data import megatron
from nemotron_jax.data.tokenizer import Tokenizer, train_bpe

TEXT = "the cat sat on the mat and the dog sat on the cat\n    return self.value + other.value\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT] * 3, 300)


@pytest.fixture
def documents_of(tmp_path: Path) -> Callable[[str, Sequence[Sequence[int]]], str]:
    """Writes documents of token ids to tmp_path/NAME.bin/.idx and returns the prefix."""

    def write(name: str, documents: Sequence[Sequence[int]]) -> str:
        with megatron.Writer(tmp_path / name, np.uint16) as writer:
            for document in documents:
                writer.add(document)
        return str(tmp_path / name)

    return write
