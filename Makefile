# Two commands for a fresh machine with Python 3.11, pip and gcc: `make demo` and `make test`.
# Recipes quote every path: the project may live in a folder with spaces.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3.11
BIN := .venv/bin
RUN := runs/demo
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test lint clean

help:
	@echo "make demo   set up, prepare data, train three stages on four CPU ranks, generate, report"
	@echo "make test   set up, lint, type check, all tests"
	@echo "make clean  forget the demo's data and runs, and the virtual environment"

setup: .venv/ready

# Installed anew whenever the dependencies change.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	"$(BIN)/python" -m pip install --quiet --progress-bar on -e ".[cpu,dev]"
	touch .venv/ready

demo: setup
	"$(BIN)/python" -m ouro_megatron.cli.demo

lint: setup
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m mypy

test: lint
	"$(BIN)/python" -m pytest

clean:
	rm -rf .venv runs/demo data/demo .pytest_cache .mypy_cache .ruff_cache
