"""Backward pass of `causal_conv1d` for Hopper (Pallas Mosaic GPU): one pass over x and dy, in float32 registers.

    dpre_t = dy_t act'(pre_t)       dx_t = sum_j w_j dpre_{t+K-1-j}       dw_j = sum_t dpre_t x_{t-(K-1)+j}

XLA needs three passes and a float32 copy of dpre (22 bytes an element where 6 are the least): it cannot carry a
window over time. Here one warpgroup owns COLUMNS channels of CHUNK tokens and walks over time with the last K - 1
inputs, the K - 1 input gradients that are still incomplete and the sums for dw and dbias in registers. The sums of
each chunk go to device memory and are added afterwards, in a fixed order: the result is the same in every run.

Shapes: B batch, T time, C channels, K taps, N chunks of time, S = K + 1 sums (dw and dbias).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import LOG2_E, Interpret, kernel_call

COLUMNS = 256  # channels of a warpgroup: two a thread
CHUNK = 256  # tokens of a warpgroup; K - 1 of the next chunk are read again
GROUP = 8  # rows loaded together: their latencies overlap


def unfit(x_BTC: jax.Array, w: jax.Array) -> str:
    """Why the kernel cannot take these operands, or ""."""
    if x_BTC.dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {x_BTC.dtype}"
    if x_BTC.shape[2] % COLUMNS:
        return f"the channels must be a multiple of {COLUMNS}, got {x_BTC.shape[2]}"
    if not 1 < w.shape[1] <= GROUP:
        return f"w must have 2 to {GROUP} taps, got {w.shape[1]}"
    return ""


def backward(
    x_BTC: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    state_BKC: jax.Array | None,
    run: jax.Array | None,
    dy_BTC: jax.Array,
    *,
    silu: bool,
    chunk: int = CHUNK,
    interpret: Interpret = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients (dx [B, T, C] in x's dtype, dw [C, K], dbias [C], dstate [B, K-1, C], all three float32).

    Arguments as in `causal_conv1d_reference`; dy [B, T, C] is the cotangent of y, `silu` whether there is a SiLU.
    `interpret`: `plgpu.InterpretGPUParams` runs it on the CPU.
    """
    batch, time, channels = x_BTC.shape
    taps = w.shape[1]
    tail = -time % GROUP
    if tail:  # zero cotangents add nothing
        x_BTC, dy_BTC = (jnp.pad(z, ((0, 0), (0, tail), (0, 0))) for z in (x_BTC, dy_BTC))
        run = None if run is None else jnp.pad(run, ((0, 0), (0, tail)), mode="edge")
    kernel = _kernel(
        (batch, time + tail, channels),
        taps,
        chunk,
        silu,
        bias is not None,
        state_BKC is not None,
        run is not None,
        interpret,
    )
    operands = [x_BTC, dy_BTC.astype(x_BTC.dtype), w.astype(jnp.float32).T]
    operands += [] if bias is None else [bias.astype(jnp.float32)]
    operands += [] if state_BKC is None else [state_BKC.astype(jnp.float32)]
    operands += [] if run is None else [run]
    dx_BTC, sums_BNSC, dstate_BKC = kernel(*operands)
    sums = sums_BNSC.sum((0, 1))
    return dx_BTC[:, :time], sums[:taps].T, sums[taps], dstate_BKC


@functools.lru_cache
def _kernel(shape, taps, chunk, silu, has_bias, has_state, has_run, interpret):
    batch, time, channels = shape
    chunks = -(-time // chunk)
    before = taps - 1
    float32, int32 = jnp.float32, jnp.int32
    layout = plgpu.Layout.WG_STRIDED((COLUMNS,), vec_size=COLUMNS // 128)

    def body(x_g, dy_g, w_g, *rest):
        *optional, dx_g, sums_g, dstate_g = rest
        given = {"bias": has_bias, "state": has_state, "run": has_run}
        refs = dict(zip((name for name in given if given[name]), optional, strict=True))
        b, n = lax.axis_index("b"), lax.axis_index("n")
        columns = pl.ds(lax.axis_index("c") * COLUMNS, COLUMNS)
        begin = n * chunk
        end = jnp.minimum(begin + chunk, time)

        def load(ref):
            return plgpu.load(ref, layout=layout, optimized=False).astype(float32)

        def select(condition, z, otherwise):  # the lowering broadcasts no scalars by itself
            return jnp.where(lax.broadcast(condition, (COLUMNS,)), z, otherwise)

        zero = plgpu.layout_cast(jnp.zeros((COLUMNS,), float32), layout)
        w_K = [load(w_g.at[k, columns]) for k in range(taps)]
        bias_C = load(refs["bias"].at[columns]) if has_bias else zero

        def x_at(t):
            """Row t of x, or of the initial state where t < 0."""
            x_C = load(x_g.at[b, jnp.maximum(t, 0), columns])
            if not has_state:
                return select(t >= 0, x_C, zero)
            return select(t >= 0, x_C, load(refs["state"].at[b, jnp.minimum(t + before, before - 1), columns]))

        def token(carry, x_first, dy_t, same):
            """Token t -> (dx_t, the carry of token t - 1).

            The carry holds x_{t-K+2} .. x_t, the incomplete dx_{t-K+2} .. dx_t and the sums; x_first is x_{t-K+1}.
            same: whether the tokens t-K+1 .. t-1 are in t's document (one scalar each), or None if all are.
            """
            xs, dxs, sums = carry
            window = [x_first, *xs]
            if same is not None:
                window = [*(select(s, z, zero) for s, z in zip(same, window, strict=False)), window[-1]]
            pre = bias_C
            for w_k, z in zip(w_K, window, strict=True):
                pre += w_k * z
            dpre = dy_t
            if silu:
                # 1 / (1 + e) as the square of a reciprocal root: two fast instructions, a division takes about ten.
                root = lax.rsqrt(1.0 + jnp.exp2(-LOG2_E * pre))
                sigmoid = root * root
                dpre *= sigmoid * (1.0 + pre * (1.0 - sigmoid))
            sums = [*(s + dpre * z for s, z in zip(sums, window, strict=False)), sums[taps] + dpre]
            to_dx = [w_k * dpre for w_k in w_K]
            if same is not None:
                to_dx = [*(select(s, z, zero) for s, z in zip(same, to_dx, strict=False)), to_dx[-1]]
            dxs = [to_dx[0], *(z + added for z, added in zip(dxs, to_dx[1:], strict=True))]
            return dxs[-1], ([x_first, *xs[:-1]], dxs[:-1], sums)

        def same_at(t):
            """Initial states are in run 0, as token 0 is."""
            if not has_run:
                return None
            run_g = refs["run"]
            return [run_g[b, jnp.maximum(t - d, 0)] == run_g[b, t] for d in range(before, 0, -1)]

        def store(t, dx_t):
            dx_g.at[b, t, columns][...] = dx_t.astype(dx_g.dtype)

        def group(i, carry):
            first = end - (i + 1) * GROUP
            rows = range(GROUP - 1, -1, -1)

            def together(carry):
                xs = [x_at(first + row - before) for row in rows]
                dys = [load(dy_g.at[b, first + row, columns]) for row in rows]
                for row, x_first, dy_t in zip(rows, xs, dys, strict=True):
                    dx_t, carry = token(carry, x_first, dy_t, None)
                    store(first + row, dx_t)
                return carry

            def one_by_one(carry):
                def step(j, carry):
                    t = first + (GROUP - 1 - j)
                    dx_t, carry = token(carry, x_at(t - before), load(dy_g.at[b, t, columns]), same_at(t))
                    store(t, dx_t)
                    return carry

                return lax.fori_loop(0, GROUP, step, carry)

            if not has_run:
                return together(carry)
            run_g = refs["run"]
            one_document = run_g[b, jnp.maximum(first - before, 0)] == run_g[b, first + GROUP - 1]
            return lax.cond(one_document, together, one_by_one, carry)

        # What the first tokens of the next chunk add to the last dx of this one; the sums belong to that chunk.
        no_sums = [zero] * (taps + 1)
        carry = ([x_at(jnp.minimum(end + i, time - 1)) for i in range(before)], [zero] * before, no_sums)
        for i in range(before - 1, -1, -1):
            t = jnp.minimum(end + i, time - 1)
            dy_t = select(end < time, load(dy_g.at[b, t, columns]), zero)
            _, (xs, dxs, _) = token(carry, x_at(end + i - before), dy_t, same_at(t))
            carry = (xs, dxs, no_sums)
        _, dxs, sums = lax.fori_loop(0, lax.div(end - begin, int32(GROUP)), group, carry)
        for k, total in enumerate(sums):
            sums_g.at[b, n, k, columns][...] = total

        @pl.when(n == 0)
        def before_the_row():
            for i, dx_t in enumerate(dxs):
                dstate_g.at[b, i, columns][...] = dx_t

    return kernel_call(
        body,
        warpgroups=1,
        interpret=interpret,
        approx_math=True,
        auto_barriers=False,
        out_type=[
            jax.ShapeDtypeStruct(shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, chunks, taps + 1, channels), float32),
            jax.ShapeDtypeStruct((batch, before, channels), float32),
        ],
        grid=(channels // COLUMNS, chunks, batch),
        grid_names=("c", "n", "b"),
    )
