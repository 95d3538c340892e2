"""Zeros that sums and loops start with."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def zeros_after(x: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """Zeros that are made when ``x`` is there, not before.

    XLA makes equal constants once, as early as the first of them is needed: the sums of all layers that are not
    scanned, or the results of all their loops, would be on the device at a time. It does not see that half of a lowest
    bit is zero, in whole numbers.
    """
    bits = jax.lax.bitcast_convert_type(x[(0,) * x.ndim].astype(jnp.float32), jnp.uint32)
    return jnp.broadcast_to(((bits & 1) >> 1).astype(dtype), shape)
