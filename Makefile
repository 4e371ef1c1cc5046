# `make demo` and `make test` set up everything they need on a fresh machine.
PYTHON ?= python3
RANKS ?= 1
OVERRIDES ?=
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

RUN := runs/demo$(if $(filter-out 1,$(RANKS)),-$(RANKS)-ranks)

.PHONY: demo test test-slow test-gpu lint clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed  ## train and evaluate a small CLIP on the embedded data (RANKS=2 for two ranks)
	$(BIN)/scaleclip demo --ranks $(RANKS) run.folder=$(RUN) $(OVERRIDES)

test: $(VENV)/.installed-dev  ## fast tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not slow and not gpu and not slurm"

test-slow: $(VENV)/.installed-dev  ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not gpu and not slurm"
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slurm"

test-gpu: $(VENV)/.installed-dev  ## tests that need a GPU
	TRITON_INTERPRET=0 $(BIN)/pytest -m gpu tests/gpu

lint: $(VENV)/.installed-dev  ## ruff, mypy and the import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_import_rules.py

clean:  ## remove the virtual environment and the demo's runs
	rm -rf $(VENV) runs/demo*

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12" if not (3, 11) <= sys.version_info < (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "venv is missing: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.installed
