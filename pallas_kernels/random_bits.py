"""Random bytes for stochastic rounding: a hash of a seed and of an element's place, the same wherever it is computed.

Shapes: M tokens, N columns.
"""

import jax.numpy as jnp
from jax import Array, lax

DGRAD, WGRAD = 1, 2  # streams: of the output's gradient, for the product that it is rounded for


def random_bytes(seed: Array, stream: int, token_M: Array, columns: int) -> Array:
    """uint8 [M, N] that depend on seed, stream, token (uint32) and column alone; four of them from one hash."""
    quarter = -(-columns // 4)
    word = word_bits(token_bits(stream_bits(seed, stream), token_M[:, None]), lax.iota(jnp.uint32, quarter)[None])
    parts = [(word >> shift).astype(jnp.uint8) for shift in (0, 8, 16, 24)]
    return jnp.stack(parts, axis=-1).reshape(len(token_M), 4 * quarter)[:, :columns]


def stream_bits(seed: Array, stream: int) -> Array:
    """uint32: what `token_bits` starts from."""
    return _mix(seed.astype(jnp.uint32) + jnp.uint32(stream * 0x9E3779B9 % 2**32))


def token_bits(bits_of_stream: Array, token: Array) -> Array:
    """uint32: what `word_bits` starts from."""
    return _mix(bits_of_stream + token)


def word_bits(bits_of_token: Array, word: Array) -> Array:
    """uint32: the bytes of columns 4 word .. 4 word + 3 of a token, the first one lowest."""
    return _mix(bits_of_token ^ word)


def _mix(x: Array) -> Array:
    """The finaliser of MurmurHash3: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
