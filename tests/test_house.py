"""`make setup` on machines of every sort, faked: a PATH of stand-ins, and the real .ci/setup.sh. And the test house."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("bash", "cat", "dirname", "flock", "rm", "sh")  # what setup.sh may use, beside what it finds

# A Python that the real one plays: it claims a version, may lack ensurepip as Ubuntu's does, makes environments that
# hold a copy of itself, and writes down what pip is asked for.
PYTHON = """#!/bin/sh
exec "{real}" - "$0" "$@" <<'END'
import os, shutil, sys, time
sys.version_info = {version} + ("final", 0)
if {bare}:
    sys.modules["ensurepip"] = None
this, *arguments = sys.argv[1:]
if arguments[0] == "-c":
    sys.modules["pip"] = None if {bare} else sys
    exec(arguments[1])
elif arguments[0] == "--version":
    print("Python %d.%d.%d" % sys.version_info[:3])
elif arguments[:2] == ["-m", "venv"]:
    os.makedirs(arguments[2] + "/bin")
    shutil.copy(this, arguments[2] + "/bin/python")
elif arguments[:3] == ["-m", "pip", "install"]:
    with open("installs.txt", "a") as log:
        print("pip", arguments[-1], file=log)
    time.sleep({seconds})
    sys.exit(os.path.exists("fail"))
else:
    sys.exit("unexpected: %s" % arguments)
END
"""
# A uv whose environments have no pip; it may have an interpreter of its own, or fetch one.
UV = """#!/bin/sh
case "$1" in
  python) [ -n "{managed}" ] && echo "{managed}";;
  venv) for venv; do :; done; mkdir -p "$venv/bin"; cp "{python}" "$venv/bin/python"; echo "uv $*" >>installs.txt;;
  pip) for file; do :; done; echo "uv $file" >>installs.txt;;
esac
"""


class Machine:
    """A folder with a copy of the files that `make setup` reads, and a PATH and HOME with nothing else in them."""

    def __init__(self, folder: Path):
        self.repo, self.bin, self.home = folder / "a repo", folder / "bin", folder / "home"
        for directory in (self.repo / ".ci", self.bin, self.home, folder / "tools"):
            directory.mkdir(parents=True)
        shutil.copy(ROOT / ".ci" / "setup.sh", self.repo / ".ci" / "setup.sh")
        for name in ("requirements.txt", "requirements-cuda.txt"):
            (self.repo / name).write_text(f"{name}: first\n")
        for tool in (*TOOLS, "mkdir", "cp"):
            if path := shutil.which(tool):
                (folder / "tools" / tool).symlink_to(path)
        self.environment = {"PATH": f"{self.bin}:{folder / 'tools'}", "HOME": str(self.home)}

    def script(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, path: Path, version: tuple[int, int, int], bare: bool = False, seconds: float = 0) -> Path:
        return self.script(path, PYTHON.format(real=sys.executable, version=version, bare=bare, seconds=seconds))

    def setup(self) -> subprocess.CompletedProcess[str]:
        command = ["bash", ".ci/setup.sh"]
        return subprocess.run(command, cwd=self.repo, env=self.environment, capture_output=True, text=True, timeout=60)

    def installs(self) -> list[str]:
        log = self.repo / "installs.txt"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_pyenv_holds_a_version_that_is_not_activated(machine: Machine):
    machine.python(machine.bin / "python3", (3, 11, 7))
    machine.script(machine.bin / "python3.12", "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    machine.python(machine.home / ".pyenv/versions/3.11.7/bin/python", (3, 11, 7))
    found = machine.python(machine.home / ".pyenv/versions/3.12.1/bin/python", (3, 12, 1))
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert f"Making .venv with {found}\n" in done.stdout
    assert machine.installs() == ["pip requirements.txt"]


def test_pyenv_root_elsewhere(machine: Machine, tmp_path: Path):
    found = machine.python(tmp_path / "opt" / "versions" / "3.13.0" / "bin" / "python", (3, 13, 0))
    machine.environment["PYENV_ROOT"] = str(tmp_path / "opt")
    assert f"Making .venv with {found}\n" in machine.setup().stdout


@pytest.mark.parametrize("version", [(3, 12, 3), (3, 13, 5), (3, 14, 0)])
def test_python3_is_new_enough(machine: Machine, version: tuple[int, int, int]):
    found = machine.python(machine.bin / "python3", version)
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert f"Making .venv with {found}\n" in done.stdout


def test_ubuntu_without_its_venv_package(machine: Machine):
    machine.python(machine.bin / "python3", (3, 12, 3), bare=True)
    done = machine.setup()
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "sudo apt install python3.12-venv" in done.stderr
    assert not (machine.repo / ".venv").exists()


def test_ubuntu_without_its_venv_package_but_with_uv(machine: Machine):
    python = machine.python(machine.bin / "python3", (3, 12, 3), bare=True)
    machine.script(machine.bin / "uv", UV.format(python=python, managed=""))
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert machine.installs() == [f"uv venv --quiet --python {python} .venv", "uv requirements.txt"]


@pytest.mark.parametrize(("place", "managed"), [("bin", ""), ("home/.local/bin", ""), ("bin", "/opt/3.13/python")])
def test_only_uv(machine: Machine, tmp_path: Path, place: str, managed: str):
    python = machine.python(tmp_path / "elsewhere" / "python", (3, 12, 9), bare=True)
    machine.script(tmp_path / place / "uv", UV.format(python=python, managed=managed))
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert machine.installs() == [f"uv venv --quiet --python {managed or '3.12'} .venv", "uv requirements.txt"]


@pytest.mark.parametrize("version", [None, (3, 11, 7), (3, 15, 0)])
def test_no_python_says_in_one_sentence_what_to_install(machine: Machine, version: tuple[int, int, int] | None):
    if version:
        machine.python(machine.bin / "python3", version)
    done = machine.setup()
    assert done.returncode != 0
    assert done.stderr.startswith("error: no Python 3.12, 3.13 or 3.14 found: install one")
    assert done.stderr.count("\n") == 1
    assert not (machine.repo / ".venv").exists()


def test_installs_again_only_when_the_requirements_change(machine: Machine):
    machine.python(machine.bin / "python3.12", (3, 12, 1))
    machine.setup()
    assert machine.setup().stdout == ""
    (machine.repo / "requirements.txt").touch()
    machine.setup()
    assert machine.installs() == ["pip requirements.txt"]
    (machine.repo / "requirements.txt").write_text("second\n")
    machine.setup()
    machine.setup()
    assert machine.installs() == ["pip requirements.txt"] * 2


def test_cuda_where_nvidia_smi_works(machine: Machine):
    machine.python(machine.bin / "python3.12", (3, 12, 1))
    nvidia_smi = machine.script(machine.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    machine.setup()
    assert machine.installs() == ["pip requirements.txt"]
    machine.script(nvidia_smi, "#!/bin/sh\nexit 0\n")
    machine.setup()
    machine.setup()
    assert machine.installs() == ["pip requirements.txt", "pip requirements-cuda.txt"]


def test_a_failed_installation_is_tried_again(machine: Machine):
    machine.python(machine.bin / "python3.12", (3, 12, 1))
    (machine.repo / "fail").touch()
    assert machine.setup().returncode != 0
    (machine.repo / "fail").unlink()
    assert machine.setup().returncode == 0
    assert machine.installs() == ["pip requirements.txt"] * 2


def test_an_environment_whose_interpreter_has_gone_is_made_anew(machine: Machine):
    machine.python(machine.bin / "python3.12", (3, 12, 1))
    (machine.repo / ".venv" / "bin").mkdir(parents=True)
    (machine.repo / ".venv" / "bin" / "python").symlink_to(machine.home / "gone")
    (machine.repo / ".venv" / "installed.txt").write_text("all of it\n")
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert machine.installs() == ["pip requirements.txt"]
    assert not (machine.repo / ".venv" / "bin" / "python").is_symlink()


@pytest.mark.skipif(shutil.which("flock") is None, reason="setup.sh takes turns only where flock is installed")
def test_two_at_once_take_turns(machine: Machine):
    machine.python(machine.bin / "python3.12", (3, 12, 1), seconds=0.5)
    with ThreadPoolExecutor() as pool:
        first, second = pool.submit(machine.setup), pool.submit(machine.setup)
    assert (first.result().returncode, second.result().returncode) == (0, 0)
    assert machine.installs() == ["pip requirements.txt"]


def test_every_requirement_is_pinned():
    for name in ("requirements.txt", "requirements-cuda.txt"):
        lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        assert not [line for line in lines if line and "==" not in line and line != "-r requirements.txt"]


def test_tests_run_on_eight_cpu_devices(one_device_env: dict[str, str]):
    assert jax.default_backend() == "cpu"
    assert jax.device_count() == 8
    assert "device_count" not in one_device_env["XLA_FLAGS"]
    assert one_device_env["PATH"] == os.environ["PATH"]
