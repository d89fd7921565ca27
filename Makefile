# Everything on a bare machine with Python 3.11 or 3.12 and make: `make train`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: train test lint types ci clean

# Two pretended devices use two cores better than two threads of one device do.
train: $(VENV)/installed
	XLA_FLAGS="$$XLA_FLAGS --xla_force_host_platform_device_count=2" \
	JAX_PLATFORMS=cpu $(BIN)/nestedjax train hope_nano --run runs/hope_nano --mesh data=2

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

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

clean:
	rm -rf $(VENV) build *.egg-info
