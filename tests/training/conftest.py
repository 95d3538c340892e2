"""Runs under test use one of the fake devices unless they say otherwise."""

import jax
import pytest

from nemotron_jax.parallel import mesh


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """``make_mesh`` without a list of devices sees the first one, as on a machine that has one."""
    original = mesh.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda config, devices=None: original(config, devices or jax.devices()[:1]))
        yield
