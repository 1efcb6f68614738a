# What people and CI run. Needs Python 3.11 or 3.12, and nothing else that it does not install into .venv itself.
#
#   PYTHON=/path/to/python3.12   another interpreter
#   PIP_FLAGS="..."              more pip options, such as an index that has CPU-only builds of torch

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup run test check bench leaderboard clean

PYTHON ?= python3.11 python3.12 python3
VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile $(PIP_FLAGS) -c constraints.txt

# Installing without compiling halves the set-up; Python then compiles what is really imported, once, if it may.
unexport PYTHONDONTWRITEBYTECODE
# The package itself comes from this checkout, whatever else is on the path.
unexport PYTHONPATH

help:
	@echo "make run          set up, then train, score and compare five tiny models on this machine (configs/quickstart.yaml)"
	@echo "make test         set up, then the tests"
	@echo "make check        ruff and pyright"
	@echo "make bench        time a ReFINE step against a next-token step"
	@echo "make leaderboard  the page and the README's table, from leaderboard/records"
	@echo "make clean        remove .venv and caches; runs/ stays"

setup: $(VENV)/.ready

run: $(VENV)/.ready
	@$(BIN)/refine run configs/quickstart.yaml

test: $(VENV)/.ready-dev
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.ready
	@$(BIN)/python benchmarks/step.py

leaderboard: $(VENV)/.ready
	@$(BIN)/refine leaderboard build --readme README.md

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache dist build
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# Each candidate is really run: a version manager's shim may stand for a Python that is not installed.
USABLE := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

$(VENV)/.ready: pyproject.toml constraints.txt
	@if ! $(BIN)/python -c "$(USABLE)" 2> /dev/null; then \
	  found=; \
	  for name in $(PYTHON); do \
	    for path in $$(type -aP "$$name"); do \
	      if "$$path" -c "$(USABLE)" > /dev/null 2>&1; then found=$$path; break 2; fi; \
	    done; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no Python 3.11 or 3.12 with venv among: $(PYTHON). Install one (on Debian also python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; \
	    exit 2; \
	  fi; \
	  echo "set-up 1/3: .venv with $$found"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@echo "set-up 2/3: torch"
	@$(PIP) torch
	@echo "set-up 3/3: the project and its dependencies (a minute or two)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "set-up: what tests and checks need"
	@$(PIP) -e ".[dev]"
	@# torch's CUDA build brings its own Triton; without one, kernels are tested in the interpreter of this.
	@if [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -c "import triton" 2> /dev/null; then $(PIP) triton==3.7.1; fi
	@touch $@
