# Everything runs in .venv, which is made from the locked packages at the first target that needs it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# migration
# The benchmarks' peers: packages that this project does not depend on, and could not have beside its own.
PEERS := .venv-bench
PEERS_INSTALLED := $(PEERS)/installed
# end of migration

.DEFAULT_GOAL := help
.PHONY: help setup test lint serve lock clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(INSTALLED) ## make .venv with the locked packages

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(INSTALLED)

# migration
.PHONY: rehearse load seeds remove-check
rehearse: $(INSTALLED) ## rehearse the whole migration on a made installation (LEGACY=DIR: on a copy of yours)
	$(BIN)/rollout rehearse $(if $(LEGACY),--legacy $(LEGACY))

load: export LOAD_SECONDS ?= 120
load: $(INSTALLED) ## two minutes of load across a ramp, a restart and a rollback (LOAD_SECONDS, LOAD_SEED)
	$(BIN)/python -m pytest tests/acceptance/test_load.py $(ARGS)

seeds: $(INSTALLED) ## put known bugs into copies of the code, one by one; the state machine must find each
	$(BIN)/python -m tests.integration.state_machine.seeds $(ARGS)

remove-check: $(INSTALLED) ## take FAISS out of a copy, and lint and test what is left without its packages
	$(BIN)/rollout remove-faiss --check
# end of migration

test: $(INSTALLED) ## run every test
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED) ## ruff and mypy, strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

serve: $(INSTALLED) ## the backend on an embedded PostgreSQL, with a demonstration user
	$(BIN)/python -m src.demo

# migration
.PHONY: bench bench-quick bench-growth
$(PEERS_INSTALLED): benchmarks/requirements.lock
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --require-hashes --requirement benchmarks/requirements.lock
	touch $(PEERS_INSTALLED)

bench: $(INSTALLED) $(PEERS_INSTALLED) ## measure beside raw limits and peers, 100,000 chunks, 12 minutes; writes the tables
	$(BIN)/python -m benchmarks --write-docs

bench-quick: $(INSTALLED) $(PEERS_INSTALLED) ## the same with 10,000 chunks, without a verdict
	$(BIN)/python -m benchmarks --quick

bench-growth: $(INSTALLED) $(PEERS_INSTALLED) ## how cost grows with the number of chunks; writes table and plot
	$(BIN)/python -m benchmarks growth --write-docs
# end of migration

lock: ## write what is locked anew from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --all-extras --python-version 3.11 \
	    --generate-hashes --no-header --no-emit-index-url --output-file requirements.lock
# migration
	uv pip compile --group bench --python-version 3.11 \
	    --generate-hashes --no-header --no-emit-index-url --output-file benchmarks/requirements.lock
# end of migration

clean: ## remove .venv and what tools left
	rm -rf $(VENV) .venv-bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
