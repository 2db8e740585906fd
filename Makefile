# Each of `make demo`, `make test` and `make check` needs only Python 3.11 or later: the first
# one called makes .venv, with the versions of constraints.txt.
# For a GPU: `make venv`, then install the torch build for your CUDA version into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: venv demo test lint check format clean

demo: $(INSTALLED)
	$(BIN)/fulltune demo

# Two processes of one thread each: two threads each would wait for one another at every product.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/mypy

# The one check: locally, before a push (.pre-commit-config.yaml) and in CI (.ci/run).
check: lint test

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fulltune needs Python 3.11 or later; say which by PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
