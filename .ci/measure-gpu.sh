#!/usr/bin/env bash
# Measures on one Hopper GPU what BENCHMARKS.md claims of one (`make measure-gpu`): each part writes NAME.txt into a
# folder, so that a part that fails or takes too long costs itself alone.
#
#   .ci/measure-gpu.sh FOLDER [NAME ...]        all parts, or those named, in this order:
#
#   slice           training slice of Nano: tokens/s, MFU, peak memory
#   grouped         grouped matmul and experts' MLP, Nano, Super and Ultra, beside a dense batched matmul
#   compile_cold    the whole Nano training step, compiled into an empty cache ...
#   compile_warm    ... and by another process that finds it there
#   attention       attention and decode attention
#   dispatch        permute, unpermute, embeddings and their gradient
#   mamba           SSD and causal convolution
#   quantize        NVFP4 along both axes, beside the copy that its roofline column is a share of
#   block_scaled    packed NVFP4 weights, beside bfloat16
#   numerics        every kernel's small cases: the largest error of ten draws, values and gradients, and repeated runs
#   numerics_large  the same at the shapes of the released models, three draws
#   tests           pytest -m gpu
set -uo pipefail
cd "$(dirname "$0")/.."
parts="slice grouped compile_cold compile_warm attention dispatch mamba quantize block_scaled numerics numerics_large tests"
usage="usage: .ci/measure-gpu.sh FOLDER [NAME ...], NAME of: $parts"
[ $# -ge 1 ] || { echo "$usage" >&2; exit 2; }
folder=$1
shift
for name in "$@"; do
  case " $parts " in *" $name "*) ;; *) echo "unknown part $name; $usage" >&2; exit 2 ;; esac
done
command -v nvidia-smi >/dev/null || { echo "no NVIDIA GPU here (nvidia-smi is missing)" >&2; exit 2; }
python=${PYTHON:-.venv/bin/python}
kernels="$python -m pallas_kernels"
step="$python -m nemotron_jax bench train --preset=nano --optimizer --remat=full --batch=1 --seq=8192 --compile-only"
cache=$folder/cache
mkdir -p "$folder"
failed=0

part() { # NAME COMMAND ...: what it prints goes to the screen and to NAME.txt
  local name=$1 started=$SECONDS
  shift
  echo "== $name: $*"
  { echo "\$ $*"; timeout 550 "$@"; } 2>&1 | tee "$folder/$name.txt"
  local code=${PIPESTATUS[0]}
  echo "== $name took $((SECONDS - started)) s, exit code $code"
  [ "$code" = 0 ] || failed=1
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv | tee "$folder/gpu.txt"
for name in ${*:-$parts}; do
  case $name in
    slice) part "$name" $python -m nemotron_jax bench train --preset=nano --pattern='MEMEM*EME' --batch=2 --seq=8192 ;;
    grouped) part "$name" $kernels grouped_matmul grouped_mlp --impl=mosaic,dense --no-check ;;
    compile_cold) rm -rf "$cache"; part "$name" $step --cache="$cache" ;;
    compile_warm) part "$name" $step --cache="$cache"; rm -rf "$cache" ;;
    attention) part "$name" $kernels attention decode_attention --no-check ;;
    dispatch) part "$name" $kernels permute unpermute take_rows --no-check ;;
    mamba) part "$name" $kernels ssd causal_conv1d --impl=mosaic --no-check ;;
    quantize) part "$name" $kernels quantize quantize_operands ;;
    block_scaled) part "$name" $kernels block_scaled_matmul ;;
    numerics) part "$name" $kernels --small --draws=10 ;;
    numerics_large) part "$name" $kernels --case=nano,nano_packed,nano_up_relu2,nano_down,super_up --impl=mosaic,cudnn --draws=3 ;;
    tests) part "$name" $python -m pytest -q -m gpu ;;
  esac
done
exit $failed
