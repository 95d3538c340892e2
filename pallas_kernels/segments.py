"""Documents packed into one row, and the one shape check that all ops share."""

import jax
import jax.numpy as jnp


def run_ids(segment_ids: jax.Array) -> jax.Array:
    """[B, T] segment ids -> [B, T] int32 run numbers: how often the id has changed up to each token (first run 0).

    Two tokens are in the same document if and only if their run numbers are equal: an id that comes back later in
    the row is a new document. The numbers never decrease, which is what chunked algorithms rely on.
    """
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def require_shape(op: str, name: str, array: jax.Array, legend: str, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `array` has the `expected` shape (None: any size)."""
    shape = jnp.shape(array)
    if len(shape) != len(expected) or any(e not in (None, s) for e, s in zip(expected, shape, strict=True)):
        want = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} must have shape {legend} = [{want}], got {list(shape)}")
