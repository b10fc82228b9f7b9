# make demo    a comparison of classical and deep models on a real series, from an empty machine
# make test    the tests;   make test PYTEST_ARGS='-m slow'   the slow ones
# make fuzz    the property tests on new random examples
# make lint    ruff and mypy;   make format   let ruff rewrite
# make docs    the documentation, in docs/_build/html
# make bench   the benchmarks, one script after another
# make clean   remove what the others made, but not the environment
#
# All that a machine needs is make and Python >= 3.11 with venv; PYTHON names another interpreter.
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL ...) are honoured.

PYTHON ?= python3
OUTPUT ?= demo-output
PYTEST_ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Byte-compiling all of torch, scipy and pandas takes longer than downloading them, and most of it is
# never imported: each module is compiled, and cached in .venv, when it is first used.
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE
SPECS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test fuzz lint format docs bench clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("seqdgm needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: its pin must be settled before any other package can ask the
# resolver for a newer torch, which would bring several GB of CUDA libraries along.
$(VENV)/.installed: $(SPECS) | $(BIN)/python
	@echo "Installing seqdgm into $(VENV) (once; a minute or two)"
	$(INSTALL) torch
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) --editable '.[docs]'
	@touch $@

# One thread: the matrices of these models are small, and sharing them out costs more than it saves.
demo: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/seqdgm compare airline --output $(OUTPUT)

# One thread a worker: the workers already fill the cores.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

fuzz: $(VENV)/.installed-test
	HYPOTHESIS_PROFILE=explore OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
		-m 'slow or not slow' tests/test_fuzzing.py tests/test_panel.py tests/test_arima_system.py \
		tests/test_kalman_kernels.py $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# Files that begin with an underscore are helpers of the scripts, not scripts.
# One thread for everybody, which is the fastest setting of all contenders on matrices this small;
# NPROC is what JAX heeds.
bench: $(VENV)/.installed
	@set -e; export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NPROC=1; \
	for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf build dist docs/_build demo-output seqdgm-output example-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
