#!/usr/bin/env bash
# Compiles the operations for GPUs on any machine (`make compile-gpu`). The compiler is two wheels (140 MB) that need
# neither GPU nor CUDA; they stay out of .venv, where jax would look for a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.cache/gpu-compiler
pins=$(grep -E '^jax-cuda13-(pjrt|plugin)==' requirements-cuda.txt)
if [ "$pins" != "$(cat $folder/installed.txt 2>/dev/null)" ]; then
  echo "Installing" $pins "into $folder"
  rm -rf $folder
  if .venv/bin/python -c 'import pip' </dev/null >/dev/null 2>&1; then
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --target $folder $pins
  else
    uv pip install --quiet --python .venv/bin/python --no-deps --target $folder $pins
  fi
  echo "$pins" >$folder/installed.txt
fi
PYTHONPATH=$folder exec .venv/bin/python -m pallas_kernels.compile "$@"
