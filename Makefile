# Two commands for a fresh machine with Python 3.11, pip and gcc: `make demo` and `make test`.
# Recipes quote every path: the project may live in a folder with spaces.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
RUN := runs/demo
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo demo-samples test slurm-for-tests lint clean

help:
	@echo "make demo   set up, prepare data, train four stages on four CPU ranks, generate, report"
	@echo "make test   set up, lint, type check, all tests"
	@echo "make clean  forget the demo's data and runs, and the virtual environment"

setup: .venv/ready

# Installed anew whenever the dependencies or the C extensions change.
.venv/ready: pyproject.toml $(wildcard data_prep/*.c)
	$(PYTHON) -m venv .venv
	"$(BIN)/python" -m pip install --quiet --progress-bar on -e ".[cpu,dev,all]"
	touch .venv/ready

# Each step looks at what is there and does only what is missing: run it again after an interruption.
demo: setup
	"$(BIN)/ouro" data prepare stages/demo/data.yaml
	"$(BIN)/ouro" train stages/demo/1-stable.yaml
	test -f $(RUN)/upcycled/complete.json || \
	  "$(BIN)/ouro" upcycle $(RUN)/1-stable --layers 4 --map interleave --residual-scale 0.5 --optimizer \
	    --out $(RUN)/upcycled
	"$(BIN)/ouro" train stages/demo/2-upcycled.yaml
	"$(BIN)/ouro" train stages/demo/3-anneal.yaml
	"$(BIN)/ouro" train stages/demo/4-gate.yaml
	test -f $(RUN)/4-gate/samples.json || $(MAKE) --no-print-directory demo-samples
	"$(BIN)/ouro" report $(RUN)
	@echo
	@echo "Done. Next:"
	@echo "  open $(RUN)/report/index.html in a browser: loss by loop, exit distribution, generated text"
	@echo "  $(BIN)/ouro generate $(RUN)/4-gate --prompt 'def ' --exit q=0.7 --max-loops 8 --temperature 0.8 --depths"
	@echo "  $(BIN)/ouro eval $(RUN)/4-gate"
	@echo "  $(BIN)/ouro train stages/demo/1-stable.yaml name=mine optimizer.lr=3e-3    (docs/recipes.md)"

demo-samples:
	"$(BIN)/ouro" eval $(RUN)/4-gate
	"$(BIN)/ouro" generate $(RUN)/4-gate --prompt "The function returns" --exit q=0.5 --temperature 0.7 --depths \
	  --save $(RUN)/4-gate/samples.part.json
	"$(BIN)/ouro" generate $(RUN)/4-gate --prompt "def __init__(self" --exit step=2 --temperature 0.7 --depths \
	  --save $(RUN)/4-gate/samples.part.json
	"$(BIN)/ouro" generate $(RUN)/4-gate --prompt "import " --exit q=0.5 --max-loops 6 --skipped copy --temperature 0.7 \
	  --depths --save $(RUN)/4-gate/samples.part.json
	mv $(RUN)/4-gate/samples.part.json $(RUN)/4-gate/samples.json

lint: setup
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m mypy

# Tests on a real Slurm start one of their own; they are skipped, with the reason, where it cannot be installed.
slurm-for-tests:
	tests/slurm/install.sh

test: lint slurm-for-tests
	CUDA_VISIBLE_DEVICES= "$(BIN)/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf .venv runs/demo data/demo .pytest_cache .mypy_cache .ruff_cache
