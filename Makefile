# `make demo` and `make test` are all that a fresh machine needs; it has Python 3.11+, a C++ compiler and make.
# Everything else goes into .venv, in the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
KERNELS := setup.py $(wildcard mrcnn/ops/csrc/*.* mrcnn/ops/csrc/*/*.*)

.PHONY: demo test drills check setup clean

demo: setup
	$(VENV)/bin/mrcnn demo

# one thread each: processes that share cores wait for each other's threads else
test: check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m 'not drill' -n logical --maxprocesses 4 --durations 25

# one after another: each has a cluster of its own
drills: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m drill --durations 25

check: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

setup: $(VENV)/.ready

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	@echo "==> making $(VENV) and installing torch into it (large: some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) pip setuptools wheel ninja torch torchvision
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml $(KERNELS)
	@echo "==> installing the other packages and compiling the operators (a minute or two)"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@$(VENV)/bin/python -c 'from mrcnn.ops import cuda_compiled as cuda; \
		print("==> ready: operators for", "CPU and CUDA" if cuda() else "the CPU only (no nvcc that fits torch was found)")'
	@touch $@

clean:
	rm -rf $(VENV) build demo-run *.egg-info mrcnn/ops/*.so
