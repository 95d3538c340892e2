"""Compiles every op for GPUs that are not there and shows what the kernels use (`make compile-gpu`).

python -m pallas_kernels.compile [OP ...] [--target=h200,b200] [--case=NAME,...] [--impl=NAME,...] [--jobs=N]

A row is one implementation of one case in one direction: the kernels in it, the registers, shared memory and spills
of each as ptxas and the launch say, the temporary memory of the program, and seconds of tracing and compiling.
Kernels are compiled for every test and benchmark case that they take; plain XLA for the benchmarks where it is what
runs. The exit code is 1 when something does not compile or a kernel spills registers to memory.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import aot, dispatch, suite
from pallas_kernels.suite import SUITE


def prepare() -> None:
    """For a process that compiles: no search for a GPU, and a compiler of kernels that prints to its descriptors."""
    jax.config.update("jax_platforms", "cpu")  # the environment variable is read when jax is imported
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    os.environ["MOSAIC_GPU_DUMP_HOST_LLVM"] = "1"


class Job(NamedTuple):
    """One compilation; ``case`` counts through the cases and benchmarks of the op."""

    target: str
    op: str
    case: int
    impl: str
    backward: bool


class Report(NamedTuple):
    """What came of a Job. ``kernels``: Mosaic kernels in the program; the lists have an entry for each."""

    seconds: float = 0.0
    kernels: int = 0
    registers: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    spills: tuple[int, ...] = ()
    serialised: bool = False
    temporary: int = 0
    error: str = ""


@contextlib.contextmanager
def captured() -> Iterator[IO[bytes]]:
    """What this process prints goes to a temporary file, C++ code included."""
    with tempfile.TemporaryFile() as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield file
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


def read_dump(text: str) -> dict[str, Any]:
    """The figures of each kernel in what a compilation printed, in the order in which they were compiled."""
    # Arguments of the launch: stream, grid, cluster, block, bytes of dynamic shared memory, ...
    launches = re.findall(r"call i32 @mosaic_gpu_launch_kernel\(ptr %\d+,(?: i32 [^,]+,){9} i32 (\d+),", text)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    return {
        "registers": tuple(int(count) for count in re.findall(r"Used (\d+) registers", text)),
        "shared": tuple(int(size) for size in launches),
        "spills": tuple(int(stored) + int(loaded) for stored, loaded in spills),
        "serialised": "serializ" in text,  # ptxas: wgmma instructions wait for each other
    }


def compile_job(job: Job) -> Report:
    """Traces, lowers and compiles one program; errors become part of the report."""
    case = _cases(job.op)[job.case]
    started = time.perf_counter()
    with captured() as output:
        try:
            with aot.compiling_for(job.target):
                program = _lower(job, case).compile()
            seconds = time.perf_counter() - started
            kernels = len(re.findall(r'custom_call_target="mosaic_gpu', program.as_text()))
            temporary = program.memory_analysis().temp_size_in_bytes
            error = ""
        except Exception as problem:
            lines = str(problem).strip().splitlines() or ["?"]
            seconds, kernels, temporary, error = 0.0, 0, 0, f"{type(problem).__name__}: {lines[0][:300]}"
        finally:
            jax.clear_caches()
        sys.stderr.flush()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Report(seconds, kernels, temporary=temporary, error=error, **read_dump(text))


def _cases(op: str) -> tuple[Any, ...]:
    return (*SUITE[op].cases, *SUITE[op].benchmarks)


def _lower(job: Job, case: Any) -> Any:
    mesh = Mesh(np.array(aot.devices(job.target)), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    given = suite.inputs(job.op, case, abstract=True)
    arguments: tuple[Any, ...] = (given.arrays,)
    if job.backward:
        arguments += (suite.output_gradients(job.op, given, abstract=True),)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    both = suite.forward_backward if job.backward else suite.forward
    return jax.jit(both(job.op, job.impl, given.settings)).lower(*shapes)


def jobs(targets: Sequence[str], ops: Sequence[str], cases: Sequence[str], impls: Sequence[str]) -> Iterator[Job]:
    """What is worth compiling; empty ``cases`` and ``impls`` name none in particular."""
    for target in targets:
        for op in ops:
            with dispatch.compiling_for("none"):
                everywhere = {impl for impl, check in dispatch.OPS[op].items() if not check()}
            for number, case in enumerate(_cases(op)):
                if cases and case.name not in cases:
                    continue
                with aot.compiling_for(target):
                    taken = suite.implementations(op, suite.inputs(op, case, abstract=True))
                runnable = [impl for impl in dispatch.OPS[op] if not taken[impl]]
                kernels = [impl for impl in runnable if impl not in everywhere]
                is_benchmark = number >= len(SUITE[op].cases)
                wanted = kernels or (runnable[:1] if is_benchmark and target == targets[0] else [])
                if impls:
                    wanted = [impl for impl in runnable if impl in impls]
                for impl in wanted:
                    for backward in (False, True) if SUITE[op].backward else (False,):
                        yield Job(target, op, number, impl, backward)


def _each(values: Sequence[int]) -> str:
    """``168``, or ``168 2x232``."""
    return " ".join(f"{count}x{value}" if count > 1 else f"{value}" for value, count in Counter(values).items()) or "-"


def _row(job: Job, report: Report) -> str:
    case = _cases(job.op)[job.case]
    direction = "fwd+bwd" if job.backward else "fwd"
    head = f"{job.target:6}{job.op:20}{case.name:24}{job.impl:11}{direction:8}"
    if report.error:
        return f"{head} FAILED {report.error}"
    shared = [round(size / 1024, 1) for size in report.shared]
    figures = f"{report.kernels:>8}{_each(report.registers):>18}{_each(shared):>24}{_each(report.spills):>8}"  # type: ignore[arg-type]
    remark = "  wgmma serialised" if report.serialised else ""
    return f"{head}{figures}{report.temporary / 2**20:>10.1f}{report.seconds:>8.1f}{remark}"


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser("python -m pallas_kernels.compile", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def comma(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(SUITE)} (default: all)")
    parser.add_argument("--target", type=comma, default=list(aot.TARGETS), help="h200, b200 (default: both)")
    parser.add_argument("--case", type=comma, default=[], metavar="NAME,...", help="these cases only")
    parser.add_argument("--impl", type=comma, default=[], metavar="NAME,...", help="these implementations only")
    parser.add_argument(
        "--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    flags = parser.parse_args(argv)
    for word, known in [(op, SUITE) for op in flags.ops] + [(target, aot.TARGETS) for target in flags.target]:
        if word not in known:
            parser.error(f"unknown {word!r}; known: {', '.join(known)}")
    prepare()
    try:
        aot.devices(flags.target[0])
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    work = list(jobs(flags.target, flags.ops or list(SUITE), flags.case, flags.impl))
    if not work:
        parser.error("no implementation takes these cases on these targets")
    print(
        f"{'target':6}{'op':20}{'case':24}{'impl':11}{'pass':8}{'kernels':>8}{'registers':>18}{'shared KiB':>24}"
        f"{'spills':>8}{'temp MiB':>10}{'seconds':>8}",
        flush=True,
    )
    failures = spilling = 0
    with ProcessPoolExecutor(flags.jobs, get_context("spawn"), prepare) as pool:
        futures = [pool.submit(compile_job, job) for job in work]
        for job, future in zip(work, futures, strict=True):
            try:
                report = future.result()
            except BrokenProcessPool:
                report = Report(error="the compiler ended the process; this case or one compiled beside it")
            print(_row(job, report), flush=True)
            failures += bool(report.error)
            spilling += any(report.spills)
    print(
        f"{len(work)} programs in {time.perf_counter() - started:.0f} s: {failures} failed, {spilling} with spills",
        flush=True,
    )
    return int(failures > 0 or spilling > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
