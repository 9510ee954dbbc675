# The two commands of the README are `make demo` and `make test`; both set up all they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*/*) setup.py pyproject.toml constraints.txt
export OMP_NUM_THREADS ?= 1

.PHONY: setup test demo lint nightly clean

setup: $(VENV)/.ready

# torch first and alone: its CPU build needs no CUDA packages, and the C++ build needs its headers.
$(VENV)/.ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel numpy
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt $(TORCH_INDEX) torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

test: setup lint
	$(BIN)/python -m pytest -m "not nightly and not gpu" --durations=15

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: setup
	$(BIN)/python examples/demo.py

# LANE: spine | data
nightly: setup
	$(BIN)/python -m pytest -m nightly $(if $(LANE),tests/nightly_lanes/$(LANE),)

clean:
	rm -rf build *.egg-info megapre/*.so demo_run
