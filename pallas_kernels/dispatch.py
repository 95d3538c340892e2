"""The one place that chooses an implementation of an operation, and the shape check that all of them share.

`OPS` lists, for each op, its implementations in order of preference. An implementation is a name and a support
check: a function of no arguments that returns "" where the implementation runs, or the reason why it does not.
``impl=None`` takes the first that runs. To add one, write the function in the op's file, name it in that file's
table, and put its name and check here, before the implementations that it beats. What depends on the operands
(shapes, dtypes) is said by the op itself, as `unfit` reasons of `choose`.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

SupportCheck = Callable[[], str]

_log = logging.getLogger(__name__)

# The GPU that programs are compiled for where none is present ("sm_90a"), or None: the devices of this process.
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Choose implementations for the GPU ``target`` ("sm_90a", "sm_100a"), whatever devices this process has."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def _anywhere() -> str:
    return ""


@functools.cache
def _local_target() -> str:
    """The architecture of this process's first device ("sm_90a"), or "" when it is no GPU."""
    if jax.default_backend() != "gpu":
        return ""
    return f"sm_{str(jax.devices()[0].compute_capability).replace('.', '')}a"


def on_gpu() -> bool:
    """Whether programs run on, or are compiled for, a GPU."""
    return bool(_target.get()) or jax.default_backend() == "gpu"


def on_hopper() -> str:
    """ "" when programs run on (or are compiled for) a GPU of compute capability 9.0, else the reason."""
    target = _target.get() or _local_target()
    return "" if target == "sm_90a" else "needs an NVIDIA GPU of compute capability 9.0"


def on_blackwell() -> str:
    """ "" when programs run on (or are compiled for) a GPU of compute capability 10.x, else the reason."""
    target = _target.get() or _local_target()
    return "" if target in ("sm_100a", "sm_103a") else "needs an NVIDIA GPU of compute capability 10.x"


OPS: dict[str, dict[str, SupportCheck]] = {
    "ssd": {"mosaic": on_hopper, "reference": _anywhere},
    "causal_conv1d": {"mosaic": on_hopper, "reference": _anywhere},
    "grouped_matmul": {"mosaic": on_hopper, "blocked": _anywhere, "reference": _anywhere},
    "grouped_mlp": {"mosaic": on_hopper, "blocked": _anywhere, "reference": _anywhere},
    "attention": {"cudnn": on_hopper, "reference": _anywhere},
    "decode_attention": {"mosaic": on_hopper, "cudnn": on_hopper, "reference": _anywhere},
    "take_rows": {"mosaic": on_hopper, "reference": _anywhere},
    "block_scaled_matmul": {"mosaic": on_hopper, "reference": _anywhere},
    "nvfp4_matmul": {"cudnn": on_blackwell, "reference": _anywhere},
    "quantize_operands": {"mosaic": on_hopper, "reference": _anywhere},
    "quantize_expert_operands": {"mosaic": on_hopper, "reference": _anywhere},
    "quantize_tiles": {"mosaic": on_hopper, "reference": _anywhere},
    "quantize": {"mosaic": on_hopper, "reference": _anywhere},
    "permute": {"reference": _anywhere, "mosaic": on_hopper},
    "unpermute": {"reference": _anywhere, "mosaic": on_hopper},
}


def choose(op: str, impl: str | None = None, *, unfit: Mapping[str, str] | None = None) -> str:
    """Return the name of the implementation of `op` to run: `impl` if given, else the first that runs here.

    Args:
      op: name of the operation, a key of `OPS`.
      impl: the implementation asked for, or None.
      unfit: implementations that cannot take these operands, with the reason ("" where they can).

    Raises ValueError when `op` or `impl` is unknown, or when `impl` cannot run on this platform or these operands.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known ops: {', '.join(OPS)}")
    known = OPS[op]
    unfit = unfit or {}

    def reason(name: str) -> str:
        platform = known[name]()
        if platform:
            return f"cannot run on {jax.default_backend()}: {platform}"
        return f"cannot take these operands: {unfit[name]}" if unfit.get(name) else ""

    if impl is None:
        chosen = next(name for name in known if not reason(name))
        for name in known:
            if name == chosen:
                break
            if not known[name]():  # a kernel for this GPU was passed over
                _say_once(f"{op}: {chosen!r} runs in place of {name!r}, which {reason(name)}")
        return chosen
    if impl not in known:
        raise ValueError(f"{op} has no implementation {impl!r}; known: {', '.join(known)} (impl=None picks one)")
    if reason(impl):
        runnable = ", ".join(name for name in known if not reason(name))
        raise ValueError(
            f"{op}: implementation {impl!r} {reason(impl)}. Use impl=None, or one that runs here: {runnable}"
        )
    return impl


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def describe() -> dict[str, str]:
    """Return {op: name of the implementation that impl=None picks on this platform}, for the start-up table."""
    return {op: choose(op) for op in OPS}


def sharded() -> str:
    """Why a kernel cannot take operands that XLA shards, or "": of an op that is not called inside shard_map alone."""
    mesh = jax.sharding.get_abstract_mesh()
    outside = not mesh.empty and mesh.size > 1 and set(mesh.manual_axes) != set(mesh.axis_names)
    return "a mesh of several devices, outside shard_map" if outside else ""


def require_shape(op: str, name: str, array: Any, legend: str, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `array` (or packed weight) has the `expected` shape (None: any size)."""
    shape = array.shape
    if len(shape) != len(expected) or any(e not in (None, s) for e, s in zip(expected, shape, strict=True)):
        want = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} must have shape {legend} = [{want}], got {list(shape)}")
