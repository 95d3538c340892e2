"""Token ids that follow other token ids."""

import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.errors import ConfigError, DataError
from nemotron_jax.inference.generate import generate, read_tokens, write_array
from nemotron_jax.inference.sampling import Sampling
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.precision.recipe import RECIPES
from tests.tiny import TINY


@pytest.fixture(scope="module")
def model():
    return Nemotron(TINY, RECIPES["float32"], jax.random.key(0))


def test_greedy_tokens_are_the_arg_max_of_the_full_pass(model):
    """Rows of unequal length, which begin and end on both sides of a border of Mamba chunks (8 tokens)."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, length).astype(np.int32) for length in (1, 7, 8, 20)]
    made = np.stack(list(generate(model, prompts, 10, Sampling(temperature=0))))
    for row, prompt in enumerate(prompts):
        whole = np.concatenate([prompt, made[:, row]])
        logits = np.asarray(model(jnp.asarray(whole[None])).logits[0])
        np.testing.assert_array_equal(made[:, row], logits[len(prompt) - 1 : -1].argmax(-1))


def test_rows_of_unequal_length_are_independent(model):
    prompts = [np.array([3, 4, 5], np.int32), np.arange(9, dtype=np.int32)]
    together = np.stack(list(generate(model, prompts, 6, Sampling(temperature=0))))
    for row, prompt in enumerate(prompts):
        alone = np.stack(list(generate(model, [prompt], 6, Sampling(temperature=0))))
        np.testing.assert_array_equal(together[:, row], alone[:, 0])


def test_a_seed_repeats_and_another_differs(model):
    prompts = [np.array([3, 4], np.int32)]
    made = [np.stack(list(generate(model, prompts, 12, Sampling(), seed=seed))) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seed": -1}, r"seed must be in \[0, 2\^32\), got -1"),
        ({"seed": 2**32}, "seed must be"),
        ({"tokens": 0}, "must be positive, got 0"),
        ({"tokens": 262144}, "holds 262144 tokens, .* a prompt of 1 and 262144 new tokens: shorten"),
    ],
)
def test_bad_requests(model, bad, message):
    request = {"tokens": 1, "sampling": Sampling(), "seed": 0} | bad
    with pytest.raises(ConfigError, match=message):
        next(generate(model, [np.array([3], np.int32)], **request))


@pytest.mark.parametrize("values", [np.array([[2**32 + 5]]), np.array([[-1]]), np.array([[1.0]]), np.array([1])])
def test_token_files_that_are_refused(values, tmp_path):
    np.save(tmp_path / "t.npy", values)
    with pytest.raises(DataError):
        read_tokens(tmp_path / "t.npy")
    np.savez(tmp_path / "t.npz", values)
    with pytest.raises(DataError, match="archive"):
        read_tokens(tmp_path / "t.npz")
    with pytest.raises(DataError, match="cannot be written"):
        write_array(tmp_path / "missing" / "t.npy", values)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16])
def test_damaged_token_files(content, tmp_path):
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a NumPy array"):
        read_tokens(tmp_path / "t.npy")


def test_a_full_disk_leaves_no_part_of_an_array(tmp_path):
    values = np.zeros((64, 64), np.int32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be written \(.+\)"):
            write_array(tmp_path / "t.npy", values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([np.array([], np.int32)], "no empty ones"),
        ([np.array([5, 64], np.int32)], "from 0 to 63, the model's vocabulary; its largest is 64"),
        ([np.array([-1])], "from 0 to 63"),
    ],
)
def test_bad_prompts(model, prompts, message):
    with pytest.raises(ConfigError, match=message):
        next(generate(model, prompts, 1, Sampling()))
