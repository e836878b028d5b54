# Everything a reader needs, on a fresh clone with only python3, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

unexport PYTHONDONTWRITEBYTECODE  # tests start a thousand processes: with it, each would compile all that it imports

.PHONY: help setup demo test unit integration simulation lab matrix lint format bench docs proto clean

help:            ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY)  ## make the virtual environment
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs,embedded]'
	touch $(READY)

demo: $(READY)   ## fail-overs of all styles on an embedded etcd, as they happen
	$(BIN)/etcdreplica demo

test: lint       ## lint, types and all tests this machine allows
	LAB=short $(BIN)/pytest --numprocesses 8 --dist loadfile --no-loadscope-reorder --ignore tests/lab/test_series.py
	LAB=short $(BIN)/pytest tests/lab/test_series.py  # by itself: it counts ends that no fault explains, and a busy machine is none

unit: $(READY)   ## only the tests that need no etcd
	$(BIN)/pytest tests/unit

integration: $(READY)  ## only the tests with a real etcd and real processes
	$(BIN)/pytest tests/integration

simulation: $(READY)  ## the control plane on simulated hosts: SEEDS=1000 FIRST_SEED=1
	$(BIN)/python -m tests.simulation --seeds $(or $(SEEDS),1000) --first-seed $(or $(FIRST_SEED),1)

lab: $(READY)    ## random faults on hosts in network namespaces (LAB_MINUTES=60 for long, LAB_SEED= to repeat); needs root
	$(BIN)/pytest tests/lab

matrix:          ## the unit tests with each Python from 3.11 to 3.14 that is on PATH (VERSIONS="3.12 3.13" for only these)
	@passed=; failed=; missing=; \
	for version in $(or $(VERSIONS),3.11 3.12 3.13 3.14); do \
		if ! python$$version -c '' 2>/dev/null; then missing="$$missing $$version"; continue; fi; \
		venv=build/matrix/$$version; \
		python$$version -m venv $$venv && $$venv/bin/python -m pip install -q --disable-pip-version-check -e '.[dev,docs,embedded]' \
			&& $$venv/bin/pytest -q tests/unit && passed="$$passed $$version" || failed="$$failed $$version"; \
	done; \
	echo "on $$(uname -m): passed:$${passed:- none}; failed:$${failed:- none}; not on this machine:$${missing:- none}"; \
	test -z "$$failed" -a -n "$$passed"

lint: $(READY)   ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/generate.py --check

format: $(READY) ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## measure fail-over, detection, checkpoints and scale on this machine
	$(BIN)/etcdreplica bench failover --style warm
	$(BIN)/etcdreplica bench failover --style hot
	$(BIN)/etcdreplica bench failover --style cold
	$(BIN)/etcdreplica bench failover --fault host --trials 10
	$(BIN)/etcdreplica bench failover --fault host --failover fast --trials 10
	$(BIN)/etcdreplica bench detection
	$(BIN)/etcdreplica bench checkpoint
	$(BIN)/etcdreplica bench scale

docs: $(READY)   ## write the generated pages of docs/ anew, and build the site in build/docs/site; a broken link fails
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/build.py

proto: $(READY)  ## write the gRPC code anew from its .proto
	$(BIN)/python tests/generate_proto.py

clean:           ## remove what was made here
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
