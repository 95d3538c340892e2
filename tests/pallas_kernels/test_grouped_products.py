"""The products of a grouped matmul one by one, with a scale for each group."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_products import multiply_groups, sum_groups

SIZES = np.array([5, 0, 70, 58])
ROWS = 143  # ten of no group
SCALE = np.float32([3.0, 1.0, 0.01, 7.0])


def operands(*shapes):
    normal = np.random.default_rng(0).normal
    return [jnp.asarray(normal(size=shape), jnp.bfloat16) for shape in shapes]


def exact(z):
    return np.asarray(z, np.float64)


def groups():
    ends = np.cumsum(SIZES)
    return [slice(end - size, end) for end, size in zip(ends, SIZES, strict=True)]


@pytest.mark.parametrize("impl", ["blocked", "mosaic"])
@pytest.mark.parametrize(("transposed", "activation"), [(False, "relu2"), (True, None)])
def test_multiply_groups(impl, transposed, activation, interpret, monkeypatch):
    lhs, rhs = operands((ROWS, 64), (4, 128, 64) if transposed else (4, 64, 128))
    settings = {"transposed": transposed, "activation": activation, "impl": impl}
    if impl == "mosaic":
        monkeypatch.setattr("pallas_kernels.grouped_products._choose", lambda *_: "mosaic")
        settings["interpret"] = interpret
    found = exact(multiply_groups(lhs, rhs, jnp.asarray(SIZES), jnp.asarray(SCALE), **settings))
    want = np.zeros(found.shape)
    for e, rows in enumerate(groups()):
        want[rows] = SCALE[e] * (exact(lhs[rows]) @ (exact(rhs[e]).T if transposed else exact(rhs[e])))
    want = np.maximum(want, 0) ** 2 if activation else want
    np.testing.assert_allclose(found, want, rtol=2**-8, atol=1e-4)
    assert (found[133:] == 0).all()


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("blocked", "float32"), pytest.param("mosaic", "float32", marks=pytest.mark.slow), ("mosaic", "bfloat16")],
)
def test_sum_groups(impl, dtype, interpret, monkeypatch):
    lhs, d_out = (z.at[133:].set(jnp.nan) for z in operands((ROWS, 64), (ROWS, 128)))
    settings = {"dtype": dtype, "impl": impl}
    if impl == "mosaic":
        monkeypatch.setattr("pallas_kernels.grouped_products._choose", lambda *_: "mosaic")
        settings["interpret"] = interpret
    found = exact(sum_groups(lhs, d_out, jnp.asarray(SIZES), jnp.asarray(SCALE), **settings))
    want = np.stack([s * exact(lhs[rows]).T @ exact(d_out[rows]) for s, rows in zip(SCALE, groups(), strict=True)])
    np.testing.assert_allclose(found, want, rtol=2**-8 if dtype == "bfloat16" else 1e-4, atol=1e-4)


def test_what_does_not_fit():
    lhs, rhs = operands((ROWS, 64), (4, 64, 128))
    sizes, scale = jnp.asarray(SIZES), jnp.asarray(SCALE)
    with pytest.raises(ValueError, match=r"rhs must have shape \[E, N, K\] = \[any, any, 64\], got \[4, 64, 128\]"):
        multiply_groups(lhs, rhs, sizes, scale, transposed=True)
    with pytest.raises(ValueError, match=r"scale must have shape \[E\] = \[4\], got \[3\]"):
        multiply_groups(lhs, rhs, sizes, scale[:3])
    with pytest.raises(ValueError, match=r"d_out must have shape \[M, N\] = \[143, any\]"):
        sum_groups(lhs, lhs[:3], sizes, scale)
