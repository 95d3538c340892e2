"""``python -m nemotron_jax generate``: from flags to streams; the generation itself is tests/inference/."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.test_cli import ROOT, call


@pytest.fixture
def generation(monkeypatch):
    """Stands for generation itself; remembers what it was asked."""

    stand_in = types.SimpleNamespace(asked=[], says=["né", "w"])

    def answer(*arguments, **settings):
        stand_in.asked.append((arguments, settings))
        return iter(stand_in.says)

    for name, function in (("generate", "generate_tokens"), ("text", "generate_text")):
        module = types.ModuleType(name)
        setattr(module, function, answer)
        monkeypatch.setitem(sys.modules, f"nemotron_jax.inference.{name}", module)
    return stand_in


def test_generate_streams_text(monkeypatch, capfd, generation, tmp_path: Path):
    flags = [f"--checkpoint={tmp_path}", "--prompt=", "--tokens=5", "--temperature=0", "--top-p=1", "--top-k=3"]
    chat = ["--raw", "--system=", "--no-thinking"]
    assert call(monkeypatch, capfd, "nemotron_jax", "generate", *flags, "--seed=7") == (0, "néw\n", "")
    assert call(monkeypatch, capfd, "nemotron_jax", "generate", *flags, "--seed=7", *chat) == (0, "néw\n", "")
    settings = {"tokens": 5, "temperature": 0.0, "top_p": 1.0, "top_k": 3, "seed": 7}
    assert generation.asked == [
        ((tmp_path, ""), settings | {"raw": False, "system": None, "thinking": True}),
        ((tmp_path, ""), settings | {"raw": True, "system": "", "thinking": False}),
    ]


def test_generate_continues_tokens(monkeypatch, capfd, generation, tmp_path: Path):
    (tmp_path / "in.npy").touch()
    flags = [f"--checkpoint={tmp_path}", f"--prompt-tokens={tmp_path / 'in.npy'}", f"--out={tmp_path / 'out.npy'}"]
    assert call(monkeypatch, capfd, "nemotron_jax", "generate", *flags) == (0, "", "")
    settings = {"tokens": 256, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "seed": 0}
    assert generation.asked == [((tmp_path, tmp_path / "in.npy", tmp_path / "out.npy"), settings)]


def test_control_c_leaves_what_was_said(monkeypatch, capfd, generation, tmp_path: Path):
    def interrupted():
        yield "né"
        raise KeyboardInterrupt

    generation.says = interrupted()
    flags = [f"--checkpoint={tmp_path}", "--prompt=a"]
    assert call(monkeypatch, capfd, "nemotron_jax", "generate", *flags) == (130, "né", "")


SAYS = """
import itertools, sys, types
text = sys.modules["nemotron_jax.inference.text"] = types.ModuleType("text")
text.generate_text = lambda *_, **__: {pieces}
from nemotron_jax import __main__ as front, cli
sys.argv[1:] = ["generate", "--checkpoint=.", "--prompt=a"]
cli.main(front.run)
"""


def test_a_reader_that_has_seen_enough():
    """generate | head: neither a traceback nor Python's complaint about a last flush."""
    command = [sys.executable, "-c", SAYS.format(pieces="itertools.repeat('word ')")]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, cwd=ROOT, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(5) == b"word "
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_nobody_wants_its_output():
    """generate >&-"""
    command = [sys.executable, "-c", SAYS.format(pieces="['a']")]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=ROOT, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_that_is_not_utf8(one_device_env):
    done = subprocess.run(
        [sys.executable, "-c", SAYS.format(pieces="['n', 'é']")],
        cwd=ROOT,
        env=one_device_env | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"n?\n", b"")
