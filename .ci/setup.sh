#!/usr/bin/env bash
# Makes .venv and installs the pinned requirements into it (`make setup`); returns at once when nothing has changed.
# Needs bash 3.2 or newer and no Python of its own: it looks for one. Run by hand: bash .ci/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:${HOME:-}/.local/bin" # where uv installs itself and its interpreters; often missing in non-login shells

# The versions that every pinned wheel exists for. Free-threaded builds need wheels of their own, which do not.
SUITABLE='
import sys, sysconfig
version_fits = (3, 12) <= sys.version_info[:2] <= (3, 14)
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
sys.exit(not version_fits or free_threaded or sys.implementation.name != "cpython")
'

# Only running an interpreter tells whether it is one: a pyenv shim is on PATH for versions that are not activated.
suitable() { "$1" -c "$SUITABLE" </dev/null >/dev/null 2>&1; }

candidates() {
  local name root python
  for name in python3.12 python3.13 python3.14 python3 python; do
    type -aP "$name" || true
  done
  for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
    for python in "$root"/versions/3.1[234]*/bin/python; do
      if [ -x "$python" ]; then echo "$python"; fi
    done
  done
}

make_venv() {
  local python version without_ensurepip=
  while IFS= read -r python; do
    suitable "$python" || continue
    if "$python" -c 'import ensurepip, venv' </dev/null >/dev/null 2>&1; then
      echo "Making .venv with $python"
      "$python" -m venv .venv
      return
    fi
    without_ensurepip="${without_ensurepip:-$python}" # Debian and Ubuntu split `venv` off into a package of its own
  done <<<"$(candidates)"

  if command -v uv >/dev/null; then
    echo "Making .venv with uv"
    # Asked for a range, uv would download the newest; where none is installed, take the oldest.
    python=${without_ensurepip:-$(uv python find --no-python-downloads '>=3.12,<3.15' 2>/dev/null || echo 3.12)}
    uv venv --quiet --python "$python" .venv
    return
  fi
  if [ -n "$without_ensurepip" ]; then
    version=$("$without_ensurepip" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "error: $without_ensurepip cannot make virtual environments: install its venv package" \
      "('sudo apt install python$version-venv' on Debian and Ubuntu) or uv (https://docs.astral.sh/uv)," \
      "then run the same command again." >&2
  else
    echo "error: no Python 3.12, 3.13 or 3.14 found: install one ('sudo apt install python3-venv' on Ubuntu 24.04" \
      "and Debian 13) or uv (https://docs.astral.sh/uv), which brings its own, then run the same command again." >&2
  fi
  exit 1
}

# Sets `installer` to the command that installs into .venv (one that uv made has no pip); false when there is none.
find_installer() {
  suitable .venv/bin/python || return 1
  if .venv/bin/python -c 'import pip' </dev/null >/dev/null 2>&1; then
    installer=(.venv/bin/python -m pip install --disable-pip-version-check)
  elif command -v uv >/dev/null; then
    installer=(uv pip install --python .venv/bin/python)
  else
    return 1
  fi
}

requirements=requirements.txt
if nvidia-smi </dev/null >/dev/null 2>&1; then requirements=requirements-cuda.txt; fi

# What .venv/installed.txt holds after a complete installation: the interpreter and every line that was asked for.
wanted() {
  .venv/bin/python --version
  echo "$requirements"
  cat requirements.txt requirements-cuda.txt
}
up_to_date() { suitable .venv/bin/python && [ "$(wanted)" = "$(cat .venv/installed.txt 2>/dev/null)" ]; }

if up_to_date; then exit 0; fi
if command -v flock >/dev/null; then # two `make` at once: the second waits, then finds everything done
  exec 9<requirements.txt
  flock 9
  if up_to_date; then exit 0; fi
fi

if ! find_installer; then
  rm -rf .venv # absent, half made, or its interpreter has gone
  make_venv
  find_installer
fi
installed=$(wanted)
rm -f .venv/installed.txt
echo "Installing $requirements into .venv (one to two minutes the first time, longer with CUDA)"
"${installer[@]}" --quiet -r "$requirements"
echo "$installed" >.venv/installed.txt
