# Everything on a bare machine with Python 3.11 or 3.12 and make: `make train`, `make test`.
PYTHON ?= python3
VENV ?= .venv
TPU_VENV ?= .venv-tpu
GPU_VENV ?= .venv-gpu
BIN = $(VENV)/bin

.PHONY: train test tpu-compile gpu-compile gpu-test lint types ci clean

# Two pretended devices use two cores better than two threads of one device do.
train: $(VENV)/installed
	XLA_FLAGS="$$XLA_FLAGS --xla_force_host_platform_device_count=2" \
	JAX_PLATFORMS=cpu $(BIN)/nestedjax train hope_nano --run runs/hope_nano --mesh data=2 --use

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Every TPU kernel, compiled ahead of time for every TPU; no TPU is needed.
tpu-compile: $(TPU_VENV)/installed
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m pytest -m tpu_compile tests/kernels

# Every GPU kernel, compiled ahead of time for Hopper; no GPU is needed.
gpu-compile: $(GPU_VENV)/installed
	JAX_PLATFORMS=cpu $(GPU_VENV)/bin/python -m pytest -m gpu_compile tests/kernels

# What needs a GPU.
gpu-test: $(GPU_VENV)/installed
	JAX_PLATFORMS=cuda,cpu $(GPU_VENV)/bin/python -m pytest -m gpu tests

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

ci: lint types test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $(VENV)/installed $@

$(TPU_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[dev,tpu]'
	touch $@

$(GPU_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[dev,cuda]'
	touch $@

clean:
	rm -rf $(VENV) $(TPU_VENV) $(GPU_VENV) build *.egg-info
