"""Short depthwise causal convolution over time, with an optional SiLU.

    pre_t = bias + sum_{j=0}^{K-1} w[:, j] x_{t-(K-1)+j}        y_t = silu(pre_t)        (per channel)

The last column of w reads the token itself. A tap counts only if the token that it reads is in the same document;
tokens before the row come from initial_state, which belongs to the document of token 0, and are zero without it.
The state is the last K - 1 inputs in time order.

"reference": shift, multiply, add; XLA fuses it into one pass, where a grouped convolution becomes padded copies.
"mosaic": see causal_conv1d_mosaic.py.

Shapes: B batch, T time, C channels, K taps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import causal_conv1d_mosaic
from pallas_kernels.cost import BF16, Cost
from pallas_kernels.dispatch import choose, require_shape
from pallas_kernels.segments import run_ids

ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {None: lambda pre: pre, "silu": jax.nn.silu}


# Decoding: "mosaic" leaves calls of fewer tokens to XLA, which fuses them with what stands around.
FEWEST_TOKENS = 16


def causal_conv1d(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = "silu",
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    return_final_state: bool = False,
    impl: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Convolve each channel of x over time; differentiable in all float inputs.

    Args:
      x: [B, T, C].
      w: [C, K].
      bias: [C] or None.
      activation: "silu" or None.
      initial_state: [B, K-1, C], the inputs before token 0, oldest first; None is zeros.
      segment_ids: [B, T] integers, compared for equality between neighbours only; None is one document a row.
      return_final_state: also return the last K - 1 inputs [B, K-1, C]; those before the start of the last
        document are zero.
      impl: implementation name, None to choose (`dispatch.OPS`).

    Returns:
      y [B, T, C] in x's dtype (computed in float32, or float64 for float64 inputs), and with return_final_state the
      state in initial_state's dtype, or x's without one.

    Raises:
      ValueError: shapes do not fit, unknown activation, or `impl` cannot run.
    """
    require_shape("causal_conv1d", "x", x, "[B, T, C]", (None,) * 3)
    require_shape("causal_conv1d", "w", w, "[C, K]", (x.shape[2], None))
    batch, time, channels = x.shape
    taps = w.shape[1]
    if bias is not None:
        require_shape("causal_conv1d", "bias", bias, "[C]", (channels,))
    if initial_state is not None:
        require_shape("causal_conv1d", "initial_state", initial_state, "[B, K-1, C]", (batch, taps - 1, channels))
    if segment_ids is not None:
        require_shape("causal_conv1d", "segment_ids", segment_ids, "[B, T]", (batch, time))
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation must be 'silu' or None, got {activation!r}")

    run = None if segment_ids is None else run_ids(segment_ids)
    chosen = choose("causal_conv1d", impl, unfit={"mosaic": causal_conv1d_mosaic.unfit(x, w)})
    y_BTC = _IMPLEMENTATIONS[chosen](x, w, bias, initial_state, run, activation=activation)
    if not return_final_state:
        return y_BTC
    state_BKC = final_state(x, initial_state, jnp.full((batch,), time, jnp.int32), taps)
    if run is not None:
        run_of_state = jnp.pad(run, ((0, 0), (taps - 1, 0)))[:, time:]  # the initial state is in run 0
        state_BKC = jnp.where((run_of_state == run[:, -1:])[..., None], state_BKC, 0)
    return y_BTC, state_BKC


def causal_conv1d_reference(
    x_BTC: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    state_BKC: jax.Array | None,
    run: jax.Array | None,
    *,
    activation: str | None,
) -> jax.Array:
    """Shift, multiply, add; run [B, T] from `run_ids`, or None for one document a row."""
    batch, time, channels = x_BTC.shape
    taps = w.shape[1]
    dtype = jnp.promote_types(jnp.result_type(x_BTC, w), jnp.float32)
    before_BKC = jnp.zeros((batch, taps - 1, channels), x_BTC.dtype) if state_BKC is None else state_BKC
    padded_BTC = jnp.concatenate([before_BKC.astype(dtype), x_BTC.astype(dtype)], axis=1)
    pre_BTC = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
    for tap in range(taps):
        read_BTC = padded_BTC[:, tap : tap + time]
        if run is not None:
            read_run = jnp.pad(run, ((0, 0), (taps - 1, 0)))[:, tap : tap + time]  # the initial state is in run 0
            read_BTC = jnp.where((read_run == run)[..., None], read_BTC, 0)
        pre_BTC = pre_BTC + w[:, tap].astype(dtype) * read_BTC
    return ACTIVATIONS[activation](pre_BTC).astype(x_BTC.dtype)


def _mosaic(x_BTC, w, bias, state_BKC, run, *, activation):
    if x_BTC.shape[1] < FEWEST_TOKENS:
        return causal_conv1d_reference(x_BTC, w, bias, state_BKC, run, activation=activation)
    return _kernels(activation == "silu", 0, x_BTC, w, bias, state_BKC, run)


def convolve_channels(
    x: jax.Array, first: int, w: jax.Array, bias: jax.Array, *, segment_ids: jax.Array | None = None
) -> jax.Array:
    """`causal_conv1d` with SiLU of the channels first .. first + C - 1 of x [B, T, W]: [B, T, C].

    The same as of x[:, :, first : first + C], which the kernels need not copy first.
    """
    own = x[:, :, first : first + w.shape[0]]
    run = None if segment_ids is None else run_ids(segment_ids)
    chosen = choose("causal_conv1d", unfit={"mosaic": causal_conv1d_mosaic.unfit(own, w)})
    if chosen == "mosaic" and x.shape[1] >= FEWEST_TOKENS:
        return _kernels(True, first, x, w, bias, None, run)
    return _IMPLEMENTATIONS[chosen](own, w, bias, None, run, activation="silu")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernels(silu, first, x_BTC, w, bias, state_BKC, run):
    return causal_conv1d_mosaic.forward(x_BTC, w, bias, state_BKC, run, silu=silu, first=first)


def _forward(silu, first, *operands):
    return _kernels(silu, first, *operands), operands  # the pre-activation is computed again


def _backward(silu, first, operands, dy_BTC):
    x_BTC, w, bias, state_BKC, run = operands
    dx_BTC, *rest = causal_conv1d_mosaic.backward(x_BTC, w, bias, state_BKC, run, dy_BTC, silu=silu, first=first)
    others = first, x_BTC.shape[2] - first - w.shape[0]
    dx_BTC = jnp.pad(dx_BTC, ((0, 0), (0, 0), others))  # fused with the gradients of the channels beside these
    grads = (None if z is None else dz.astype(z.dtype) for z, dz in zip((w, bias, state_BKC), rest, strict=True))
    return dx_BTC, *grads, None


_kernels.defvjp(_forward, _backward)


def final_state(x: jax.Array, initial_state: jax.Array | None, lengths: jax.Array, taps: int) -> jax.Array:
    """Return the last taps - 1 inputs before position lengths[b] of each row, for right-padded prompts.

    Args:
      x: [B, T, C].
      initial_state: [B, taps-1, C] inputs before token 0 (reached where lengths[b] < taps - 1), None is zeros.
      lengths: [B] int, 0 <= lengths[b] <= T.
      taps: K, the width of the convolution.

    Returns:
      [B, taps-1, C] in time order, in initial_state's dtype, or x's without one.
    """
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype)
    # Input t lies at t + taps - 1 of the concatenation, so the wanted window starts at lengths[b].
    index = lengths[:, None] + jnp.arange(taps - 1)
    padded_BTC = jnp.concatenate([initial_state, x.astype(initial_state.dtype)], axis=1)
    return jnp.take_along_axis(padded_BTC, index[..., None], axis=1)


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"mosaic": _mosaic, "reference": causal_conv1d_reference}


class Case(NamedTuple):
    """Shapes and features of one test or benchmark case."""

    name: str
    batch: int
    time: int
    channels: int
    taps: int = 4
    bias: bool = True
    activation: str | None = "silu"
    packed: bool = False
    initial_state: bool = False


CASES = (
    Case("plain", 2, 19, 6),
    Case("no_bias_no_activation", 1, 8, 3, bias=False, activation=None),
    Case("shorter_than_taps", 2, 2, 5, initial_state=True),
    Case("one_tap", 2, 7, 3, taps=1),
    Case("packed", 2, 23, 6, packed=True),
    Case("packed_state", 2, 23, 6, packed=True, initial_state=True),
)


def example_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[tuple[jax.Array | None, ...], dict[str, Any]]:
    """Random (args, kwargs) of `causal_conv1d` for a case; packed cases hold one-token documents."""
    random = np.random.default_rng(seed)
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)

    x = normal(case.batch, case.time, case.channels)
    w = normal(case.channels, case.taps)
    bias = normal(case.channels) if case.bias else None
    kwargs: dict[str, Any] = {"activation": case.activation}
    if case.packed:
        changed = random.random((case.batch, case.time)) < 0.35
        kwargs["segment_ids"] = jnp.asarray(np.cumsum(changed, axis=1) % 3, jnp.int32)
    if case.initial_state:
        kwargs["initial_state"] = normal(case.batch, case.taps - 1, case.channels)
    return (x, w, bias), kwargs


# Channels of x, B and C in the released models.
BENCHMARKS = (
    Case("nano", 2, 8192, 6144),
    Case("nano_packed", 2, 8192, 6144, packed=True),
    Case("super", 2, 8192, 10240),
    Case("ultra", 1, 8192, 18432),
    Case("nano-4b", 2, 8192, 9728),
)


def cost(case: Case) -> Cost:
    """Forward reads x and writes y; backward reads x and the gradient of y and writes that of x."""
    elements = case.batch * case.time * case.channels
    taps = 2 * case.taps * elements
    return Cost(taps, 2 * BF16 * elements, 3 * taps, 3 * BF16 * elements)
