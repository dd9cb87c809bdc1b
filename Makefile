# make install | demo | test | test-triton | test-gpu | lint     The environment is made on first use and again when what it is made from changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-triton test-gpu lint postgresql

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# DEMO_ONCE=1 make demo: stop after the tables, and fail where they differ from the offline scores
demo: install
	@$(BIN)/deltamux demo

test: install
	$(BIN)/python -m pytest

# the CUDA kernels without a GPU, under Triton's interpreter; adds triton to the environment (0.7 GB)
test-triton: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda]'
	$(BIN)/python -m pytest tests/contract/test_triton_interpreted.py

# on a machine with a CUDA device: the same kernels against the reference, and CUDA graphs
test-gpu: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda]'
	$(BIN)/python -m pytest -m gpu tests/contract

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests run on PostgreSQL too where it is installed, and say so where it isn't. Never fails, never asks.
postgresql:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  DEBIAN_FRONTEND=noninteractive timeout 240 sh -c \
	    'apt-get -qq update && apt-get -qq install -y --no-install-recommends postgresql' >/dev/null 2>&1; } \
	|| echo "PostgreSQL is not installed here: its tests are skipped"
