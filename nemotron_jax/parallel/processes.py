"""Many processes, one run: how they find each other, wait for each other, agree, and part.

The processes are started by a launcher (srun, mpirun, an indexed Kubernetes Job) or by hand, each with the same
command. JAX's coordination service, which process 0 runs, tells them of each other; heartbeats end all of them when
one is lost.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # there is no public way to the key-value store
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemotron_jax.errors import ConfigError, UserError
from nemotron_jax.run_config import Processes

CONNECT_SECONDS = 300.0  # nodes of one job may start minutes apart
HEARTBEAT_SECONDS = 30  # without a sign of life for this long, a process counts as lost (JAX's default: 100)
SHUTDOWN_SECONDS = 600  # at the end, process 0 draws and samples while the others wait
LOST = 1  # exit code of the processes that have lost another one


@dataclass(frozen=True)
class Launcher:
    """What a launcher says to each process, in its environment.

    Attributes:
      count, index, local_count: names of variables: all processes, this one, those of this host.
    """

    count: str
    index: str
    local_count: str


LAUNCHERS = {
    "srun": Launcher("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun": Launcher("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
}
# Only inside of a job step are all of them there: a shell of salloc, or the script of sbatch, is one process.
_SRUN_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID")
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")


@dataclass(frozen=True)
class Start:
    """The arguments of jax.distributed.initialize; None: JAX asks the launcher."""

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    local_device_ids: list[int] | None  # []: all that this process can see


def find(flags: Processes, environment: Mapping[str, str] = os.environ) -> Start | None:
    """What the flags say, and a launcher's environment where they do not; None: this process is the only one.

    Raises:
      ConfigError: some flags are missing, and no launcher knows their values.
    """
    launcher = _launcher(environment)
    kubernetes = all(name in environment for name in _KUBERNETES)
    count, index = flags.count, flags.index
    if launcher is not None:
        count = int(environment[launcher.count]) if count is None else count
        index = int(environment[launcher.index]) if index is None else index
    elif kubernetes and index is None:
        index = int(environment["JOB_COMPLETION_INDEX"])
    if count == 1 or (count is None and flags.coordinator is None and index is None):
        return None
    if launcher is None and not kubernetes and None in (flags.coordinator, count, index):
        raise ConfigError(
            "without a launcher (srun, mpirun, an indexed Kubernetes Job), each process needs --coordinator=HOST:PORT "
            f"(where process 0 listens), --processes=N and --process=I from 0 to N-1; got {_given(flags)}."
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise ConfigError(f"--process must be from 0 to --processes - 1 ({count - 1}), got {index}.")
    return Start(flags.coordinator, count, index, _devices(launcher, environment))


def _launcher(environment: Mapping[str, str]) -> Launcher | None:
    for name, launcher in LAUNCHERS.items():
        if launcher.count in environment and launcher.index in environment:
            if name == "srun" and not all(variable in environment for variable in _SRUN_STEP):
                continue
            return launcher
    return None


def _given(flags: Processes) -> str:
    values = {"--coordinator": flags.coordinator, "--processes": flags.count, "--process": flags.index}
    return " and ".join(f"{name}={value}" for name, value in values.items() if value is not None)


def _devices(launcher: Launcher | None, environment: Mapping[str, str]) -> list[int] | None:
    """None (one GPU a process, by its number on the host) only where several processes see the same several GPUs.

    JAX's own rule under srun and mpirun is one GPU a process always: a single process on a host of eight would leave
    seven idle, and a process whose GPU the launcher has already picked (--gpus-per-task) would look for another one.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:  # JAX reads it itself
        return None
    if launcher is None:
        return []
    # 8, or of srun "8(x2),4": processes of each host
    alone = all(part.partition("(")[0] == "1" for part in environment.get(launcher.local_count, "").split(","))
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    picked = bool(visible) and "," not in visible
    return [] if alone or picked else None


@contextlib.contextmanager
def joined(flags: Processes, *, connect_seconds: float = CONNECT_SECONDS) -> Iterator[None]:
    """The block runs as one of the processes of a run; must be entered before JAX looks for devices.

    When the block fails in one of many processes, the process ends here, with the exit code that the entry points give
    to the error: an orderly end would wait for the others, which wait for this one.

    Raises:
      ConfigError: see find(); or the address cannot be listened on.
      UserError: the launcher cannot be asked.
    """
    start = find(flags)
    if start is None:
        yield
        return
    _connect(start, connect_seconds)
    try:
        yield
    except BaseException as error:
        _leave(error)
    jax.distributed.shutdown()


def _connect(start: Start, seconds: float) -> None:
    if start.process_id == 0 and start.coordinator_address is not None:
        _check_free(start.coordinator_address)
    # The service would take SIGTERM for itself, and every process would have to be told: training/signals.py does.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX ends the process with a stack trace when its own time is up: ours comes first.
    alarm = threading.Timer(seconds, _give_up, (start, seconds))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator_address=start.coordinator_address,
            num_processes=start.num_processes,
            process_id=start.process_id,
            local_device_ids=start.local_device_ids,
            initialization_timeout=int(seconds) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:  # of JAX, and of what it asks about the launcher
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the processes cannot be connected: {first} (process {start.process_id} of {start.num_processes}, process "
            f"0 at {_address(start)}). --coordinator=HOST:PORT, --processes=N and --process=I say it without asking "
            "the launcher; --processes=1 runs alone."
        ) from error
    finally:
        alarm.cancel()


def _check_free(address: str) -> None:
    """JAX's service does not survive a port that is taken."""
    try:
        with socket.create_server(("", int(address.rpartition(":")[2]))):
            pass
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen on --coordinator={address} ({error.strerror}): name another port."
        ) from error


def _address(start: Start) -> str:
    return global_state.coordinator_address or start.coordinator_address or "an unknown address"


def _give_up(start: Start, seconds: float) -> None:
    address, count = _address(start), start.num_processes or global_state.num_processes
    where = "at" if start.process_id == 0 else "for process 0 at"
    _say(
        f"error: process {start.process_id} waited {seconds:.0f} s {where} {address}, and not all {count} came "
        "together there. Start each of them with the same command, and make sure that they can reach this address."
    )
    os._exit(2)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _leave(error: BaseException) -> NoReturn:
    """Ends this process at once."""
    me = jax.process_index()
    who = "" if me == 0 else f"process {me}: "
    code = 1
    if isinstance(error, UserError):
        _say(f"error: {who}{error}")
        code = 2
    elif isinstance(error, Exception) and _is_of_others(error):
        line = str(error).strip().splitlines()[0][:300]
        _say(
            f"error: process {me} has lost another process of the run, whose own messages say why ({line}). "
            "Run the same command again: it goes on from the last checkpoint."
        )
        code = LOST
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    if me == 0:
        time.sleep(2)  # with it goes the service: the others, which fail for the same reason, should say so first
    os._exit(code)


def _is_of_others(error: Exception) -> bool:
    """Whether communication failed: what reports a peer that is gone does so in words, and exceptions, of its own."""
    words = ["gloo", "nccl", "coordination service"]
    if isinstance(error, jax.errors.JaxRuntimeError):
        words += ["connection", "unavailable", "deadline_exceeded", "timed out"]
    return any(word in str(error).lower() for word in words)


_turns = iter(range(10**9))


def in_turn[T](make: Callable[[], T]) -> T:
    """Process 0 calls ``make`` while the others wait, then these do: what it writes to a shared disk is there for them.

    All processes must call this the same number of times.

    Raises:
      UserError: that of process 0 in all of them, or this process's own.
    """
    if jax.process_count() == 1:
        return make()
    client, key = global_state.client, f"nemotron_jax/turn/{next(_turns)}"
    assert client is not None
    if jax.process_index() == 0:
        try:
            result = make()
        except UserError as error:
            client.key_value_set(key, f"-{error}")
            raise
        client.key_value_set(key, "+")
        return result
    while True:
        try:
            said = client.blocking_key_value_get(key, 1000)
            break
        except jax.errors.JaxRuntimeError as error:  # not in slices, a signal would have to wait for its end
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    if said.startswith("-"):
        raise UserError(said[1:])
    return make()


class Agreement:
    """A number from each process becomes the largest of them, the same in all processes.

    With many processes the answer to a call is that of the call before, which the devices have long computed: asking
    in each step does not make them wait. All processes must call it equally often.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._alone = jax.process_count() == 1
        self._before: Any = 0
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._largest = jax.jit(partial(jnp.max), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, value: int) -> int:
        """The largest value of this call (one process) or of the call before (many; 0 in the first)."""
        if self._alone:
            return value
        before = int(self._before)
        mine = jax.make_array_from_callback((self._size,), self._sharding, lambda _: np.full(1, value, np.int32))
        self._before = self._largest(mine)
        return before
