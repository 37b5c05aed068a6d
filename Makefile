# Everything runs in .venv, which the first target that needs it makes from setup.cfg; later ones find it ready.
# PYTHON is the interpreter .venv is made with; to change it, remove .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Bytecode is compiled when a module is first imported: most of what is installed never is.
PIP_INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
IS_SUPPORTED := -c 'import sys; sys.exit(sys.version_info < (3, 11))'

# One target after another even under `make -j`: two of them share .venv, and each already uses every core.
.NOTPARALLEL:
.DEFAULT_GOAL := help
# The studies in the order in which they run: some read the records of earlier ones.
STUDIES := delay horizon collapse cycles long_runs variables warnings prediction second_prediction
# The systems that `make parity` compares with need torch and a few GB: they have an environment of their own.
PARITY_VENV := .venv-parity
PARITY_RUN := $(PARITY_VENV)/bin/python
# A pinned torch, so that pip takes the CPU build (local version +cpu) where an index offers one.
TORCH ?= torch==2.13.0

.PHONY: help venv demo test lint bench studies parity

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.installed ## make .venv and install everything the demo and the tests need

demo: $(VENV)/.installed ## measure the staleness bias with the default config, into runs/measure_bias
	$(RUN) -m launch.measure_bias --config=configs/measure_bias.py --workdir=runs/measure_bias

test: $(VENV)/.installed ## run all tests
	$(RUN) -m pytest -n 2 --dist worksteal -q --durations=10

lint: $(VENV)/.installed-dev ## check style and format with ruff
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.installed ## run every benchmark in turn
	@set -e; for name in $(basename $(notdir $(wildcard benchmarks/*.py))); do \
	  echo "benchmarks/$$name.py"; $(RUN) -m benchmarks.$$name; done

studies: $(VENV)/.installed ## run what is missing of every study and write the pages in docs/laws from the records
	@set -e; for name in $(STUDIES); do \
	  echo "configs/study_$$name.py"; \
	  $(RUN) -m launch.study --config=configs/study_$$name.py --workdir=docs/laws/records/$$name --page=docs/laws/$$name.md; done

parity: $(PARITY_VENV)/.installed ## compare our losses with TRL's and tunix's own code, and train in tunix's learner with one
	$(PARITY_RUN) -m parity.compare
	$(PARITY_RUN) -m examples.tunix_learner

# A stamp is removed first and written last, so an interrupted install is taken up again: pip keeps what is whole and installs
# the rest. A .venv without a working pip, or of an old Python, is made anew.
$(VENV)/.installed: setup.cfg pyproject.toml
	@rm -f $@
	@if ! { $(RUN) $(IS_SUPPORTED) && $(RUN) -m pip --version; } >/dev/null 2>&1; then \
	  $(PYTHON) $(IS_SUPPORTED) 2>/dev/null || { \
	    echo "jax_async_grpo needs Python 3.11 or newer, PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
	      "Name another one: make venv PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); fi
	@echo "Installing into $(VENV): a minute or two, once."
	$(PIP_INSTALL) -e '.[tasks,test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@rm -f $@
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(PARITY_VENV)/.installed: setup.cfg pyproject.toml
	@rm -f $@
	@if ! { $(PARITY_RUN) $(IS_SUPPORTED) && $(PARITY_RUN) -m pip --version; } >/dev/null 2>&1; then \
	  $(PYTHON) -m venv --clear $(PARITY_VENV); fi
	@echo "Installing torch, TRL and tunix into $(PARITY_VENV): some minutes, once."
	$(PARITY_RUN) -m pip install --quiet --disable-pip-version-check --no-compile '$(TORCH)' -e '.[parity]'
	@touch $@
