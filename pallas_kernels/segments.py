"""Documents packed into one row."""

import jax
import jax.numpy as jnp


def run_ids(segment_ids: jax.Array) -> jax.Array:
    """[B, T] segment ids -> [B, T] int32 run numbers: how often the id has changed up to each token (first run 0).

    Two tokens are in the same document if and only if their run numbers are equal: an id that comes back later in
    the row is a new document. The numbers never decrease, which is what chunked algorithms rely on.
    """
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
