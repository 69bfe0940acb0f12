# Everything runs in .venv, installed from requirements.lock. A bare `make` lists the targets.
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO_HOME := runs/demo
REPETITIONS ?= 500
DESIGNS ?=

.PHONY: help install demo check test bench soak calibrate reproduce notebooks wheel-check lock clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: .venv/installed  ## Install the exact versions of requirements.lock into .venv (TORCH_INDEX=URL selects torch's build)

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "slm needs Python 3.11 to 3.13: make PYTHON=python3.12 install" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	grep -v '^torch==' requirements.lock > .venv/hashed.txt
	$(PIP) install --no-compile --require-hashes --no-deps --only-binary :all: -r .venv/hashed.txt
	$(PIP) install --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep -o '^torch==[0-9.]*' requirements.lock)"
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

demo: install  ## Train the five depths of the demo, fit them, draw the curve (minutes on two cores)
	SLM_HOME=$(DEMO_HOME) $(BIN)/slm sweep experiments/miniseries.py
	SLM_HOME=$(DEMO_HOME) $(BIN)/slm fit-curves miniseries

check: install  ## Check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install  ## Run the tests on every core (SLM_REFERENCE=FOLDER adds those against published figures)
	$(BIN)/python -m pytest -m "not soak" --numprocesses auto --dist loadfile --no-loadscope-reorder

bench: install  ## Time the parts, each beside its peer or its ceiling
	$(BIN)/python -m tests.bench

calibrate: install  ## Measure intervals, warnings and claims on known truths (REPETITIONS=500: an hour on two cores)
	$(BIN)/python -m tests.calibrate --repetitions $(REPETITIONS) $(if $(DESIGNS),--designs $(DESIGNS))

reproduce: install  ## Print published fits beside ours (needs SLM_REFERENCE=FOLDER)
	$(BIN)/python -m tests.reproduce

soak: install  ## Run the long tests
	$(BIN)/python -m pytest -m soak

notebooks: install  ## Run the notebooks against a store made by real sweeps
	$(BIN)/python notebooks/execute.py

wheel-check: install  ## Build a wheel, install it elsewhere, and run it outside the checkout
	bash tests/wheel_check.sh $(BIN)/python

lock:  ## Update requirements.lock (needs uv); torch has no hashes, since its builds bring their own CUDA
	cp requirements.lock requirements.lock.new
	uv pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-annotate --no-emit-index-url --output-file requirements.lock.new
	awk -f tests/lock.awk requirements.lock.new > requirements.lock
	rm requirements.lock.new

clean:  ## Remove .venv and caches; runs stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache dist
