"""Times the implementations of every op.

python -m pallas_kernels [OP ...] [--case=NAME,...] [--impl=NAME,...] [--small] [--draws=N | --no-check]

On a GPU: the shapes of the released models in bfloat16; elsewhere the small test cases, which say that everything
runs and little else. A row is one implementation of one case in one direction:

  ms        median over batches of launches that are queued together and waited for once; inputs rotate through
            copies that do not fit the cache together, or, where few of many experts have rows, through all experts.
            What takes no longer than a few empty launches runs TOGETHER times in one program instead
  TFLOP/s, GB/s   the least arithmetic and the least bytes of the case (the op's `cost`) over that time
  roofline  the least time, by the two ceilings measured first (a device copy, a matmul), over that time
  error     the largest relative Frobenius error of outputs and gradients against the float32 truth, and of which;
            peers (such as a dense matmul of the same size) have none; "inf repeat": two runs differed

A case that fails says so in its row, and the exit code is 1 at the end.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # this process has the GPU to itself

import jax
import jax.numpy as jnp

from pallas_kernels import suite
from pallas_kernels.cost import Cost
from pallas_kernels.suite import SUITE

CACHE_BYTES = 200e6  # inputs smaller than this rotate: three times the 50 to 60 MB of an H100 or H200
QUEUED_BYTES = 10e9
TOGETHER = 32
ON_GPU = jax.default_backend() == "gpu"
SAMPLE_SECONDS, SAMPLES = (0.04, 15) if ON_GPU else (0.002, 3)


def median_seconds(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> float:
    """Seconds of one call: each sample queues calls for SAMPLE_SECONDS and waits for the last of them."""
    for _ in range(2):
        result = jax.block_until_ready(call(*sets[0]))
    # Results of queued calls may all be held at once.
    most = max(1, int(QUEUED_BYTES / (1 + sum(z.nbytes for z in jax.tree.leaves(result)))))
    started = time.perf_counter()
    jax.block_until_ready(call(*sets[0]))
    once = time.perf_counter() - started
    if once > 1:
        return once
    launches = max(1, min(1000, most, round(SAMPLE_SECONDS / once)))
    samples = []
    for _ in range(SAMPLES if once < 0.2 else 3):
        started = time.perf_counter()
        for i in range(launches):
            result = call(*sets[i % len(sets)])
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - started) / launches)
    return statistics.median(samples)


def ceilings() -> tuple[float, float]:
    """(bytes/s of a device copy, read and written; FLOP/s of a matmul), bfloat16 and random on a GPU."""
    size, dtype = (8192, jnp.bfloat16) if ON_GPU else (512, jnp.float32)
    key = jax.random.key(0)
    long = jax.random.normal(key, (2**29 if ON_GPU else 2**24,), dtype)
    copied = 2 * long.nbytes / median_seconds(jax.jit(jnp.copy), [(long,)])
    a, b = jax.random.normal(key, (2, size, size), dtype)
    multiplied = 2 * size**3 / median_seconds(jax.jit(jnp.matmul), [(a, b)])
    return copied, multiplied


def least_seconds(cost: Cost, backward: bool, copied: float, multiplied: float) -> tuple[float, float, float]:
    """(operations, bytes, the least time) of a case; backward: forward and backward pass together."""
    flops = cost.flops + (cost.backward_flops if backward else 0)
    moved = cost.bytes + (cost.backward_bytes if backward else 0)
    return flops, moved, max(flops / multiplied, moved / copied)


def time_case(op: str, case: Any, impl: str, backward: bool, launch: float) -> float:
    """Median seconds of one implementation of one case; ``launch``: of an empty program."""
    given = suite.inputs(op, case)
    both = suite.forward_backward if backward else suite.forward
    call = jax.jit(both(op, impl, given.settings))
    extra = (suite.output_gradients(op, given),) if backward else ()
    first = (given.arrays, *extra)
    unread = sum(given.arrays[name].nbytes for name in SUITE[op].for_peers)
    size = sum(z.nbytes for z in jax.tree.leaves(first)) - unread
    elsewhere = SUITE[op].elsewhere if SUITE[op].cost(case).bytes < CACHE_BYTES < size else None

    def again(i: int) -> tuple[Any, ...]:
        return (elsewhere(given.arrays, i), *extra) if elsewhere else jax.tree.map(jnp.copy, first)

    copies = TOGETHER if elsewhere else max(1, min(64, round(CACHE_BYTES / size)))
    sets = [first, *map(again, range(1, copies if ON_GPU else 1))]
    seconds = median_seconds(call, sets)
    if not ON_GPU or seconds > 4 * launch or (TOGETHER * size > QUEUED_BYTES and not elsewhere):
        return seconds
    sets += map(again, range(copies, TOGETHER))
    return median_seconds(jax.jit(lambda *sets: [call(*one) for one in sets]), [tuple(sets)]) / len(sets)


def _cases(op: str, *, named: bool, small: bool) -> tuple[Any, ...]:
    """Those to choose from by name, or those that run when none is named."""
    entry = SUITE[op]
    if named:
        return (*entry.cases, *entry.benchmarks)
    return entry.benchmarks if ON_GPU and not small else entry.cases


def _worst(op: str, case: Any, impl: str, draws: int) -> str:
    if impl in SUITE[op].peers:
        return ""
    found = suite.errors(op, case, impl, seeds=range(draws))
    name = max(found, key=found.__getitem__)
    return f"{found[name]:.1e} {name}"


def _short(error: Exception) -> str:
    """The first line of an error: those of XLA are pages long."""
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:160]}"


def _comma(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit code: 1 when a case failed."""
    parser = argparse.ArgumentParser("python -m pallas_kernels", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(SUITE)} (default: all)")
    parser.add_argument("--case", type=_comma, metavar="NAME,...", help="these cases only, test cases included")
    parser.add_argument("--small", action="store_true", help="the small test cases, on a GPU too")
    parser.add_argument("--impl", type=_comma, metavar="NAME,...", help="these implementations and peers only")
    parser.add_argument("--draws", type=int, default=1, help="random inputs that the error is the largest of")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison with the truth")
    flags = parser.parse_args(argv)
    if unknown := [op for op in flags.ops if op not in SUITE]:
        parser.error(f"unknown op {unknown[0]!r}; known: {', '.join(SUITE)}")
    work = [
        (op, case)
        for op in flags.ops or SUITE
        for case in _cases(op, named=bool(flags.case), small=flags.small)
        if not flags.case or case.name in flags.case
    ]
    if not work:
        parser.error(f"no case is called {', '.join(flags.case)} in {', '.join(flags.ops or SUITE)}")

    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind}; bfloat16 inputs", flush=True)
    if not ON_GPU:
        print("No GPU here: the small test cases, which show that everything runs, not how fast.", flush=True)
    copied, multiplied = ceilings()
    tiny = median_seconds(jax.jit(lambda x: x + 1), [(jnp.ones(8),)])
    print(
        f"ceilings: copy {copied / 1e9:.0f} GB/s, matmul {multiplied / 1e12:.3g} TFLOP/s; an empty launch takes "
        f"{1e3 * tiny:.4f} ms",
        flush=True,
    )
    print(f"\n{'op':20}{'case':24}{'impl':16}{'pass':9}{'ms':>10}{'TFLOP/s':>10}{'GB/s':>8}{'roofline':>10}  error")
    failed = False
    for op, case in work:
        try:
            reasons = suite.implementations(op, suite.inputs(op, case, abstract=True))
        except Exception as error:
            print(f"{op:20}{case.name:24}failed: {_short(error)}", flush=True)
            failed = True
            continue
        runnable = [impl for impl, reason in reasons.items() if not reason]
        # The reference is there to be right: where something else runs too, it has to be asked for.
        wanted = flags.impl or [impl for impl in runnable if impl != "reference" or impl == runnable[0]]
        for impl in filter(wanted.__contains__, runnable):
            for backward in (False, True) if SUITE[op].backward else (False,):
                direction = "fwd+bwd" if backward else "fwd"
                print(f"{op:20}{case.name:24}{impl:16}{direction:9}", end="", flush=True)
                try:
                    seconds = time_case(op, case, impl, backward, tiny)
                    flops, moved, least = least_seconds(SUITE[op].cost(case), backward, copied, multiplied)
                    print(
                        f"{1e3 * seconds:10.4f}{flops / seconds / 1e12:10.2f}{moved / seconds / 1e9:8.0f}"
                        f"{least / seconds:10.1%}",
                        end="  ",
                        flush=True,
                    )
                    print("" if backward or flags.no_check else _worst(op, case, impl, flags.draws), flush=True)
                except Exception as error:  # the other cases are still worth their time
                    print(f"  failed: {_short(error)}", flush=True)
                    failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
