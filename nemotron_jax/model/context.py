"""What a mixer is told beside its input: the traced arrays of one call."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Context:
    """Arrays that every mixer of a call shares. All are optional.

    Attributes:
      segment_ids: [B, T] int32, one document an id; 0 is padding. None: each row is one document.
      positions: [B, T] int32 position of each token in its document. No block reads it (NoPE); evaluation does.
      seed: uint32 scalar of this (step, microbatch, layer), for stochastic rounding.
      probes: dummy inputs of quantised matmuls by the weight's path in the mixer (``in_proj``): their gradients are the
        statistics of the operands (precision/quantized.py).
      lengths: [B] int32 tokens that the decode state already holds.
      new_tokens: [B] int32 tokens of this call that are real, the rest being padding on the right. None: all.
      slots: [B] int32 row of the decode state that serves each row of the batch. None: row b is b.
      page_table: [B, n] int32 pages of the key/value cache, in order. None: one page a row (contiguous).
      draft: leave the state of recurrent mixers where it is and keep the new inputs beside it, so that
        ``state.select_accepted`` can advance it by any number of them.
    """

    segment_ids: Array | None = None
    positions: Array | None = None
    seed: Array | None = None
    probes: dict[str, Array] | None = None
    lengths: Array | None = None
    new_tokens: Array | None = None
    slots: Array | None = None
    page_table: Array | None = None
    draft: bool = field(default=False, metadata={"static": True})

    def for_layer(self, index: int | Array) -> Context:
        """The context of one layer: its own seed, everything else shared."""
        return self if self.seed is None else replace(self, seed=mix_seed(self.seed, index))

    def of(self, name: str) -> tuple[Array | None, Array | None]:
        """The seed and the probe of one weight of this layer, by its path in the mixer.

        No two draw the same random bits; the weights of a name in all layers share a probe.
        """
        seed = None if self.seed is None else mix_seed(self.seed, zlib.crc32(name.encode()))
        return seed, None if self.probes is None else self.probes.get(name)

    def real_tokens(self, length: int) -> Array | None:
        """[B, T] bool, False on right padding; None when there is none."""
        if self.new_tokens is None:
            return None
        return jnp.arange(length)[None, :] < self.new_tokens[:, None]

    def counted_tokens(self, batch: int, length: int) -> Array:
        """[B, T] bool: the tokens that count in statistics, neither padding segments nor right padding."""
        real = self.real_tokens(length)
        counted = jnp.ones((batch, length), bool) if real is None else real
        return counted if self.segment_ids is None else counted & (self.segment_ids != 0)


def mix_seed(seed: Array, index: int | Array) -> Array:
    """A new uint32 seed from a seed and a number: one round of the murmur3 finaliser over both.

    https://github.com/aappleby/smhasher (MurmurHash3.cpp, fmix32) gives the constants.
    """
    x = seed.astype(jnp.uint32) ^ (jnp.uint32(index) * jnp.uint32(0x9E3779B9) + jnp.uint32(0x7F4A7C15))
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
