"""Block "M": the Mamba-2 mixer (Megatron-LM, core/ssm/mamba_mixer.py).

    [z | x | B | C | dt] = in_proj(h);  [x | B | C] = silu(conv1d([x | B | C]))
    dt = softplus(dt + dt_bias), never clamped;  A = -exp(A_log)
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t
    out_proj(gated_norm(y, z))

Shapes: B batch, T time, D model width, H heads, G groups, P head dim, N SSM state, K convolution width,
W convolution channels (x, B and C).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from nemotron_jax.config import MambaConfig, ModelConfig
from nemotron_jax.model.context import Context
from nemotron_jax.model.linear import Init, Linear, Scope, constant, normal, uniform
from nemotron_jax.model.state import MambaState, MambaWindow, put_rows, take_rows
from nemotron_jax.parallel.context import conv_inputs_before, in_parts, state_before
from nemotron_jax.parallel.local import per_device
from nemotron_jax.parallel.mesh import shards
from nemotron_jax.precision.matmul import matmul
from pallas_kernels import causal_conv1d, ssd
from pallas_kernels.causal_conv1d import convolve_channels, final_state
from pallas_kernels.packed import side_by_side
from pallas_kernels.ssd import ssd_step


class InProj(nnx.Module):
    """One logical projection [z | x | B | C | dt] kept in five leaves, each sharded over its own kind of channel.

    Sharding the fused output costs five permutes a block (measured on 8 devices); as five leaves it costs none.
    """

    def __init__(self, scope: Scope, n_in: int, config: MambaConfig, std: float) -> None:
        group_channels = config.num_groups * config.state_size

        def leaf(name: str, n_out: int, axis: str) -> nnx.Param:
            return scope.param(name, (n_in, n_out), ("embed", axis), normal(std))

        self.z = leaf("z", config.inner_size, "heads")
        self.x = leaf("x", config.inner_size, "heads")
        self.B = leaf("B", group_channels, "groups")
        self.C = leaf("C", group_channels, "groups")
        self.dt = leaf("dt", config.num_heads, "heads")
        self.precision = scope.precision(n_in, 2 * config.inner_size + 2 * group_channels + config.num_heads)

    def __call__(self, h: Array, seed: Array | None, probe: Array | None) -> tuple[list[Array], Array | None]:
        """z, x, B, C and dt; and the product that holds all of them, where there is one and a device has it whole."""
        leaves = [self.z[...], self.x[...], self.B[...], self.C[...], self.dt[...]]
        # The leaves of a quantised projection are the one tensor they are on disk, whose blocks share an amax.
        if shards("heads") > 1 and not self.precision.format:
            return [matmul(h, leaf, self.precision, seed) for leaf in leaves], None
        fused = matmul(h, side_by_side(leaves), self.precision, seed, probe)
        borders = [sum(leaf.shape[1] for leaf in leaves[: i + 1]) for i in range(len(leaves) - 1)]
        return jnp.split(fused, borders, axis=-1), fused if shards("heads") == 1 else None


class Conv1d(nnx.Module):
    """Depthwise causal convolution over [x | B | C], in three leaves for the same reason as InProj.

    Initialised as torch does (kaiming uniform with a = sqrt 5, fan-in K): U(+-1/sqrt(K)) for weights and biases.
    """

    def __init__(self, scope: Scope, config: MambaConfig) -> None:
        init = uniform(-1 / math.sqrt(config.conv_kernel), 1 / math.sqrt(config.conv_kernel))
        group_channels = config.num_groups * config.state_size
        kinds = (("x", config.inner_size, "heads"), ("B", group_channels, "groups"), ("C", group_channels, "groups"))
        self.weight: nnx.Dict = nnx.Dict()
        self.bias: nnx.Dict = nnx.Dict()
        for kind, channels, axis in kinds:
            self.weight[kind] = scope.param(f"weight/{kind}", (channels, config.conv_kernel), (axis, "norm"), init)
            self.bias[kind] = scope.param(f"bias/{kind}", (channels,), (axis,), init)

    def __call__(self, inputs: list[Array], state_BKW: Array | None, segment_ids: Array | None) -> list[Array]:
        """silu(conv) of x, B and C, [B, T, channels] each; the state holds the three side by side.

        Three calls, since what uses the results wants them apart: for one call, their gradients would have to be put
        together first, a copy of all of them.
        """
        kinds = "xBC"
        borders = [sum(z.shape[2] for z in inputs[: i + 1]) for i in range(len(kinds) - 1)]
        states = [None] * len(kinds) if state_BKW is None else jnp.split(state_BKW, borders, axis=-1)
        weights = [self.weight[kind] for kind in kinds]
        cut = state_BKW is None and in_parts(inputs[0].shape[1])

        def convolve(segment_ids: Array | None, *operands: Any) -> list[Any]:
            inputs, weights, biases, states = (list(operands[i : i + 3]) for i in range(0, 12, 3))
            if cut:
                states = conv_inputs_before(inputs, segment_ids, weights[0].shape[1])
            return [
                causal_conv1d(z, weight, bias, initial_state=state, segment_ids=segment_ids)
                for z, weight, bias, state in zip(inputs, weights, biases, states, strict=True)
            ]

        channels = [weight.axes[0] for weight in weights]
        over_time = [("batch", "time", axis) for axis in channels]
        run = per_device(
            convolve,
            [
                ("batch", "time"),
                *over_time,
                *((axis, None) for axis in channels),
                *((axis,) for axis in channels),
                *(("batch", None, axis) for axis in channels),
            ],
            over_time,
            whole=() if cut else ("time",),
        )
        biases = [self.bias[kind] for kind in kinds]
        return run(segment_ids, *inputs, *(w[...] for w in weights), *(b[...] for b in biases), *states)

    def of_projected(self, projected: Array, first: int, segment_ids: Array | None) -> list[Array]:
        """The same without a state, of the channels from `first` on: x, B and C need not be copied out for it."""
        kinds = "xBC"

        def convolve(segment_ids: Array | None, projected: Array, *operands: Array) -> list[Array]:
            outputs, begin = [], first
            for weight, bias in zip(operands[:3], operands[3:], strict=True):
                outputs.append(convolve_channels(projected, begin, weight, bias, segment_ids=segment_ids))
                begin += weight.shape[0]
            return outputs

        over_time = ("batch", "time", None)
        run = per_device(
            convolve,
            [("batch", "time"), over_time, *((None, None),) * 3, *((None,),) * 3],
            [over_time] * 3,
            whole=("time",),
        )
        return run(segment_ids, projected, *(self.weight[k][...] for k in kinds), *(self.bias[k][...] for k in kinds))


class GatedNorm(nnx.Module):
    """RMS norm of y * silu(z) over each group's channels; the weight is multiplied after the cast (unlike RMSNorm)."""

    def __init__(self, scope: Scope, config: MambaConfig, eps: float) -> None:
        self.weight = scope.param("weight", (config.inner_size,), ("heads",), constant(1.0))
        self.num_groups = config.num_groups
        self.eps = eps

    def __call__(self, y: Array, z: Array) -> Array:
        return _gated_norm(self.num_groups, self.eps, y, z, self.weight[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated_norm(num_groups: int, eps: float, y: Array, z: Array, weight: Array) -> Array:
    return _gated_norm_fwd(num_groups, eps, y, z, weight)[0]


def _in_groups(x: Array, num_groups: int) -> Array:
    """Float32 [..., groups, channels of a group]."""
    return x.astype(jnp.float32).reshape(*x.shape[:-1], num_groups, -1)


def _gated_norm_fwd(num_groups: int, eps: float, y: Array, z: Array, weight: Array) -> tuple[Array, tuple[Array, ...]]:
    gated = _in_groups(y, num_groups) * jax.nn.silu(_in_groups(z, num_groups))
    scale = jax.lax.rsqrt(jnp.mean(gated * gated, axis=-1, keepdims=True) + eps)
    out = weight.astype(y.dtype) * (gated * scale).reshape(y.shape).astype(y.dtype)
    return out, (y, z, weight, scale)


def _gated_norm_bwd(
    num_groups: int, _: float, saved: tuple[Array, Array, Array, Array], d: Array
) -> tuple[Array, Array, Array]:
    """From y, z and one number a group: autodiff would keep the float32 product of y and silu(z), and read it thrice.

    Left to itself XLA makes that product in the pass that sums over the groups and stores it for the next; behind the
    first barrier it is another product, made again where it is used. The second keeps the two gradients in one pass.
    """
    y, z, weight, scale = saved
    z32, d32 = (_in_groups(x, num_groups) for x in (z, d))
    gate = jax.nn.sigmoid(z32)
    d_normed = d32 * _in_groups(weight.astype(y.dtype), num_groups)
    along = scale * jnp.mean(d_normed * _in_groups(y, num_groups) * z32 * gate, axis=-1, keepdims=True)
    y, along = jax.lax.optimization_barrier((y, along))
    y32 = _in_groups(y, num_groups)
    normed = y32 * z32 * gate * scale
    d_gated = scale * (d_normed - normed * along)
    d_weight = (d32 * normed).sum(tuple(range(d.ndim - 1))).reshape(weight.shape)
    d_y = (d_gated * z32 * gate).reshape(y.shape).astype(y.dtype)
    d_z = (d_gated * y32 * gate * (1 + z32 * (1 - gate))).reshape(z.shape).astype(z.dtype)
    d_y, d_z = jax.lax.optimization_barrier((d_y, d_z))
    return d_y, d_z, d_weight.astype(weight.dtype)


_gated_norm.defvjp(_gated_norm_fwd, _gated_norm_bwd)


def _dt_bias_init(config: MambaConfig) -> Init:
    """softplus^-1 of dt = exp(U[log min, log max]), at least the floor."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
        dt = jnp.maximum(dt, config.time_step_floor)
        return dt + jnp.log(-jnp.expm1(-dt))

    return init


def _a_log_init(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, 16.0))


def _uncut_heads(config: MambaConfig) -> tuple[str, ...]:
    """Logical axes that stay whole: a device's heads must be those of its groups."""
    return ("heads", "groups") if config.num_groups % shards("groups") else ()


class Mamba2(nnx.Module):
    """See the top of the file. Recurrence, dt, A and D are float32 whatever the recipe."""

    def __init__(self, scope: Scope, config: ModelConfig) -> None:
        mamba = config.mamba
        self.config = mamba
        self.in_proj = InProj(scope / "in_proj", config.hidden_size, mamba, config.init_std)
        self.conv1d = Conv1d(scope / "conv1d", mamba)
        self.dt_bias = scope.param("dt_bias", (mamba.num_heads,), ("heads",), _dt_bias_init(mamba))
        self.A_log = scope.param("A_log", (mamba.num_heads,), ("heads",), _a_log_init)
        self.D = scope.param("D", (mamba.num_heads,), ("heads",), constant(1.0))
        self.norm = GatedNorm(scope / "norm", mamba, config.norm_eps)
        self.out_proj = Linear(
            scope / "out_proj", mamba.inner_size, config.hidden_size, ("heads", "embed"), config.output_init_std
        )

    def __call__(
        self, h_BTD: Array, ctx: Context, state: MambaState | None
    ) -> tuple[Array, MambaState | None, dict[str, Array]]:
        """h [B, T, D] -> (y [B, T, D], new state, {})."""
        config = self.config
        batch, time = h_BTD.shape[:2]
        (z, *conv_inputs, dt), projected = self.in_proj(h_BTD, *ctx.of("in_proj"))
        rows = None if state is None else take_rows(state, ctx.slots)
        if rows is None and projected is not None and not in_parts(time):
            x, B, C = self.conv1d.of_projected(projected, z.shape[-1], ctx.segment_ids)
        else:
            x, B, C = self.conv1d(conv_inputs, None if rows is None else rows.conv_BKW, ctx.segment_ids)
        x_BTHP = x.reshape(batch, time, config.num_heads, config.head_dim)
        B_BTGN = B.reshape(batch, time, config.num_groups, config.state_size)
        C_BTGN = C.reshape(batch, time, config.num_groups, config.state_size)
        dt_BTH = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...])
        real = ctx.real_tokens(time)
        if real is not None:
            dt_BTH = jnp.where(real[..., None], dt_BTH, 0)
        A = -jnp.exp(self.A_log[...])

        y_BTHP, ssm_BHPN = self._scan(x_BTHP, dt_BTH, A, B_BTGN, C_BTGN, rows, ctx)
        new_state = None
        if state is not None and rows is not None:
            conv_BTW = jnp.concatenate(conv_inputs, axis=-1)
            if ctx.draft and ctx.slots is not None:
                raise ValueError("drafting with Context.slots is not supported: take the rows of the state first.")
            if ctx.draft:
                window = MambaWindow(conv_BTW, x_BTHP, B_BTGN, dt_BTH, dt_BTH * A)
                new_state = MambaState(rows.conv_BKW, rows.ssm_BHPN, window)
            else:
                taken = jnp.full((batch,), time) if ctx.new_tokens is None else ctx.new_tokens
                conv_BKW = final_state(conv_BTW, rows.conv_BKW, taken, config.conv_kernel)
                new_state = put_rows(state, ctx.slots, MambaState(conv_BKW, ssm_BHPN))
        y = self.norm(y_BTHP.reshape(batch, time, config.inner_size), z)
        return self.out_proj(y, *ctx.of("out_proj")), new_state, {}

    def _scan(
        self,
        x_BTHP: Array,
        dt_BTH: Array,
        A: Array,
        B_BTGN: Array,
        C_BTGN: Array,
        state: MambaState | None,
        ctx: Context,
    ) -> tuple[Array, Any]:
        """y, and the final state where there was one before."""
        if state is not None and x_BTHP.shape[1] == 1:
            y_BHP, ssm_BHPN = ssd_step(
                state.ssm_BHPN.astype(jnp.float32),
                x_BTHP[:, 0],
                dt_BTH[:, 0],
                A,
                B_BTGN[:, 0],
                C_BTGN[:, 0],
                self.D[...],
            )
            return y_BHP[:, None], ssm_BHPN
        cut = state is None and in_parts(x_BTHP.shape[1])

        def scan(
            x_BTHP: Array,
            dt_BTH: Array,
            A: Array,
            B_BTGN: Array,
            C_BTGN: Array,
            D: Array,
            initial_BHPN: Array | None,
            segment_ids: Array | None,
        ) -> tuple[Array, Array | None]:
            if cut:
                initial_BHPN = state_before(x_BTHP, dt_BTH, A, B_BTGN, segment_ids)
            y_BTHP, final_BHPN = ssd(
                x_BTHP,
                dt_BTH,
                A,
                B_BTGN,
                C_BTGN,
                D=D,
                chunk_size=self.config.chunk_size,
                initial_state=initial_BHPN,
                segment_ids=segment_ids,
                return_final_state=True,
            )
            return y_BTHP, None if state is None else final_BHPN

        x_axes, B_axes = ("batch", "time", "heads", None), ("batch", "time", "groups", None)
        state_axes = ("batch", "heads", None, None)
        run = per_device(
            scan,
            (x_axes, x_axes[:3], ("heads",), B_axes, B_axes, ("heads",), state_axes, ("batch", "time")),
            (x_axes, None if state is None else state_axes),
            whole=(() if cut else ("time",)) + _uncut_heads(self.config),
        )
        initial_BHPN = None if state is None else state.ssm_BHPN
        return run(x_BTHP, dt_BTH, A, B_BTGN, C_BTGN, self.D[...], initial_BHPN, ctx.segment_ids)

    @staticmethod
    def init_state(config: ModelConfig, rows: int, dtype: jnp.dtype) -> MambaState:
        """Zeros: the state before the first token. ``dtype`` is that of the recurrent state."""
        mamba = config.mamba
        return MambaState(
            jnp.zeros((rows, mamba.conv_kernel - 1, mamba.conv_size), dtype),
            jnp.zeros((rows, mamba.num_heads, mamba.head_dim, mamba.state_size), dtype),
        )

    @staticmethod
    def flops_per_token(config: ModelConfig, seq_len: int) -> float:
        """Forward FLOPs a token, projections excluded: the chunked SSD of pallas_kernels/ssd.py.

        C.B per group 2CNG, its product with x 2CHP, chunk states and their reading 4HPN, convolution 2KW.
        """
        m = config.mamba
        chunk = min(m.chunk_size, seq_len)
        return (
            2 * chunk * m.state_size * m.num_groups
            + 2 * chunk * m.inner_size
            + 4 * m.inner_size * m.state_size
            + 2 * m.conv_kernel * m.conv_size
        )
