"""Quantised matmuls against the oracle of the formats: which operand is rounded how, in all three products."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nemotron_jax.model.context import Context
from nemotron_jax.parallel.mesh import make_mesh
from nemotron_jax.precision import quantized_experts
from nemotron_jax.precision.matmul import expert_matmul, matmul
from nemotron_jax.precision.quantized import (
    COUNTS,
    DGRAD,
    OPERANDS,
    WGRAD,
    new_probe,
    random_bytes,
    turned,
    turned_at_once,
)
from nemotron_jax.precision.recipe import Precision
from nemotron_jax.run_config import ParallelConfig
from pallas_kernels import quantize_expert_operands_mosaic, quantize_operands_mosaic, quantize_tiles_mosaic
from pallas_kernels.dispatch import compiling_for
from tests.pallas_kernels import nvfp4_oracle as oracle

RNG = np.random.default_rng(0)
SEED = jnp.uint32(7)
M, K, N = 37, 64, 48  # tokens that are no multiple of 16
X, W, DY = (RNG.normal(size=shape).astype(np.float32) for shape in ((M, K), (K, N), (M, N)))
W[:16, :16] *= 40  # an outlier block


def rounded(z, block="1x16", bits=None):
    return oracle.dequantize(*oracle.quantize(z, block, bits=bits))


def along_tokens(z, hadamard, bits=None):
    """[M, N] quantised in blocks of 16 tokens, in float64, padding included."""
    padded = np.pad(z, ((0, -len(z) % 16), (0, 0))).T.copy()
    turned = oracle.hadamard(padded) if hadamard else padded
    return rounded(turned, bits=None if bits is None else np.asarray(bits).T).T


def gradients(precision, x=X, w=W, dy=DY, dtype=jnp.float32):
    @jax.jit
    def function(x, w, dy):
        y, pull = jax.vjp(lambda x, w: matmul(x, w, precision, SEED), x, w)
        return y, *pull(dy)

    found = function(jnp.asarray(x, dtype), jnp.asarray(w), jnp.asarray(dy, dtype))
    return [np.asarray(z, np.float64) for z in found]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


# Each pair of choices: the other four cases are slow.
PAIRS = [(False, False, "16x16"), (True, True, "16x16"), (False, True, "1x16"), (True, False, "1x16")]


@pytest.mark.parametrize(
    ("stochastic", "hadamard", "weight_block"),
    [
        pytest.param(*case, marks=() if case in PAIRS else pytest.mark.slow)
        for case in itertools.product([False, True], [False, True], ["16x16", "1x16"])
    ],
)
def test_nvfp4(stochastic, hadamard, weight_block):
    precision = Precision("float32", "nvfp4", weight_block, stochastic, hadamard)
    y, dx, dw = gradients(precision)
    bits = {
        product: np.asarray(random_bytes(SEED, product, jnp.arange(rows, dtype=jnp.uint32), N)) if stochastic else None
        for product, rows in ((DGRAD, M), (WGRAD, 48))
    }
    close(y, rounded(X) @ rounded(W.T, weight_block).T)
    close(dx, rounded(DY, bits=bits[DGRAD]) @ rounded(W, weight_block).T)
    if hadamard:  # sums in float32 and in float64 differ, so a code may: compare what nearly all of it is
        expected = along_tokens(X, True).T @ along_tokens(DY, True, bits[WGRAD])
        assert np.linalg.norm(dw - expected) < 0.03 * np.linalg.norm(expected)
        assert np.linalg.norm(dw - along_tokens(X, False).T @ along_tokens(DY, False)) > 0.05 * np.linalg.norm(dw)
    else:
        close(dw, along_tokens(X, False).T @ along_tokens(DY, False, bits[WGRAD]))
    exact = X.T.astype(np.float64) @ DY
    assert 0.02 < np.linalg.norm(dw - exact) / np.linalg.norm(exact) < 0.25


def test_one_weight_forwards_and_backwards():
    """16x16 blocks: the weight of dgrad has the codes of fprop. With 1x16 it has not."""
    x, dy = np.eye(K + N, K, dtype=np.float32), np.eye(K + N, N, -K, dtype=np.float32)
    for block, same in (("16x16", True), ("1x16", False)):
        y, dx, _ = gradients(Precision("float32", "nvfp4", block, stochastic=False, hadamard=False), x=x, dy=dy)
        assert y[:K].any() and (y[:K] == dx[K:].T).all() == same


def test_bfloat16_activations():
    """Rounded to bfloat16 nowhere but at the end; the weight's gradient not even there."""
    x, dy = X.astype(ml_dtypes.bfloat16), DY.astype(ml_dtypes.bfloat16)
    precision = Precision("bfloat16", "nvfp4", stochastic=False, hadamard=False)
    y, dx, dw = gradients(precision, x, W, dy, jnp.bfloat16)
    np.testing.assert_allclose(y, rounded(x) @ rounded(W.T, "16x16").T, rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(dx, rounded(dy) @ rounded(W, "16x16").T, rtol=2**-8, atol=1e-4)
    close(dw, along_tokens(x.astype(np.float32), False).T @ along_tokens(dy.astype(np.float32), False))


def mxfp8(z):
    """Blocks of 32 along the last axis."""
    blocks = z.astype(np.float64).reshape(len(z), -1, 32)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(blocks).max(-1, keepdims=True), 1e-30) / 448))
    return (np.clip(blocks / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale).reshape(
        z.shape
    )


def fp8(z):
    scale = 448 / np.abs(z).max()
    return (z * scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / scale


@pytest.mark.parametrize(("format", "function"), [("mxfp8", mxfp8), ("fp8", fp8)])
def test_eight_bits(format, function):
    n = 64
    w, dy = np.concatenate([W, W[:, :16]], axis=1), RNG.normal(size=(M, n)).astype(np.float32)
    y, dx, dw = gradients(Precision("float32", format), w=w, dy=dy)
    pad = lambda z: np.pad(z, ((0, -M % 32), (0, 0))).T.copy()  # noqa: E731
    close(y, function(X) @ function(w.T.copy()).T)
    close(dx, function(dy) @ function(w).T)
    close(dw, function(pad(X)) @ function(pad(dy)).T)


SIZES = np.array([5, 0, 33, 16, 1], np.int32)  # 55 of 60 rows


@pytest.mark.parametrize(
    ("activation", "format"),
    [
        ("relu2", "nvfp4"),
        (None, "mxfp8"),
        ("relu2", "fp8"),
        pytest.param(None, "nvfp4", marks=pytest.mark.slow),
        pytest.param("relu2", "mxfp8", marks=pytest.mark.slow),
        pytest.param(None, "fp8", marks=pytest.mark.slow),
    ],
)
def test_each_expert_is_a_tensor_of_its_own(format, activation):
    """The same as one matmul an expert, its tokens padded with zeros to whole blocks."""
    n = 64
    scale = np.repeat(10.0 ** np.arange(5), [5, 0, 33, 16, 6])[:, None]  # so that a shared amax would be seen
    x = jnp.asarray(RNG.normal(size=(60, K)) * scale, jnp.float32)
    w = jnp.asarray(RNG.normal(size=(5, K, n)) * 3.0 ** np.arange(5)[:, None, None], jnp.float32)
    dy = jnp.asarray(RNG.normal(size=(60, n)) * scale, jnp.float32)
    precision = Precision("float32", format, stochastic=False)
    together = jax.jit(lambda x, w: expert_matmul(x, w, jnp.asarray(SIZES), precision, activation=activation))
    y, pull = jax.vjp(together, x, w)
    dx, dw = pull(dy)

    @jax.jit
    def alone(x, w, dy):
        y, pull = jax.vjp(lambda *z: activate(matmul(*z, precision)), x, w)
        return y, *pull(dy)

    def activate(z):
        return jnp.square(jax.nn.relu(z)) if activation else z

    for e, (start, size) in enumerate(zip(np.cumsum(SIZES) - SIZES, SIZES, strict=True)):
        rows = slice(start, start + size)
        if not size:
            assert (np.asarray(dw[e]) == 0).all()
            continue
        y_e, dx_e, dw_e = alone(x[rows], w[e], dy[rows])
        for found, expected in ((y[rows], y_e), (dx[rows], dx_e), (dw[e], dw_e)):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))
    assert (np.asarray(y[55:]) == 0).all() and (np.asarray(dx[55:]) == 0).all()


def test_experts_round_gradients_stochastically():
    x, w = jnp.asarray(RNG.normal(size=(60, K)), jnp.float32), jnp.asarray(RNG.normal(size=(5, K, N)), jnp.float32)
    precision = Precision("float32", "nvfp4", hadamard=False)
    sizes, dy = jnp.asarray(SIZES), jnp.asarray(RNG.normal(size=(60, N)), jnp.float32)

    @jax.jit
    def grads(seed):
        return jax.vjp(lambda x, w: expert_matmul(x, w, sizes, precision, seed), x, w)[1](dy)

    once, again, other = grads(jnp.uint32(1)), grads(jnp.uint32(1)), grads(jnp.uint32(2))
    for a, b, c in zip(once, again, other, strict=True):
        assert (a == b).all() and (a != c).mean() > 0.5


def test_stochastic_gradients_are_unbiased():
    """The mean over seeds is the product of the unrounded gradient (the format rounds toward zero by < 1 %)."""
    precision = Precision("float32", "nvfp4", hadamard=False)

    @jax.jit
    def dx_of(seed):
        return jax.vjp(lambda x: matmul(x, jnp.asarray(W), precision, seed), jnp.asarray(X))[1](jnp.asarray(DY))[0]

    mean = np.mean([np.asarray(dx_of(jnp.uint32(seed))) for seed in range(200)], axis=0)
    expected = DY @ rounded(W, "16x16").T
    nearest = np.asarray(
        jax.vjp(lambda x: matmul(x, jnp.asarray(W), Precision("float32", "nvfp4", stochastic=False)), jnp.asarray(X))[
            1
        ](jnp.asarray(DY))[0]
    )
    error = np.linalg.norm(mean - expected) / np.linalg.norm(expected)
    assert error < 0.02 < np.linalg.norm(nearest - expected) / np.linalg.norm(expected)


def test_random_bits_of_a_row_are_those_of_its_token():
    """Tokens in another order, so rows in another place of each group: each takes its gradient along."""
    x, w = jnp.asarray(RNG.normal(size=(55, K)), jnp.float32), jnp.asarray(RNG.normal(size=(5, K, N)), jnp.float32)
    dy, entry = jnp.asarray(RNG.normal(size=(55, N)), jnp.float32), jnp.asarray(RNG.permutation(900)[:55], jnp.uint32)
    order = np.concatenate([RNG.permutation(np.arange(e - s, e)) for s, e in zip(SIZES, SIZES.cumsum(), strict=True)])
    precision = Precision("float32", "nvfp4")

    @jax.jit
    def dx_of(x, dy, entry):
        return jax.vjp(lambda x: expert_matmul(x, w, jnp.asarray(SIZES), precision, SEED, entry), x)[1](dy)[0]

    plain = dx_of(x, dy, entry)
    np.testing.assert_array_equal(dx_of(x[order], dy[order], entry[order]), plain[order])
    assert (np.asarray(dx_of(x[order], dy[order], entry)) != plain[order]).mean() > 0.5


def test_random_bits_of_a_sharded_batch():
    """[B, T] tokens cut over devices both ways: bit for bit what one device rounds."""
    x, dy = (jnp.asarray(RNG.normal(size=(8, 16, n)), jnp.float32) for n in (K, N))
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, context=2))
    gradients = jax.jit(lambda x, dy: jax.vjp(lambda x: matmul(x, jnp.asarray(W), _ROUNDED, SEED), x)[1](dy)[0])
    whole = gradients(x, dy)
    cut = gradients(*(jax.device_put(z, NamedSharding(mesh, P(("data", "fsdp"), "context"))) for z in (x, dy)))
    assert not cut.sharding.is_fully_replicated
    np.testing.assert_array_equal(cut, whole)


_ROUNDED = Precision("float32", "nvfp4")


def test_random_bytes():
    tokens = jnp.arange(400, dtype=jnp.uint32)
    found = np.asarray(random_bytes(SEED, 1, tokens, 130))
    assert found.dtype == np.uint8 and found.shape == (400, 130)
    counts = np.bincount(found.ravel(), minlength=256)
    assert abs(counts - found.size / 256).max() < 6 * np.sqrt(found.size / 256)
    assert (np.asarray(random_bytes(SEED, 1, tokens[::-1], 130))[::-1] == found).all()  # a token's number alone counts
    others = (random_bytes(SEED, 2, tokens, 130), random_bytes(SEED + 1, 1, tokens, 130), np.roll(found, 1, axis=0))
    for other in others:
        assert abs((np.asarray(other) == found).mean() - 1 / 256) < 0.002
    correlation = np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]
    assert abs(correlation) < 0.02


def interpret_tiles(monkeypatch, calls):
    """The kernel of weights; ``calls`` gets "tiles" for each."""

    def tiles(*arguments):
        calls.append("tiles")
        return quantize_tiles_mosaic.quantize_tiles(*arguments, plgpu.InterpretGPUParams())

    module = importlib.import_module("pallas_kernels.quantize_tiles")
    monkeypatch.setitem(module._IMPLEMENTATIONS, "mosaic", tiles)


def test_the_kernel_of_both_operands_changes_no_bit(monkeypatch):
    """Interpreted, in place of what runs elsewhere: product, gradients and statistics."""
    module = importlib.import_module("pallas_kernels.quantize_operands")
    normal = np.random.default_rng(1).normal
    # The last block of tokens is not whole.
    x, w, dy = (jnp.asarray(normal(size=s), jnp.bfloat16) for s in ((117, 64), (64, 128), (117, 128)))
    precision = Precision("bfloat16", "nvfp4")

    def run(probe):
        def gradients(x, w, dy, probe):
            y, pull = jax.vjp(lambda *z: matmul(*z[:2], precision, SEED, z[2]), x, w, probe)
            return y, *pull(dy)

        return jax.jit(gradients)(x, w, dy, probe)

    want = run(new_probe())
    calls = []

    def interpreted(*arguments):
        calls.append([z is not None for z in arguments[1:3]])
        return quantize_operands_mosaic.quantize_operands(*arguments, plgpu.InterpretGPUParams())

    def maxima(*arguments):
        calls.append("maxima")
        return quantize_expert_operands_mosaic.expert_maxima(*arguments, plgpu.InterpretGPUParams())

    monkeypatch.setitem(module._IMPLEMENTATIONS, "mosaic", interpreted)
    of_experts = importlib.import_module("pallas_kernels.quantize_expert_operands")
    monkeypatch.setitem(of_experts._IMPLEMENTATIONS, "mosaic", (None, maxima))

    interpret_tiles(monkeypatch, calls)
    with compiling_for("sm_90a"):
        got = run(new_probe())
        uncounted = run(None)
    # x and w; dy; x for the weight's gradient; w
    assert calls == 2 * [[True, False], "tiles", "maxima", [True, True], "maxima", [False, True], "tiles"]
    for a, b, c in zip(got[:3], want[:3], uncounted[:3], strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(c, b)
    np.testing.assert_allclose(got[3], want[3], rtol=1e-3)
    assert uncounted[3] is None


def test_the_transform_that_statistics_repeat():
    """One product in place of sums in order: the last bit of few results, and no more, may be another."""
    z = jnp.asarray(np.random.default_rng(3).normal(size=(512, 128)), jnp.bfloat16)
    precision = Precision("bfloat16", "nvfp4")
    once, again = (np.asarray(f(z, precision), np.float32) for f in (turned, turned_at_once))
    np.testing.assert_allclose(again, once, rtol=2**-7, atol=1e-6)
    assert (again != once).mean() < 1e-3
    plain = Precision("bfloat16", "nvfp4", hadamard=False)
    np.testing.assert_array_equal(turned_at_once(z, plain), turned(z, plain))


def test_no_two_weights_of_a_layer_draw_the_same_bits():
    ctx = Context(seed=SEED)
    names = ("in_proj", "out_proj", "experts", "shared_experts/up_proj", "shared_experts/down_proj", "q_proj", "k_proj")
    assert len({int(ctx.for_layer(i).of(name)[0]) for name in names for i in range(4)}) == 4 * len(names)


def counts_of(function, *arrays):
    """{operand: {count: number}} of a matmul of (arrays, probe)."""

    @jax.jit
    def of_probe(*arrays):
        y, pull = jax.vjp(function, *arrays, new_probe())
        return pull(jnp.asarray(DY[: len(y), : y.shape[1]], y.dtype))[-1]

    counts = np.asarray(of_probe(*map(jnp.asarray, arrays)))
    return {name: dict(zip(COUNTS, row, strict=True)) for name, row in zip(OPERANDS, counts, strict=True)}


@pytest.mark.parametrize("experts", [False, True])
def test_statistics_of_operands(experts):
    """Against the oracle: what becomes zero and what is cut off, of the elements that are not zero."""
    x, w = X.copy(), W.copy()
    x[3, :16] = np.geomspace(1e-9, 1, 16)  # most of them become zero
    x[:, 40] = 0
    x[5, 5] = np.inf
    precision = Precision("float32", "nvfp4", stochastic=False, hadamard=False)
    if experts:
        sizes = jnp.asarray([M], jnp.int32)
        run = lambda x, w, probe: expert_matmul(x, w[None], sizes, precision, probe=probe)  # noqa: E731
    else:
        run = lambda x, w, probe: matmul(x, w, precision, probe=probe)  # noqa: E731
    found = counts_of(run, x, w)
    assert found["x"]["non_finite"] == found["x_tokens"]["non_finite"] == 1
    assert found["x"]["non_zero"] == M * (K - 1) - 1

    x[5, 5] = 1
    found = counts_of(run, x, w)
    wanted = {"x": (x, rounded(x)), "w": (w.T, rounded(w.T.copy(), "16x16")), "dy": (DY, rounded(DY))}
    wanted |= {"x_tokens": (x, along_tokens(x, False)[:M]), "dy_tokens": (DY, along_tokens(DY, False)[:M])}
    for name, (before, after) in wanted.items():
        flushed = ((before != 0) & (after == 0)).sum()
        assert found[name]["flushed"] == flushed and found[name]["non_zero"] == (before != 0).sum()
        assert found[name]["non_finite"] == 0
    assert found["x"]["flushed"] > 10
    # Cut off: above the largest value of its block, to which it was rounded.
    blocks, codes = (np.abs(z).reshape(M, -1, 16) for z in (x, oracle.quantize(x, "1x16")[0] & 7))
    top = np.abs(rounded(x)).reshape(M, -1, 16)
    cut = ((codes == 7) & (blocks > top * (1 + 1e-6))).sum()
    assert found["x"]["saturated"] == cut > 0


@pytest.mark.parametrize("format", ["mxfp8", "fp8"])
def test_statistics_of_eight_bits(format):
    x = X.copy()
    x[0, 0], x[0, 1] = 3e4, 1e-9  # beside the first, in its block of 32, the second is nothing
    found = counts_of(lambda x, w, probe: matmul(x, w, Precision("float32", format), probe=probe), x[:32], W[:, :32])
    function = {"mxfp8": mxfp8, "fp8": fp8}[format]
    assert found["x"]["flushed"] == (function(x[:32]) == 0).sum() >= 1
    assert found["x"]["saturated"] == 0 and found["x"]["non_zero"] == x[:32].size


def test_what_is_not_finite():
    """NaN, and in NVFP4 an infinity, leave no finite element of the product: a step with them is skipped.

    An infinity in an FP8 tensor becomes 448 (pallas_kernels/fp8.py). Both are counted (non_finite).
    """
    for bad, format, some_finite in (
        (np.nan, "nvfp4", False),
        (np.inf, "nvfp4", False),
        (np.nan, "fp8", False),
        (np.inf, "fp8", True),
    ):
        x = X.copy()
        x[2, 3] = bad
        y = matmul(jnp.asarray(x), jnp.asarray(W), Precision("float32", format, stochastic=False))
        assert np.isfinite(y).any() == some_finite


def test_the_kernels_of_experts_change_no_bit(monkeypatch):
    """Interpreted, in place of what runs elsewhere: products, gradients and statistics of all experts."""
    module = importlib.import_module("pallas_kernels.quantize_expert_operands")
    normal = np.random.default_rng(1).normal
    scale = np.repeat(10.0 ** np.arange(3), [5, 0, 40])[:, None]
    x, w, dy = (
        jnp.asarray(normal(size=s) * f, jnp.bfloat16)
        for s, f in (((45, 64), scale), ((3, 64, 64), 1.0), ((45, 64), scale))
    )
    sizes, entries = jnp.array([5, 0, 38], jnp.int32), jnp.asarray(np.random.default_rng(2).permutation(45), jnp.uint32)
    precision = Precision("bfloat16", "nvfp4")

    def run():
        def gradients(x, w, dy):
            function = lambda x, w, probe: expert_matmul(  # noqa: E731
                x, w, sizes, precision, SEED, entries, probe, activation="relu2"
            )
            y, pull = jax.vjp(function, x, w, new_probe())
            return y, *pull(dy)

        return jax.jit(gradients)(x, w, dy)

    want = run()
    calls = []

    def interpreted(*arguments):
        calls.append([z is not None for z in arguments[2:4]])
        return quantize_expert_operands_mosaic.quantize_expert_operands(*arguments, plgpu.InterpretGPUParams())

    def maxima(*arguments):
        calls.append("maxima")
        return quantize_expert_operands_mosaic.expert_maxima(*arguments, plgpu.InterpretGPUParams())

    monkeypatch.setitem(module._IMPLEMENTATIONS, "mosaic", (interpreted, maxima))
    interpret_tiles(monkeypatch, calls)
    for name in ("multiply_groups", "sum_groups"):
        function = getattr(quantized_experts, name)
        monkeypatch.setattr(quantized_experts, name, functools.partial(function, impl="blocked"))
    with compiling_for("sm_90a"):
        got = run()
    assert calls == ["maxima", [True, False], "tiles", "maxima", [True, True], [False, True], "tiles"]
    for a, b in zip(got[:3], want[:3], strict=True):
        np.testing.assert_array_equal(a[:43] if len(a) == 45 else a, b[:43] if len(b) == 45 else b)
    np.testing.assert_allclose(got[3], want[3], rtol=1e-3)
    assert got[3][0, COUNTS.index("non_zero")] == (x[:43] != 0).sum()  # not of rows past the last group
