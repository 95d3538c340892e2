PY := .venv/bin/python
WORKDIR ?= runs/quickstart
FOLDER ?= runs/measured
ARGS ?=
# A file's tests stay in one process, so that they share what they compile.
PYTEST := $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile

.PHONY: help setup train test test-all compile-gpu measure-gpu lint format clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with the pinned packages (with CUDA where nvidia-smi works); at once if it is up to date
	@bash .ci/setup.sh

train: setup ## the quickstart; WORKDIR=runs/quickstart and ARGS="--config.train.steps=100" can be set
	$(PY) train.py --config=configs/quickstart.py --workdir="$(WORKDIR)" $(ARGS)

test: lint ## lint and every fast test
	$(PYTEST)

test-all: lint compile-gpu ## lint, compile-gpu and every test that needs no GPU, the slow ones too
	$(PYTEST) -m "not gpu"

compile-gpu: setup ## compile the operations for GPUs, without one; ARGS="ssd --target=h200" can be set
	@bash .ci/compile-gpu.sh $(ARGS)

measure-gpu: setup ## on a Hopper GPU: the rows of BENCHMARKS.md; ARGS="slice grouped" picks parts, FOLDER=runs/measured
	@bash .ci/measure-gpu.sh "$(FOLDER)" $(ARGS)

lint: setup ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup ## rewrite the files as ruff wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
