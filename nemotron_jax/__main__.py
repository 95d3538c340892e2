"""Looks at models and runs them.

python -m nemotron_jax params PRESET_OR_DIR [--seq=8192]
    parameters and training FLOPs a token, as JSON
python -m nemotron_jax plan PRESET_OR_DIR --mesh=fsdp=8,expert=8 --batch=B --seq=T [--stack-layers --interconnect=ib200]
    memory, traffic and limits of a training step on GPUs that need not be there, as JSON
python -m nemotron_jax generate --checkpoint=DIR --prompt=TEXT [--tokens=N ...]
    answers a message or continues a text, or token ids with --prompt-tokens=IN.npy --out=OUT.npy
python -m nemotron_jax convert SRC DST [--format=bf16|fp8|nvfp4]
    Hugging Face directory -> training workdir, and either of them -> Hugging Face directory (with --format from the
    former; fp8 and nvfp4 with --calibration=FILES); --dry-run PRESET_OR_DIR lists the tensors instead
python -m nemotron_jax bench train|prefill|decode --preset=NAME [--pattern=LETTERS --batch=B --seq=T --mesh=fsdp=8 ...]
    speed and memory with random weights, as JSON

Each command takes --help. Exit codes: 0 done, 2 bad input, 130 interrupted, 141 the reader of its output has gone.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nemotron_jax.cli import Parser, existing_path, main, mesh_axes, number, one_of, output_file, target
from nemotron_jax.config import PRESETS, ModelConfig
from nemotron_jax.errors import ConfigError, UserError, did_you_mean
from nemotron_jax.hf_config import from_hf
from nemotron_jax.run_config import ParallelConfig, from_dict

# JAX is imported inside the commands, after their flags: it takes seconds.


def params(argv: Sequence[str]) -> int:
    """Prints one JSON object: total, active and mtp parameters, those of one layer by kind, FLOPs."""
    parser = Parser("python -m nemotron_jax params", "Counts from the shapes of the real model, which is not made.")
    parser.add_argument("model", metavar="PRESET_OR_DIR", nargs="?", help=f"{', '.join(PRESETS)}, or a directory")
    seq = number(int, least=1, name="a positive number of tokens")
    parser.add_argument("--seq", type=seq, default=8192, help="sequence length of flops_per_token (default: 8192)")
    flags = parser.parse_args(argv)
    if not flags.model:
        raise UserError(f"params needs a preset ({', '.join(PRESETS)}) or a directory with a config.json.")
    config = model_config(flags.model)
    from nemotron_jax.model.counts import count_parameters, flops_per_token

    counts = count_parameters(config) | {"flops_per_token": flops_per_token(config, flags.seq), "seq": flags.seq}
    print(json.dumps(counts))
    return 0


def plan(argv: Sequence[str]) -> int:
    """Prints one JSON object: memory of a device, bytes of collectives, milliseconds by resource, what limits."""
    parser = Parser("python -m nemotron_jax plan", "A training step of H200 GPUs, on paper.")
    parser.add_argument("model", metavar="PRESET_OR_DIR", nargs="?", help=f"{', '.join(PRESETS)}, or a directory")
    parser.add_argument("--mesh", type=mesh_axes, metavar="AXIS=N,...", help="such as fsdp=8,expert=8; others are 1")
    positive = number(int, least=1, name="a positive whole number")
    parser.add_argument("--batch", type=positive, metavar="B", help="rows of a microbatch, of all devices together")
    parser.add_argument("--seq", type=positive, metavar="T", help="tokens of a row")
    parser.add_argument("--precision", type=one_of("bfloat16", "float32"), default="bfloat16", metavar="RECIPE")
    parser.add_argument("--remat", type=one_of("none", "full"), default="full", help="as config.train.remat")
    parser.add_argument("--stack-layers", action="store_true", help="as config.parallel.stack_layers")
    links = "beyond a host: ib200, ib400 (the default), ib800: one port of so many Gb/s a GPU; nvl72: racks of 72"
    parser.add_argument("--interconnect", default="ib400", metavar="NAME", help=links)
    flags = parser.parse_args(argv)
    if not flags.model:
        raise UserError(f"plan needs a preset ({', '.join(PRESETS)}) or a directory with a config.json.")
    parser.require(flags, "mesh", "batch", "seq", what="plan")
    config = model_config(flags.model)
    from nemotron_jax.model.counts import parts
    from nemotron_jax.model.nemotron import abstract, find_layer_stack
    from nemotron_jax.parallel.plan import Plan, Work
    from nemotron_jax.precision.recipe import RECIPES
    from pallas_kernels import aot

    recipe = RECIPES[flags.precision]
    work = Work(flags.batch, flags.seq, 2 if flags.precision == "bfloat16" else 4, flags.remat, flags.interconnect)
    with aot.compiling_for("h200"):  # what its kernels save
        made = parts(config, flags.seq, recipe)
    stack = find_layer_stack([abstract(config, recipe)], lambda _: True) if flags.stack_layers else None
    print(json.dumps(Plan(config, made, ParallelConfig(**{"data": 1, **flags.mesh}), work, stack).report()))
    return 0


def model_config(name: str) -> ModelConfig:
    """The model that a preset, a training workdir or a Hugging Face directory describes.

    Raises:
      ConfigError: it is none of these, or its config.json does not make sense.
    """
    if name in PRESETS:
        return PRESETS[name]
    file = Path(name).expanduser() / "config.json"
    if not file.parent.is_dir():
        raise ConfigError(
            f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a directory.{did_you_mean(name, PRESETS)}"
        )
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from error
    if isinstance(values, dict) and "model_type" in values:
        return from_hf(values)
    if isinstance(values, dict) and "model" in values:
        return from_dict(values).model
    raise ConfigError(f"{file} has neither model_type (Hugging Face) nor model (train.py): it describes no model.")


def generate(argv: Sequence[str]) -> int:
    """Streams what a model says to a prompt to stdout, or writes the continuation of token ids to a file."""
    parser = Parser("python -m nemotron_jax generate", "Samples from a checkpoint.")
    parser.add_argument("--checkpoint", type=existing_path, metavar="DIR", help="a training workdir or an HF directory")
    message = "a message to the model where DIR has a chat template, else a text to continue"
    parser.add_argument("--prompt", metavar="TEXT", help=message)
    parser.add_argument("--system", metavar="TEXT", help="the system message of the chat")
    parser.add_argument("--no-thinking", action="store_true", help="ask the chat for an answer without reasoning")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as text in spite of a chat template")
    parser.add_argument("--prompt-tokens", type=existing_path, metavar="IN.npy", help="token ids instead: [B, T]")
    parser.add_argument("--out", type=output_file, metavar="OUT.npy", help="int32 [B, N], with --prompt-tokens")
    positive = number(int, least=1, name="a positive number of tokens")
    parser.add_argument("--tokens", type=positive, default=256, metavar="N", help="at most (default: 256)")
    temperature = number(float, least=0, name="a number that is not negative")
    parser.add_argument("--temperature", type=temperature, default=1.0, help="0: the likeliest token (default: 1)")
    parser.add_argument("--top-p", type=temperature, default=0.95, help="in (0, 1]; 1: all tokens (default: 0.95)")
    top_k = number(int, least=0, name="a whole number that is not negative")
    parser.add_argument("--top-k", type=top_k, default=0, help="0: all tokens (default: 0)")
    parser.add_argument("--seed", type=top_k, default=0, help="the same seed, the same text (default: 0)")
    flags = parser.parse_args(argv)
    parser.require(flags, "checkpoint", what="generate")
    if not 0 < flags.top_p <= 1:
        raise UserError(f"--top-p must be in (0, 1], got {flags.top_p}.")
    if (flags.prompt is None) == (flags.prompt_tokens is None) or (flags.out is None) != (flags.prompt_tokens is None):
        raise UserError("generate needs either --prompt=TEXT, or --prompt-tokens=IN.npy and --out=OUT.npy.")
    if flags.prompt is None and (flags.system is not None or flags.no_thinking or flags.raw):
        raise UserError("--system, --no-thinking and --raw go with --prompt=TEXT: token ids are continued as they are.")
    settings = {name: getattr(flags, name) for name in ("tokens", "temperature", "top_p", "top_k", "seed")}
    if flags.prompt is None:
        from nemotron_jax.inference.generate import generate_tokens

        generate_tokens(flags.checkpoint, flags.prompt_tokens, flags.out, **settings)
        return 0
    from nemotron_jax.inference.text import generate_text

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    chat = {"raw": flags.raw, "system": flags.system, "thinking": not flags.no_thinking}
    for piece in generate_text(flags.checkpoint, flags.prompt, **chat, **settings):
        print(piece, end="", flush=True)
    print()
    return 0


def convert(argv: Sequence[str]) -> int:
    """Writes a model in the other layout, or in another format; or lists the tensors of one: name, dtype, shape."""
    parser = Parser("python -m nemotron_jax convert", "Converts checkpoints, holding one tensor at a time in memory.")
    parser.add_argument(
        "source", metavar="SRC", nargs="?", type=existing_path, help="a training workdir or an HF directory"
    )
    parser.add_argument("target", metavar="DST", nargs="?", help="a directory that does not exist yet, or is empty")
    parser.add_argument("--format", metavar="FORMAT", help=f"{', '.join(FORMATS)}; default: as each tensor is")
    parser.add_argument("--step", type=number(int, least=0, name="a step"), metavar="N", help="default: the last one")
    parser.add_argument(
        "--calibration", metavar="FILES", help="text that fp8 and nvfp4 measure activations on: paths and globs"
    )
    parser.add_argument("--dry-run", metavar="PRESET_OR_DIR", help="list the tensors of its Hugging Face checkpoint")
    flags = parser.parse_args(argv)
    if flags.format not in (None, *FORMATS):
        hint = did_you_mean(flags.format, FORMATS)
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {flags.format!r}.{hint}")
    if flags.dry_run is not None:
        if flags.source or flags.step is not None or flags.calibration:
            raise UserError("convert --dry-run=PRESET_OR_DIR takes no SRC, DST, --step or --calibration.")
        config = model_config(flags.dry_run)
        from nemotron_jax.checkpoint.convert import dry_run

        directory = None if flags.dry_run in PRESETS else Path(flags.dry_run).expanduser()
        for tensor in dry_run(config, directory, flags.format):
            print(tensor.name, tensor.dtype, json.dumps(tensor.shape, separators=(",", ":")))
        return 0
    if not flags.source or not flags.target:
        raise UserError("convert needs SRC and DST, or --dry-run=PRESET_OR_DIR.")
    target = Path(flags.target).expanduser()
    if flags.calibration and flags.format not in ("fp8", "nvfp4"):
        raise UserError("--calibration is for --format=fp8 and --format=nvfp4, which store the ranges of activations.")
    from nemotron_jax.checkpoint import convert as converting

    converting.check_target(target)
    calibration = None
    if flags.calibration:
        from nemotron_jax.evaluation.calibration import calibrate_on

        calibration = calibrate_on(flags.source, flags.calibration, step=flags.step)
    done = converting.convert(flags.source, target, format=flags.format, step=flags.step, calibration=calibration)
    print(
        f"wrote {done.tensors:,} tensors, {done.nbytes / 1e9:,.3f} GB, to {target} in {done.seconds:.1f} s "
        f"({done.nbytes / done.seconds / 1e9:.2f} GB/s)"
    )
    return 0


def bench(argv: Sequence[str]) -> int:
    """Prints one JSON object: what was measured, compile seconds, memory, step time, tokens/s, FLOP/s and MFU."""
    parser = Parser("python -m nemotron_jax bench", "Speed and memory with random weights and tokens.")
    kinds = ("train", "prefill", "decode")
    parser.add_argument("what", choices=kinds, metavar="|".join(kinds), help="the step to measure")
    parser.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)}, or a directory with a config.json")
    parser.add_argument("--pattern", metavar="LETTERS", help="other layers, such as MEMEM*EME")
    positive = number(int, least=1, name="a positive whole number")
    parser.add_argument("--batch", type=positive, default=1, help="rows, of all devices together (default: 1)")
    parser.add_argument(
        "--seq", type=positive, default=8192, help="tokens of a row; decode: before the new one (default: 8192)"
    )
    parser.add_argument("--precision", default="auto", metavar="RECIPE", help="as config.precision.recipe")
    parser.add_argument("--mesh", type=mesh_axes, default={}, metavar="AXIS=N,...", help="such as fsdp=4,expert=2")
    parser.add_argument("--steps", type=positive, default=20, help="timed steps (default: 20)")
    parser.add_argument("--remat", type=one_of("none", "full"), default="none", help="train: as config.train.remat")
    parser.add_argument("--documents", type=positive, default=1, help="train: packed in each row (default: 1)")
    parser.add_argument(
        "--optimizer",
        action="store_true",
        help="train: the whole step of train.py, AdamW on float32 weights, not loss and gradients in bfloat16 alone",
    )
    parser.add_argument(
        "--stack-layers", action="store_true", help="train, with --optimizer: as config.parallel.stack_layers"
    )
    parser.add_argument("--cache", default="", metavar="DIR", help="keep compiled programs there, for the next run")
    parser.add_argument("--profile", default="", metavar="DIR", help="of three more steps: kernels and collectives")
    parser.add_argument("--compile-only", action="store_true", help="run nothing and take no memory")
    parser.add_argument(
        "--compile-for", type=target, default=("", 1), metavar="GPU[:N]", help="only compile, for h200 or b200"
    )
    flags = parser.parse_args(argv)
    parser.require(flags, "preset", what="bench")
    if flags.stack_layers and not (flags.what == "train" and flags.optimizer):
        parser.error("--stack-layers is a view of the whole training step: use it with train and --optimizer")
    if flags.profile and (flags.compile_only or flags.compile_for[0]):
        parser.error("--profile is taken of steps that run: leave out --compile-only and --compile-for")
    model = model_config(flags.preset)
    if flags.pattern is not None:
        model = dataclasses.replace(model, pattern=flags.pattern)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # nothing else runs on these devices
    from nemotron_jax.bench import Workload, run

    names = "batch seq precision remat optimizer documents steps cache profile compile_only".split()
    settings = {name: getattr(flags, name) for name in names}
    name, count = flags.compile_for
    parallel = ParallelConfig(**flags.mesh, stack_layers=flags.stack_layers)
    work = Workload(model, **settings, parallel=parallel, target=name, target_devices=count)
    print(json.dumps(run(flags.what, work)))
    return 0


COMMANDS = {"params": params, "plan": plan, "generate": generate, "convert": convert, "bench": bench}
FORMATS = ("bf16", "fp8", "nvfp4")


def run(argv: Sequence[str]) -> int:
    """Hands the arguments to the command that the first of them names; returns the exit code.

    Ctrl-C, and a pipe whose reader has gone (``| head``), end a command without a traceback, with the exit codes that
    shells give to the signals.
    """
    name, *rest = argv or [""]
    if name in COMMANDS:
        try:
            code = COMMANDS[name](rest)
            if sys.stdout is not None:  # closed by the caller: >&-
                sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at its end
            return 141
        return code
    if name in ("-h", "--help"):
        print(__doc__, end="")
        return 0
    got = f"got {name!r}.{did_you_mean(name, COMMANDS)}" if name else "got none."
    raise UserError(f"python -m nemotron_jax needs one of the commands {', '.join(COMMANDS)}; {got}")


if __name__ == "__main__":
    main(run)
