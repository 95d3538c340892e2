"""Every op with its cases, inputs, truth and cost: what tests, `python -m pallas_kernels` and compile checks run over.

A new op gets all of them by one entry of SUITE. The op's file gives CASES (small, for tests), BENCHMARKS (shapes of
the released models), ``example_inputs(case, seed, dtype)``, traceable, and ``cost(case)``.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import dispatch, floats
from pallas_kernels.cost import Cost
from pallas_kernels.nvfp4 import NVFP4
from pallas_kernels.packed import Packed

# Modules, since the package exports functions by the same names.
_ssd = importlib.import_module("pallas_kernels.ssd")
_conv = importlib.import_module("pallas_kernels.causal_conv1d")
_grouped = importlib.import_module("pallas_kernels.grouped_matmul")
_mlp = importlib.import_module("pallas_kernels.grouped_mlp")
_attention = importlib.import_module("pallas_kernels.attention")
_take_rows = importlib.import_module("pallas_kernels.take_rows")
_block_scaled = importlib.import_module("pallas_kernels.block_scaled_matmul")
_nvfp4_matmul = importlib.import_module("pallas_kernels.nvfp4_matmul")
_permute = importlib.import_module("pallas_kernels.permute")
_quantize = importlib.import_module("pallas_kernels.quantize")
_expert_operands = importlib.import_module("pallas_kernels.quantize_expert_operands")
_operands = importlib.import_module("pallas_kernels.quantize_operands")
_tiles = importlib.import_module("pallas_kernels.quantize_tiles")


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
      function: the public function.
      cases, benchmarks: each has a ``name``.
      example_inputs: (case, seed, dtype) -> (args, kwargs).
      cost: case -> Cost.
      float32: inputs that the model keeps in float32 beside bfloat16 activations.
      truth: implementation that, in float32, the others are compared with at any size.
      peers: other ways to spend the same arithmetic, to compare times with; not implementations, since they compute
        something else or take some inputs only (ValueError for the rest).
      for_peers: inputs that only peers read.
      elsewhere: (arrays, i) -> arrays of a call that reads other parts of the same memory, i = 1, 2, ...: where a call
        reads few of many weights, copies would not fit.
      checked: settings that a check adds, to see outputs that a benchmark leaves out.
      backward: whether the op has gradients.
    """

    function: Callable[..., Any]
    cases: tuple[Any, ...]
    benchmarks: tuple[Any, ...]
    example_inputs: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    cost: Callable[[Any], Cost]
    float32: tuple[str, ...] = ()
    truth: str = "reference"
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    for_peers: tuple[str, ...] = ()
    elsewhere: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    checked: Mapping[str, Any] = field(default_factory=dict)
    backward: bool = True


def _dense_matmul(lhs, rhs, group_sizes, *, activation):
    """A batched product over groups of equal size, whatever their real sizes."""
    groups, inputs, outputs = rhs.shape
    if lhs.shape[0] % groups:
        raise ValueError(f"{lhs.shape[0]} rows are not a multiple of {groups} groups")
    product = jnp.einsum("emk,ekn->emn", lhs.reshape(groups, -1, inputs), rhs)
    return _grouped.ACTIVATIONS[activation](product.reshape(-1, outputs))


def _other_experts(arrays, i):
    """The next experts get the rows."""
    return arrays | {"group_sizes": jnp.roll(arrays["group_sizes"], i)} if "group_sizes" in arrays else arrays


def _packed_product(x, codes, block_scales, scale, dense, group_sizes=None, *, impl=None):
    """The products with packed weights by the arrays that they consist of; block_scales: uint8 codes."""
    del dense
    w = Packed(codes, floats.as_e4m3(block_scales), scale)
    if group_sizes is None:
        return _block_scaled.block_scaled_matmul(x, w, impl=impl)
    return _grouped.grouped_matmul(x, w, group_sizes, impl="blocked" if impl == "reference" else impl)


def _bfloat16_product(x, codes, block_scales, scale, dense, group_sizes=None):
    """The same product with a weight in x's dtype."""
    del codes, block_scales, scale
    return x @ dense if group_sizes is None else _grouped.grouped_matmul(x, dense, group_sizes)


def _nvfp4_product(a_codes, a_scales, a_amax, b_codes, b_scales, b_amax, a, b, *, impl=None):
    """The product of NVFP4 tensors by the arrays that they consist of; scales: uint8 codes."""
    del a, b
    tensors = [
        NVFP4(codes, floats.as_e4m3(scales), amax)
        for codes, scales, amax in ((a_codes, a_scales, a_amax), (b_codes, b_scales, b_amax))
    ]
    return _nvfp4_matmul.nvfp4_matmul(*tensors, impl=impl)


def _unquantised_product(a_codes, a_scales, a_amax, b_codes, b_scales, b_amax, a, b):
    """The product of what the tensors were before."""
    del a_codes, a_scales, a_amax, b_codes, b_scales, b_amax
    return a @ b.T


def _quantized(x_bits, amax, amax_columns, *, hadamard, seed=None, impl=None):
    """As integers, so that the bits are compared: x bfloat16 in uint16 -> codes and scales, of rows and columns."""
    x = jax.lax.bitcast_convert_type(x_bits, jnp.bfloat16)
    both = _quantize.quantize(x, amax, amax_columns, hadamard=hadamard, seed=seed, impl=impl)
    return tuple(bits for one in both for bits in (one.codes, floats.e4m3_bits(one.scales)))


def _quantized_operands(x_bits, amax, amax_columns, *, hadamard, seed=None, impl=None):
    """The same of `quantize_operands`: bfloat16 in uint16 -> code * scale in uint16 and scales, of rows and columns."""
    x = jax.lax.bitcast_convert_type(x_bits, jnp.bfloat16)
    both = _operands.quantize_operands(x, amax, amax_columns, hadamard=hadamard, seed=seed, impl=impl)
    return tuple(bits for one in both for bits in (jax.lax.bitcast_convert_type(one[0], jnp.uint16), one[1]))


def _quantized_expert_operands(
    x_bits, group_sizes, amax, amax_columns, *, hadamard, seed=None, entries=None, comparable=False, impl=None
):
    """As integers, like `_quantized`; the maxima too, since the kernels make them.

    comparable: what belongs to no expert is 0, in two passes over the operands that take longer than to make them.
    """
    x = jax.lax.bitcast_convert_type(x_bits, jnp.bfloat16)
    settings = {"hadamard": hadamard, "impl": impl}
    made = _expert_operands.quantize_expert_operands(
        x, group_sizes, amax, amax_columns, **settings, seed=seed, entries=entries
    )
    bits = [jax.lax.bitcast_convert_type(z, jnp.uint16) for z in made]
    if comparable:
        ends = (group_sizes.sum(), (-(-group_sizes // 16) * 16).sum())
        bits = [jnp.where(jnp.arange(len(z))[:, None] < end, z, 0) for z, end in zip(bits, ends, strict=True)]
    maxima = _expert_operands.expert_maxima(x, group_sizes, **settings)
    return (*bits, *map(floats.bits_of, maxima))


def _quantized_tiles(w_bits, amax, *, impl=None):
    """As integers, like `_quantized`; w bfloat16 in uint16, or float32 in uint32."""
    w = jax.lax.bitcast_convert_type(w_bits, jnp.bfloat16 if w_bits.dtype == jnp.uint16 else jnp.float32)
    return jax.lax.bitcast_convert_type(_tiles.quantize_tiles(w, amax, impl=impl), jnp.uint16)


def _quantize_tiles_inputs(case, seed, dtype):
    del dtype
    (w, amax), _ = _tiles.example_inputs(case, seed)
    return (jax.lax.bitcast_convert_type(w, jnp.uint32 if case.float32 else jnp.uint16), amax), {}


def _quantize_expert_inputs(case, seed, dtype):
    del dtype
    (x, *rest), settings = _expert_operands.example_inputs(case, seed, jnp.bfloat16)
    return (jax.lax.bitcast_convert_type(x, jnp.uint16), *rest), settings


def _quantize_inputs(case, seed, dtype):
    del dtype
    (x, *maxima), settings = _quantize.example_inputs(case, seed, jnp.bfloat16)
    return (jax.lax.bitcast_convert_type(x, jnp.uint16), *maxima), settings


SUITE = {
    "ssd": Op(
        _ssd.ssd,
        _ssd.CASES,
        _ssd.BENCHMARKS,
        _ssd.example_inputs,
        _ssd.cost,
        float32=("dt", "A", "D", "initial_state"),
        checked={"return_final_state": True},
    ),
    "causal_conv1d": Op(
        _conv.causal_conv1d,
        _conv.CASES,
        _conv.BENCHMARKS,
        _conv.example_inputs,
        _conv.cost,
        checked={"return_final_state": True},
    ),
    "grouped_matmul": Op(
        _grouped.grouped_matmul,
        _grouped.CASES,
        _grouped.BENCHMARKS,
        _grouped.example_inputs,
        _grouped.cost,
        peers={"dense": _dense_matmul},
        elsewhere=_other_experts,
        truth="blocked",  # ragged_dot expands to the rows times the groups on GPUs
    ),
    "grouped_mlp": Op(
        _mlp.grouped_mlp,
        _mlp.CASES,
        _mlp.BENCHMARKS,
        _mlp.example_inputs,
        _mlp.cost,
        truth="blocked",
    ),
    "attention": Op(
        _attention.attention,
        _attention.CASES,
        _attention.BENCHMARKS,
        _attention.example_inputs,
        _attention.cost,
    ),
    "decode_attention": Op(
        _attention.decode_attention,
        _attention.DECODE_CASES,
        _attention.DECODE_BENCHMARKS,
        _attention.decode_example_inputs,
        _attention.decode_cost,
        backward=False,
    ),
    "take_rows": Op(
        _take_rows.take_rows,
        _take_rows.CASES,
        _take_rows.BENCHMARKS,
        _take_rows.example_inputs,
        _take_rows.cost,
    ),
    "block_scaled_matmul": Op(
        _packed_product,
        _block_scaled.CASES,
        _block_scaled.BENCHMARKS,
        _block_scaled.example_inputs,
        _block_scaled.cost,
        float32=("scale",),
        peers={"bfloat16": _bfloat16_product},
        for_peers=("dense",),
        elsewhere=_other_experts,
        backward=False,
    ),
    "nvfp4_matmul": Op(
        _nvfp4_product,
        _nvfp4_matmul.CASES,
        _nvfp4_matmul.BENCHMARKS,
        _nvfp4_matmul.example_inputs,
        _nvfp4_matmul.cost,
        float32=("a_amax", "b_amax"),
        peers={"bfloat16": _unquantised_product},
        for_peers=("a", "b"),
        backward=False,
    ),
    "quantize_operands": Op(
        _quantized_operands,
        _operands.CASES,
        _operands.BENCHMARKS,
        _quantize_inputs,
        _operands.cost,
        float32=("amax", "amax_columns"),
        backward=False,
    ),
    "quantize_expert_operands": Op(
        _quantized_expert_operands,
        _expert_operands.CASES,
        _expert_operands.BENCHMARKS,
        _quantize_expert_inputs,
        _expert_operands.cost,
        float32=("amax", "amax_columns"),
        checked={"comparable": True},
        backward=False,
    ),
    "quantize_tiles": Op(
        _quantized_tiles,
        _tiles.CASES,
        _tiles.BENCHMARKS,
        _quantize_tiles_inputs,
        _tiles.cost,
        float32=("amax",),
        backward=False,
    ),
    "quantize": Op(
        _quantized,
        _quantize.CASES,
        _quantize.BENCHMARKS,
        _quantize_inputs,
        _quantize.cost,
        float32=("amax", "amax_columns"),
        backward=False,
    ),
    "permute": Op(
        _permute.permute,
        _permute.CASES,
        _permute.BENCHMARKS,
        _permute.example_inputs,
        _permute.cost,
    ),
    "unpermute": Op(
        _permute.unpermute,
        _permute.CASES,
        _permute.BENCHMARKS,
        _permute.unpermute_example_inputs,
        _permute.unpermute_cost,
        float32=("weights",),
    ),
}


@dataclass(frozen=True)
class Inputs:
    """Arguments of a call by name: ``arrays`` (or their shapes) and ``settings``, which are static."""

    arrays: dict[str, Any]
    settings: dict[str, Any]

    def cast(self, dtype: DTypeLike) -> "Inputs":
        """The same with every float array in ``dtype``."""
        arrays = {name: z.astype(dtype) if _is_float(z) else z for name, z in self.arrays.items()}
        return Inputs(arrays, self.settings)


def inputs(op: str, case: Any, seed: int = 0, dtype: DTypeLike = jnp.bfloat16, *, abstract: bool = False) -> Inputs:
    """Random inputs of a case, made on the device; ``abstract``: their shapes and dtypes, whatever the size."""
    entry = SUITE[op]
    settings: dict[str, Any] = {}

    def arrays() -> dict[str, jax.Array]:
        args, kwargs = entry.example_inputs(case, seed, jnp.float32)
        named = inspect.signature(entry.function).bind(*args, **kwargs).arguments
        settings.update({name: value for name, value in named.items() if not isinstance(value, jax.Array)})
        return {
            name: value.astype(dtype) if _is_float(value) and name not in entry.float32 else value
            for name, value in named.items()
            if isinstance(value, jax.Array)
        }

    return Inputs(jax.eval_shape(arrays) if abstract else arrays(), settings)


def _is_float(z: Any) -> bool:
    return jnp.issubdtype(z.dtype, jnp.floating)


def forward(op: str, impl: str | None, settings: Mapping[str, Any]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A function {name: array} -> tuple of outputs; ``impl`` may also be a peer."""
    entry = SUITE[op]

    def call(arrays: dict[str, Any]) -> tuple[Any, ...]:
        if impl is not None and impl in entry.peers:
            out = entry.peers[impl](**arrays, **settings)
        else:
            out = entry.function(**arrays, **settings, impl=impl)
        return out if isinstance(out, tuple) else (out,)

    return call


def forward_backward(
    op: str, impl: str | None, settings: Mapping[str, Any]
) -> Callable[[dict[str, Any], list[Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """A function (arrays, gradients of the float outputs) -> (outputs, {name: gradient of a float input})."""
    call = forward(op, impl, settings)

    def both(arrays: dict[str, Any], d_outputs: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        floats = {name: z for name, z in arrays.items() if _is_float(z)}

        def of_floats(floats: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...]]:
            outputs = call(arrays | floats)
            return [z for z in outputs if _is_float(z)], outputs

        _, pullback, outputs = jax.vjp(of_floats, floats, has_aux=True)
        return outputs, pullback(d_outputs)[0]

    return both


def output_gradients(op: str, given: Inputs, seed: int = 0, *, abstract: bool = False) -> list[Any]:
    """Random gradients of the float outputs of a call, in their dtypes."""
    shapes = jax.eval_shape(forward(op, "reference", given.settings), given.arrays)
    floats = [shape for shape in shapes if _is_float(shape)]
    if abstract:
        return floats

    keys = jax.random.split(jax.random.key(seed + 1), len(floats))
    return [jax.random.normal(k, z.shape, jnp.float32).astype(z.dtype) for k, z in zip(keys, floats, strict=True)]


def implementations(op: str, given: Inputs) -> dict[str, str]:
    """{implementation or peer: "" or why it cannot take these inputs here (or on the GPU being compiled for)}."""
    reasons = {}
    for impl in (*dispatch.OPS[op], *SUITE[op].peers):
        try:
            jax.eval_shape(forward(op, impl, given.settings), given.arrays)
            reasons[impl] = ""
        except ValueError as error:
            reasons[impl] = str(error)
    return reasons


def errors(
    op: str, case: Any, impl: str, seeds: Sequence[int] = (0,), dtype: DTypeLike = jnp.bfloat16
) -> dict[str, float]:
    """Relative Frobenius errors ||got - want|| / ||want|| of every output and gradient; want is the float32 truth.

    The largest of all seeds. Integer outputs count 0 when equal, else infinity; NaN counts as infinity. "repeat" is 0
    when a second run on the same inputs gives the same bits, else infinity.
    """
    entry = SUITE[op]
    runs: dict[str, Any] = {}

    def run(impl: str, given: Inputs, d_outputs: list[Any]) -> dict[str, jax.Array]:
        if impl not in runs:
            both = forward_backward if entry.backward else _forward_only
            runs[impl] = jax.jit(both(op, impl, given.settings))
        outputs, grads = runs[impl](given.arrays, d_outputs)
        named = {f"out{i or ''}": z for i, z in enumerate(outputs)}
        return named | {f"d_{name}": z for name, z in grads.items()}

    worst: dict[str, float] = {}
    for seed in seeds:
        given = inputs(op, case, seed, dtype)
        given = Inputs(given.arrays, given.settings | dict(entry.checked))
        d_outputs = output_gradients(op, given, seed) if entry.backward else []
        got = run(impl, given, d_outputs)
        again = run(impl, given, d_outputs)
        found = {"repeat": max(float(_differs(got[name], again[name])) for name in got)}
        del again
        want = run(entry.truth, given.cast(jnp.float32), [z.astype(jnp.float32) for z in d_outputs])
        found |= {name: float(_distance(got[name], want[name])) for name in want}
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in found.items()}
    return worst


def _forward_only(op, impl, settings):
    call = forward(op, impl, settings)
    return lambda arrays, _: (call(arrays), {})


@jax.jit
def _differs(a, b):
    """0.0 where the bits are equal, NaN included, else infinity."""
    same = (a == b) | ((a != a) & (b != b))
    return jnp.where(same.all(), 0.0, jnp.inf)


@jax.jit
def _distance(got, want):
    if not _is_float(want):
        return jnp.where((got == want).all(), 0.0, jnp.inf)
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    # Zeros (all groups empty) have to be met exactly.
    size = jnp.linalg.norm(want)
    error = jnp.linalg.norm(got - want) / jnp.where(size > 0, size, 1e-30)
    return jnp.where(jnp.isnan(error), jnp.inf, error)
