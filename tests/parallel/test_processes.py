"""How processes find each other; real ones run in tests/test_many_processes.py."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from nemotron_jax.errors import ConfigError
from nemotron_jax.parallel import mesh as meshes
from nemotron_jax.parallel.processes import Agreement, Start, find, in_turn, joined
from nemotron_jax.run_config import ParallelConfig, Processes

ROOT = Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "gpu[1-2]",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (Processes(), {}, None),
        (Processes(), SLURM, Start(None, 16, 11, None)),
        # All GPUs of the host for its only process; the one that the launcher has picked.
        (Processes(), SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, Start(None, 16, 11, [])),
        (Processes(), SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, Start(None, 16, 11, [])),
        (Processes(), SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, Start(None, 16, 11, None)),
        (Processes(), SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8,1(x2)"}, Start(None, 16, 11, None)),
        (Processes(), SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # The script of sbatch, or a shell of salloc: no step.
        (Processes(), {name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"}, None),
        (Processes(), MPI, Start(None, 4, 1, None)),
        (Processes(coordinator="a:1"), MPI, Start("a:1", 4, 1, None)),
        (Processes(), POD, None),
        (Processes(), POD | {"JOB_COMPLETION_INDEX": "2"}, Start(None, None, 2, [])),
        (Processes("a:1", 2, 1), {}, Start("a:1", 2, 1, [])),
        (Processes("a:1", 2, 1), {"JAX_LOCAL_DEVICE_IDS": "0"}, Start("a:1", 2, 1, None)),
        (Processes(count=1), SLURM, None),
    ],
)
def test_what_is_found(flags, environment, expected):
    assert find(flags, environment) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (Processes("a:1"), "each process needs .* got --coordinator=a:1"),
        (Processes(count=4, index=0), "got --processes=4 and --process=0"),
        (Processes("a:1", 2, 2), r"--process must be from 0 to --processes - 1 \(1\), got 2"),
    ],
)
def test_flags_that_say_too_little(flags, message):
    with pytest.raises(ConfigError, match=message):
        find(flags, {})


@pytest.mark.parametrize("index", [0, 1])
def test_a_peer_that_never_comes(index, one_device_env, unused_port):
    code = f"""
from nemotron_jax.cli import main
from nemotron_jax.parallel.processes import joined
from nemotron_jax.run_config import Processes
def run(_):
    with joined(Processes("127.0.0.1:{unused_port}", 2, {index}), connect_seconds=2):
        raise AssertionError
main(run)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=one_device_env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"127.0.0.1:{unused_port}" in done.stderr and "waited 2 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on --coordinator=here:{port} .* name another port"):
            joined(Processes(f"here:{port}", 2, 0)).__enter__()


def test_one_process_has_nobody_to_ask():
    assert in_turn(lambda: 5) == 5
    assert Agreement(meshes.make_mesh(ParallelConfig()))(15) == 15


@pytest.mark.parametrize(
    ("sizes", "owners", "expected"),
    [
        ({"data": 4, "fsdp": 2}, 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 2, "tensor": 4}, 8, [(0, 2)] * 4 + [(1, 2)] * 4),  # a batch shard on four processes
        ({"data": 2, "context": 4}, 4, [(0, 2)] * 2 + [(1, 2)] * 2),
        ({"data": 1, "tensor": 8}, 4, [(0, 1)] * 4),
        ({"data": 8}, 1, [(0, 1)]),
    ],
)
def test_each_process_has_its_share_of_the_rows(monkeypatch, sizes, owners, expected):
    mesh = meshes.make_mesh(ParallelConfig(**sizes))
    each = mesh.size // owners
    monkeypatch.setattr(meshes, "_process", lambda device: device.id // each)
    assert [meshes.batch_share(mesh, process) for process in range(owners)] == expected


def test_shares_that_overlap(monkeypatch):
    """A row goes over three devices, a process has two."""
    mesh = meshes.make_mesh(ParallelConfig(data=2, tensor=3), jax.devices()[:6])
    monkeypatch.setattr(meshes, "_process", lambda device: device.id // 2)
    with pytest.raises(ConfigError, match=r"data=2, tensor=3 does not fit 3 processes: context \* tensor \(3\)"):
        meshes.batch_share(mesh, 0)
