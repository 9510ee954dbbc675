# The two commands of the README are `make demo` and `make test`; both set up all they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*/*) setup.py pyproject.toml constraints.txt
export OMP_NUM_THREADS ?= 1

# Arguments of pip for torch alone. Empty: the index that pip is set up for. PyPI's Linux wheels of torch bring several
# GB of CUDA libraries; on a machine without a GPU, where that host can be reached, take the CPU build instead:
#   make setup TORCH_INDEX="--extra-index-url https://download.pytorch.org/whl/cpu"
TORCH_INDEX ?=

.PHONY: setup test demo docs lint nightly bench-env bench faults-full slurm clean

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

# Every command of README.md and docs/.
docs: setup
	$(BIN)/python docs/run_commands.py

# Without LANE: the tests marked nightly. With LANE: all tests of the lane's rooms, nightly or not.
LANES := layouts kernels data faults
layouts := equivalence museum verify parallel models optim training
kernels := kernels random
data := data objectives tokenizers tools
faults := faults resilience checkpoint monitor
ifneq ($(filter-out $(LANES),$(LANE)),)
$(error LANE=$(LANE) is none of: $(LANES))
endif
# What the data lane's tests of MPI and S3 run in (tests/extras.py).
EXTRAS := mpi4py==4.1.2 mpich==5.0.2 "moto[s3]==5.2.5" flask==3.1.3 flask-cors==6.0.5 s3fs==2026.9.0
nightly: setup $(if $(filter faults,$(LANE)),slurm)
	test "$(LANE)" != data || test -d build/megatron || \
		$(BIN)/python -m pip install -q --no-deps --target build/megatron megatron-core==0.16.1
	test "$(LANE)" != data || test -x build/extras/bin/mpiexec || { $(PYTHON) -m venv build/extras && \
		build/extras/bin/python -m pip install -q -c constraints.txt $(EXTRAS); }
	MEGATRON_CORE_PATH=build/megatron $(BIN)/python -m pytest -rs --durations=15 \
		$(if $(LANE),-m "not gpu" $(wildcard $(addprefix tests/,$($(LANE)))),-m nightly)
	test "$(LANE)" != faults || $(BIN)/python -m tests.faults.series

# The stacks that benchmarks/train/run.py compares with, in an environment of their own; torch is the same.
# litgpt's model needs none of the packages whose versions it asks for.
BENCH := build/bench
bench-env: setup
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install -q -c constraints.txt setuptools wheel numpy
	$(BENCH)/bin/python -m pip install -q -c constraints.txt $(TORCH_INDEX) torch
	$(BENCH)/bin/python -m pip install -q -c constraints.txt -c benchmarks/train/constraints.txt --no-build-isolation \
		transformers lightning jsonargparse ninja deepspeed
	$(BENCH)/bin/python -m pip install -q -c benchmarks/train/constraints.txt --no-deps litgpt

# The tables of docs/performance.md, on an otherwise idle machine.
bench: setup
	$(BIN)/python benchmarks/train/run.py --write
	$(BIN)/python benchmarks/train/run.py --dtypes bf16 --ranks 2 --threads 1 --write
	$(BIN)/python benchmarks/train/components.py --write
	$(BIN)/python benchmarks/train/memory.py --write
	$(BIN)/python benchmarks/train/scaling.py --write

# The counts of a release, hours of it, as root; its table goes into docs/operations.md. ROWS=kills,soak runs some.
faults-full: setup
	$(BIN)/python -m tests.faults.series --full $(if $(ROWS),--rows $(ROWS))

# What the faults lane runs its jobs under: Debian's Slurm, used without systemd and only while the tests run.
slurm:
	test -x /usr/sbin/slurmctld -a -x /usr/sbin/slurmd -a -x /usr/bin/sbatch -a -x /usr/sbin/munged || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge; }

clean:
	rm -rf build *.egg-info megapre/*.so demo_run
