# Each target works alone on a fresh clone: it makes .venv, installs what pyproject.toml names at the versions that
# requirements.lock pins, and runs. PIP_ARGS is handed to pip, e.g. PIP_ARGS="--extra-index-url URL" for CPU builds of torch.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install check test test-all quickstart bench docs

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d: PYTHON=python3.12 make ..." \
	    % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/pip || { rm -rf .venv; $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint requirements.lock --group test --group lint --editable .
	touch $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/slime quickstart

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/architecture

docs: $(INSTALLED)
	$(BIN)/python -m slime.cli.reference > .reference.tmp
	mv .reference.tmp docs/reference/arguments.md

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint requirements.lock --group bench
	$(BIN)/python -m benchmarks.quickstart_seeds
	$(BIN)/python -m benchmarks.engine_cpu
	$(BIN)/python -m benchmarks.step_cpu
	$(BIN)/python -m benchmarks.save_cpu
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.rollout_modes
