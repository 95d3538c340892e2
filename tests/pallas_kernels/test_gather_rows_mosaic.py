"""The kernel that gathers rows, interpreted on the CPU with race detection: the reference's bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gather_rows_mosaic, permute
from pallas_kernels.dispatch import choose, compiling_for
from pallas_kernels.gather_rows_mosaic import gather_rows, unfit
from pallas_kernels.permute import permute_reference, unpermute_reference


@pytest.fixture
def few_blocks(monkeypatch):
    """Several steps for each, so that slots come round, and one that has none."""
    monkeypatch.setattr(gather_rows_mosaic, "BLOCKS", 3)
    monkeypatch.setattr(gather_rows_mosaic, "SHARED_BYTES", 3 * 8 * 2 * 384)
    gather_rows_mosaic._kernel.cache_clear()
    yield
    gather_rows_mosaic._kernel.cache_clear()


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width", "chosen"), [(40, 384, 200), (7, 128, 3)])
def test_rows(rows, width, chosen, weighted, interpret, few_blocks):
    x, index = normal(0, rows, width), jnp.asarray(np.random.default_rng(1).integers(0, rows, chosen))
    weights = normal(2, chosen, dtype=jnp.float32) if weighted else None
    want = x[index] if weights is None else (x[index].astype(jnp.float32) * weights[:, None]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gather_rows(x, index, weights, interpret=interpret), want)


def test_dispatch_of_tokens(interpret, few_blocks):
    """Forward and backward, there and back."""
    x, d_y, weights = normal(0, 11, 128), normal(1, 11, 128), normal(2, 11, 2, dtype=jnp.float32)
    ids = jnp.argsort(jax.random.uniform(jax.random.key(0), (11, 5)), axis=1)[:, :2]

    def both(*gather):
        def there_and_back(x, weights):
            rows, _, row_map = permute_reference(x, ids, 5, *gather)
            return unpermute_reference(rows * rows, row_map, weights, *gather)

        y, pull = jax.vjp(there_and_back, x, weights)
        return y, *pull(d_y)

    for got, want in zip(both(functools.partial(gather_rows, interpret=interpret)), both(), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_rows_that_do_not_fit():
    assert unfit(normal(0, 4, 2688)) == unfit(normal(0, 4, 6784)) == ""
    assert "must be bfloat16, got float32" in unfit(normal(0, 4, 128, dtype=jnp.float32))
    for width in (64, 200, 7040):
        assert f"a multiple of 128 and at most 6912, got {width}" in unfit(normal(0, 4, width))
    with pytest.raises(ValueError, match=r"permute: .*mosaic"):
        permute(normal(0, 4, 64), jnp.zeros((4, 1), jnp.int32), 2, impl="mosaic")


def test_it_is_not_chosen_before_it_was_timed():
    with compiling_for("sm_90a"):
        assert choose("permute") == choose("unpermute") == "reference"
