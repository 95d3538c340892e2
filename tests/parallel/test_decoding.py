"""A prompt and single tokens with a decode state on a mesh: what one device computes, whatever divides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.model.context import Context
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.precision.recipe import RECIPES
from tests.tiny import TINY


@pytest.mark.parametrize("rows", [1, 2])
def test_a_mesh_decodes_as_one_device(rows, eight):
    """Rows or tokens that the mesh does not divide are whole on each device."""
    model = Nemotron(dataclasses.replace(TINY, pattern="ME*", mtp=None), RECIPES["float32"], jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (rows, 9), 0, TINY.vocab_size)

    @jax.jit
    def logits(tokens):
        state = model.init_state(rows, 12)
        prompt, state, _ = model.hidden(tokens[:, :7], Context(), state)
        hidden = [prompt]
        for t in (7, 8):
            one, state, _ = model.hidden(tokens[:, t : t + 1], Context(), state)
            hidden.append(one)
        return model.logits(jnp.concatenate(hidden, axis=1))

    expected = model(tokens).logits
    with jax.set_mesh(eight(context=2, expert=2, tensor=2)):
        np.testing.assert_allclose(logits(tokens), expected, atol=1e-5)
