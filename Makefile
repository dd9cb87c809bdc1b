# make install | demo | test | lint     The environment is made on first use and again when what it is made from changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint postgresql

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
