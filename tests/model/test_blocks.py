"""Contracts that every block keeps; a new letter in BLOCKS gets all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemotron_jax.model.context import Context
from nemotron_jax.model.layer import BLOCKS, REMAT
from nemotron_jax.model.state import select_accepted

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
letters = pytest.mark.parametrize("letter", list(BLOCKS))


def tokens_of(rng, *shape):
    return jnp.asarray(rng.integers(0, 64, shape), jnp.int32)


@letters
def test_shapes_and_finite_gradients(letter, block_model, rng):
    config, model = block_model(letter)
    tokens = tokens_of(rng, 2, 13)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        out = nnx.merge(graphdef, params, rest)(tokens)
        assert out.hidden.shape == (2, 13, config.hidden_size)
        assert out.logits.shape == (2, 13, config.vocab_size) and out.logits.dtype == jnp.float32
        return jnp.square(out.logits).sum()

    gradients = jax.grad(loss)(params)
    for path, gradient in nnx.to_flat_state(gradients):
        values = np.asarray(gradient.get_value())
        assert np.isfinite(values).all(), path
        assert np.abs(values).max() > 0, path


@letters
def test_causality(letter, block_model, rng):
    _, model = block_model(letter)
    tokens = tokens_of(rng, 2, 21)
    changed = tokens.at[:, 12].set((tokens[:, 12] + 1) % 64)
    before, after = model(tokens).logits, model(changed).logits
    np.testing.assert_allclose(before[:, :12], after[:, :12], **TOLERANCE)
    assert np.abs(before[:, 12] - after[:, 12]).max() > 1e-3


@letters
def test_packed_documents_are_isolated(letter, block_model, rng):
    """A packed row gives each document the logits it has alone, also documents of one token and ids that return."""
    _, model = block_model(letter)
    lengths = [9, 1, 2, 14, 1]
    documents = [tokens_of(rng, 1, length) for length in lengths]
    ids = jnp.asarray(np.repeat([1, 2, 1, 4, 5], lengths))[None]
    packed = model(jnp.concatenate(documents, axis=1), ids).logits
    start = 0
    for document, length in zip(documents, lengths, strict=True):
        np.testing.assert_allclose(packed[:, start : start + length], model(document).logits, **TOLERANCE)
        start += length


@letters
@pytest.mark.parametrize("prefill", [0, 1, 7])
def test_prefill_and_decode_equal_the_full_pass(letter, prefill, block_model, rng):
    _, model = block_model(letter)
    tokens = tokens_of(rng, 3, 12)
    full = model(tokens).hidden
    state = model.init_state(3, 16)
    parts = []
    if prefill:
        hidden, state, _ = model.hidden(tokens[:, :prefill], Context(), state)
        parts.append(hidden)
    for position in range(prefill, 12):
        hidden, state, _ = model.hidden(tokens[:, position : position + 1], Context(), state)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, **TOLERANCE)
    np.testing.assert_array_equal(state.lengths, 12)


@letters
def test_right_padded_prefill(letter, block_model, rng):
    """Prompts of unequal length, padded on the right, go on as if each had been alone; one shorter than the conv."""
    _, model = block_model(letter)
    lengths = [1, 5, 9]
    tokens = tokens_of(rng, 3, 14)
    padded = jnp.where(jnp.arange(9)[None] < jnp.asarray(lengths)[:, None], tokens[:, :9], 63)
    state = model.init_state(3, 16)
    _, state, _ = model.hidden(padded, Context(new_tokens=jnp.asarray(lengths)), state)
    for number in range(3):
        following = jnp.stack([tokens[row, length + number] for row, length in enumerate(lengths)])[:, None]
        hidden, state, _ = model.hidden(following, Context(), state)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, : length + 3]).hidden[0, -1]
        np.testing.assert_allclose(hidden[row, 0], alone, **TOLERANCE)


@letters
def test_rollback_of_drafted_tokens(letter, block_model, rng):
    """Advance by 5 drafted tokens, accept 2 (another row 0, another all): equal to never having drafted the rest."""
    _, model = block_model(letter)
    tokens, accepted = tokens_of(rng, 3, 6), jnp.asarray([2, 0, 5])
    drafted, following = tokens_of(rng, 3, 5), tokens_of(rng, 3, 2)
    _, state, _ = model.hidden(tokens, Context(), model.init_state(3, 16))
    verified, state, _ = model.hidden(drafted, Context(draft=True), state)
    np.testing.assert_allclose(verified, model(jnp.concatenate([tokens, drafted], axis=1)).hidden[:, 6:], **TOLERANCE)
    state = select_accepted(state, accepted)
    np.testing.assert_array_equal(state.lengths, 6 + accepted)
    hidden, state, _ = model.hidden(following, Context(), state)
    for row, count in enumerate([2, 0, 5]):
        sequence = jnp.concatenate([tokens[row], drafted[row, :count], following[row]])[None]
        np.testing.assert_allclose(hidden[row], model(sequence).hidden[0, -2:], **TOLERANCE)


@letters
def test_slots_and_pages(letter, block_model, rng):
    """Rows served from other rows of the state, and keys and values in scattered pages, give the same result."""
    _, model = block_model(letter)
    tokens = tokens_of(rng, 2, 10)
    full = model(tokens).hidden
    slots = jnp.asarray([3, 1])
    state = model.init_state(4, 12)
    paged = model.init_state(4, 12, pages=9, page_size=4)
    table = jnp.asarray([[7, 0, 2], [5, 8, 1]])
    for start, stop in ((0, 6), (6, 7), (7, 10)):
        part = tokens[:, start:stop]
        hidden, state, _ = model.hidden(part, Context(slots=slots), state)
        np.testing.assert_allclose(hidden, full[:, start:stop], **TOLERANCE)
        hidden, paged, _ = model.hidden(part, Context(slots=slots, page_table=table), paged)
        np.testing.assert_allclose(hidden, full[:, start:stop], **TOLERANCE)
    np.testing.assert_array_equal(state.lengths, [0, 10, 0, 10])


@letters
def test_remat_changes_no_gradient(letter, block_model, rng):
    _, model = block_model(letter)
    tokens = tokens_of(rng, 2, 9)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def gradient(remat):
        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            return jnp.square(model.hidden(tokens, Context(), remat=remat)[0]).sum()

        return jax.grad(loss)(params)

    plain = jax.tree.leaves(gradient("none"))
    for policy in REMAT:
        for a, b in zip(plain, jax.tree.leaves(gradient(policy)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_draft_must_be_settled(block_model, rng):
    _, model = block_model("M")
    tokens = tokens_of(rng, 1, 3)
    _, state, _ = model.hidden(tokens, Context(draft=True), model.init_state(1, 8))
    with pytest.raises(ValueError, match="select_accepted"):
        model.hidden(tokens, Context(), state)
    _, state, _ = model.hidden(tokens, Context(), model.init_state(1, 8))
    with pytest.raises(ValueError, match="draft=True"):
        select_accepted(state, jnp.asarray([1]))


def test_mamba_state_dtype_is_a_setting(block_model, rng):
    """A bfloat16 state stays bfloat16 and costs accuracy of its own size, no more."""
    _, model = block_model("M")
    tokens = tokens_of(rng, 2, 8)
    state = model.init_state(2, 8, mamba_dtype="bfloat16")
    parts = []
    for position in range(8):
        hidden, state, _ = model.hidden(tokens[:, position : position + 1], Context(), state)
        parts.append(hidden)
    assert state.layers[0].ssm_BHPN.dtype == jnp.bfloat16
    error = jnp.abs(jnp.concatenate(parts, axis=1) - model(tokens).hidden).max()
    assert 1e-5 < error < 5e-2


def test_contexts_differ_by_layer():
    ctx = Context(seed=jnp.uint32(7))
    seeds = {int(ctx.for_layer(i).seed) for i in range(100)}
    assert len(seeds) == 100
    assert Context().for_layer(3).seed is None
    assert dataclasses.replace(ctx, seed=jnp.uint32(8)).for_layer(0).seed != ctx.for_layer(0).seed
