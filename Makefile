# Needs only make and Python 3.11 to 3.13. `make PYTHON=python3.12 install` selects another interpreter.

PYTHON ?= python3
UV_VERSION := 0.13.8
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-install
HINT := install Python 3.11, 3.12 or 3.13, or name one, as in make PYTHON=python3.12 install
JOBS ?= 2
RAY_JOBS ?= 3
BENCHMARKS := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))

# Two torch threads on one core are many times slower than one.
export OMP_NUM_THREADS ?= 1
# Some wheels are large and may take long on a slow connection.
export UV_HTTP_TIMEOUT ?= 300

.DEFAULT_GOAL := help
COMPAT := .compat
.PHONY: help install venv demo test test-slow compat soak cluster-test lint format bench toy clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## create .venv with the pinned requirements and this project

# A working .venv is kept: creating it again with another interpreter would break it.
$(STAMP): requirements.txt pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(MAKE) --no-print-directory venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -e .
	@touch $@

venv:
	@command -v $(PYTHON) >/dev/null || { echo "'$(PYTHON)' is not there: $(HINT)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo "acpo_dist does not run on $$($(PYTHON) --version 2>&1): $(HINT)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

demo: $(STAMP) ## train and compare on an embedded toy, without GPU or network
	$(BIN)/acpo demo

# Tests of one file run in one process and share fixtures; tests/conftest.py starts the longest files first.
# Tests on Ray leave their process connected to a cluster, so they run after the others; much of their time they wait.
test: $(STAMP) ## all tests that run on the CPU
	$(BIN)/python -m pytest tests -m "not ray and not slow and not cluster" -n $(JOBS) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest tests/ray -m "ray and not slow and not cluster" -n $(RAY_JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP) ## long tests: more cases, long statistics, SDXL and SD3.5 at full size (20 GiB of memory)
	ACPO_FULL_SIZE=1 $(BIN)/python -m pytest tests -m "slow and not cluster" -n 1

soak: $(STAMP) ## runs with random faults for ten minutes; ARGS="--minutes 120 --seed 7"
	$(BIN)/python -m tests.soak $(ARGS)

# The oldest libraries that docs/sdxl.md promises, in a folder that goes before .venv on the path.
compat: $(STAMP) ## open every export and embedded toy with older diffusers, transformers and peft
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $(COMPAT) --no-deps -r tests/compat/requirements.txt
	rm -rf build/compat && mkdir -p build/compat
	$(BIN)/python -m tests.compat.write build/compat
	PYTHONPATH=$(COMPAT) $(BIN)/python tests/compat/check.py build/compat

cluster-test: $(STAMP) ## a cluster of three hosts in namespaces, from `ray up` to `ray down`; needs root, takes half an hour
	$(BIN)/python -m tests.cluster.bench $(ARGS)

lint: $(STAMP) ## style, formatting, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: $(STAMP) ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: $(STAMP) ## run every benchmark
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

toy: $(STAMP) ## train the embedded toy models again
	$(BIN)/acpo toy build

clean: ## remove caches and build products; keeps .venv and runs/
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find $(wildcard acpo_dist actors tests benchmarks) -type d -name __pycache__ -prune -exec rm -rf {} +
