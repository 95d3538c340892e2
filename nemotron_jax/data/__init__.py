"""Text, token files and blends -> packed batches. Start reading at pipeline.py."""

from nemotron_jax.data.batch import Batch
from nemotron_jax.data.pipeline import TrainData, build, evaluation_batches, load_tokenizer
from nemotron_jax.data.tokenizer import Tokenizer

__all__ = ["Batch", "Tokenizer", "TrainData", "build", "evaluation_batches", "load_tokenizer"]
