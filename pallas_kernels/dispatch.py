"""The one place that chooses an implementation of an operation, and the shape check that all of them share.

`OPS` lists, for each op, its implementations in order of preference. An implementation is a name and a support
check: a function of no arguments that returns "" where the implementation runs, or the reason why it does not.
``impl=None`` takes the first that runs. To add one, write the function in the op's file, name it in that file's
table, and put its name and check here, before the implementations that it beats.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

SupportCheck = Callable[[], str]


def _anywhere() -> str:
    return ""


OPS: dict[str, dict[str, SupportCheck]] = {
    "ssd": {"reference": _anywhere},
    "causal_conv1d": {"reference": _anywhere},
    "grouped_matmul": {"blocked": _anywhere, "reference": _anywhere},
    "attention": {"reference": _anywhere},
    "decode_attention": {"reference": _anywhere},
    "permute": {"reference": _anywhere},
    "unpermute": {"reference": _anywhere},
}


def choose(op: str, impl: str | None = None) -> str:
    """Return the name of the implementation of `op` to run: `impl` if given, else the first that runs here.

    Raises ValueError when `op` or `impl` is unknown, or when `impl` cannot run on this platform.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known ops: {', '.join(OPS)}")
    known = OPS[op]
    if impl is None:
        return next(name for name, unsupported in known.items() if not unsupported())
    if impl not in known:
        raise ValueError(f"{op} has no implementation {impl!r}; known: {', '.join(known)} (impl=None picks one)")
    reason = known[impl]()
    if reason:
        runnable = ", ".join(name for name, unsupported in known.items() if not unsupported())
        raise ValueError(
            f"{op}: implementation {impl!r} cannot run on {jax.default_backend()}: {reason}. "
            f"Use impl=None, or one that runs here: {runnable}"
        )
    return impl


def describe() -> dict[str, str]:
    """Return {op: name of the implementation that impl=None picks on this platform}, for the start-up table."""
    return {op: choose(op) for op in OPS}


def require_shape(op: str, name: str, array: jax.Array, legend: str, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `array` has the `expected` shape (None: any size)."""
    shape = jnp.shape(array)
    if len(shape) != len(expected) or any(e not in (None, s) for e, s in zip(expected, shape, strict=True)):
        want = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} must have shape {legend} = [{want}], got {list(shape)}")
