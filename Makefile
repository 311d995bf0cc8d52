# make demo    a fresh environment, the build, a training run of minutes, and its report
# make test    the same set-up, then the tests in their four lanes
#
# make gpu     on a machine with a GPU, in place and without a network: build, tests, sanitizers, benchmarks
#
# PYTHON=python3.12 and TORCH=2.11.0 choose versions; a GPU is used if torch finds one.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# One thread each: two that share a busy core can be twenty times slower than one.
PYTEST := PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m pytest -q
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)

.PHONY: demo test test-native test-triton test-cuda-on-cpu test-no-libraries test-full bench gpu lint types cuda clean

demo: $(VENV)/installed
	$(BIN)/python -m ctm_fast.train --compile
	@echo "The report: $$(ls -td runs/*/report.md | head -n 1)"

test: test-native test-triton test-cuda-on-cpu test-no-libraries

# The C++ kernels.
test-native: $(VENV)/installed-dev
	$(PYTEST)

# Triton's kernels, interpreted on the CPU, a program at a time: the ops, and the networks in float32, whose products it
# computes rightly.
test-triton: $(VENV)/installed-dev
	TRITON_INTERPRET=1 $(PYTEST) tests/ops
	TRITON_INTERPRET=1 $(PYTEST) tests/models/test_golden_networks.py -k "test_student[ or input_gradient"

# The CUDA kernels, compiled for the CPU as they are: a thread at a time, so without what only compiles the ops again.
test-cuda-on-cpu: $(VENV)/installed-dev
	CUDA_ON_CPU=1 $(PYTEST) tests/ops -k "cuda-on-cpu and not compile"

# What a machine without a compiler runs: the libraries stay closed.
test-no-libraries: $(VENV)/installed-dev
	CTM_FAST_LIBRARIES=0 $(PYTEST) tests/ops tests/samplers tests/models tests/training tests/serving tests/test_structure.py

# Every lane, with the tests that take minutes: kill at any moment, fuzz, installation in fresh environments.
test-full: $(VENV)/installed-dev
	$(MAKE) test
	$(PYTEST) -m long
	TRITON_INTERPRET=1 $(PYTEST) tests/samplers tests/training/test_ctm_step.py -k "not keeps_the_marginal and not aot_eager"

bench: $(VENV)/installed-dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

# With the torch of PYTHON, in this directory; nothing is installed. Nine minutes at most: run it again for what is left.
# STAGE=build, test, sanitize or bench for one stage, ONLY=text for the files with that in their path.
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(STAGE),--stage $(STAGE)) $(if $(ONLY),--only $(ONLY)) $(if $(BUDGET),--budget $(BUDGET))

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

# The CUDA kernels, compiled with nvcc for A100 and H100/H200, also beside a torch without CUDA.
cuda: $(VENV)/installed-dev
	CTM_FAST_CUDA=1 CTM_FAST_CUDA_ARCHS="80;90a" $(PIP) --no-build-isolation --no-deps -e .

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==$(TORCH) setuptools wheel cmake ninja pybind11
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/torch $(SOURCES)
	$(PIP) --no-build-isolation -e '.[dev,triton]'
	touch $@ $(VENV)/installed

clean:
	rm -rf build $(VENV) ctm_fast/lib ctm_fast/_C*.so *.egg-info
