# Everything a fresh machine needs is Python 3.10 or newer with pip and venv, and make.
#
#   make run                      set up .venv and run the main job with its defaults
#   make run ARGS="model=mlp"     the same with other settings
#   make test                     set up .venv and run the tests

PYTHON ?= python3
VENV ?= .venv
# Installed first and pinned: the newest torch may be one that nothing here was tested with. Where the package index
# offers only CUDA builds, name a CPU build: make run TORCH="torch==2.13.0+cpu --extra-index-url URL".
TORCH ?= torch==2.13.0
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2

PY := $(VENV)/bin/python
say = @printf '[make] %s\n'
# constraints.txt holds exact versions for Python 3.11; other versions of Python take what pyproject.toml admits, and a
# new pip, for that of Python 3.10 does not come to an end with so many to choose from.
CONSTRAINTS = $$($(PY) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')
PIP = $(PY) -m pip --disable-pip-version-check -qq install

# One thread per worker: the tests' tensors are small, and more threads only get in each other's way.
TEST_ENV = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help run test test-robust lint check format bench bench-speed multitask-demo docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

$(PY):
	$(say) "Creating a virtual environment in $(VENV) with $(PYTHON)."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "[make] $(PYTHON) is older than Python 3.10; choose another: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "[make] venv is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@test -n "$(CONSTRAINTS)" || $(PIP) -U 'pip>=24'

$(VENV)/.torch: | $(PY)
	$(say) "Installing $(TORCH) (first time only)."
	@$(PIP) $(TORCH)
	@touch $@

# Installed for running; re-done when the requirements change.
$(VENV)/.run: pyproject.toml constraints.txt $(VENV)/.torch
	$(say) "Installing the package with what running needs (first time only, about a minute)."
	@$(PIP) $(CONSTRAINTS) -e '.[gym,mujoco,dm-control,launch,plot,tensorboard,video]'
	@touch $@

# Installed for developing: tests, linter, type checker, every environment and logger.
$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(say) "Installing the package with everything the tests need (first time only, about two minutes)."
	@$(PIP) $(CONSTRAINTS) -e '.[dev]'
	@touch $(VENV)/.run $@

run: $(VENV)/.run  ## set up and run the main job (ARGS="model=mlp seed=1" changes it)
	$(say) "Running: $(PY) launch/submit.py $(ARGS)"
	@$(PY) launch/submit.py $(ARGS)
	@test "$$(dirname "$$(command -v python)")" -ef $(VENV)/bin || printf '[make] %s\n' "To type python instead of $(PY): source $(VENV)/bin/activate"

test: $(VENV)/.dev  ## set up and run all tests (PYTEST_ARGS="-m 'not slow'" chooses)
	@$(PY) -c 'from ctypes.util import find_library as f; f("EGL") or f("OSMesa") or print("[make] Neither EGL nor \
	OSMesa was found: MuJoCo videos cannot be rendered (on Debian: apt-get install libegl1 libosmesa6).")'
	$(say) "Running the tests with $(WORKERS) workers."
	@$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-robust: $(VENV)/.dev  ## all of tests/robustness: every kind of damage, signal and malformed setting (an hour)
	$(say) "Running the whole robustness suite with $(WORKERS) workers."
	@$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal tests/robustness --robust-full $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## format, lint and types
	$(say) "Checking the format (make format repairs it)."
	@$(PY) -m ruff format --check .
	$(say) "Linting."
	@$(PY) -m ruff check .
	$(say) "Checking types."
	@$(PY) -m mypy

check: lint  ## lint, then the fast tests: before every commit
	@$(MAKE) --no-print-directory test PYTEST_ARGS="-m 'not slow' $(PYTEST_ARGS)"

format: $(VENV)/.dev  ## format the code and repair what the linter can
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix-only .

bench: $(VENV)/.dev  ## train models x environments x seeds and write the learning table (ARGS=...)
	$(say) "Running: python benchmarks/learning.py $(ARGS)"
	@$(PY) benchmarks/learning.py $(ARGS)

bench-speed: $(VENV)/.dev  ## time updates and epochs against floors and a plain baseline (ARGS=--quick)
	$(say) "Running: python benchmarks/speed.py $(ARGS)"
	@$(PY) benchmarks/speed.py $(ARGS)

multitask-demo: $(VENV)/.dev  ## two tasks: data, one world model, a policy per task (ARGS="--out DIR")
	$(say) "Running: python benchmarks/multitask.py --demo $(ARGS)"
	@$(PY) benchmarks/multitask.py --demo $(ARGS)

docs: $(VENV)/.dev  ## build the site, warnings as errors, into build/docs
	$(say) "Building the site."
	@$(PY) -m sphinx -q -W --keep-going -b html docs build/docs
	$(say) "Open build/docs/index.html."

clean:  ## remove .venv, caches and builds; runs/ is kept
	rm -rf $(VENV) build dist docs/reference/generated .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
