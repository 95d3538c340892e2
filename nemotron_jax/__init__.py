"""Nemotron 3 in JAX: hybrid Mamba-2, attention and mixture-of-experts language models."""

from __future__ import annotations

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """``nemotron_jax.load`` on demand, so that importing the package does not import JAX."""
    if name == "load":
        from nemotron_jax.checkpoint.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
