# Every target makes its own .venv when there is none, and brings it up to date when what it should hold has changed.
#
#   PIP_ARGS   more arguments for pip, such as the index of the CPU builds of torch on a machine without a GPU
#   PYTHON     the interpreter that .venv is made with; by default the first that works of 3.11 (the tested one), 3.12, ...
#   ARGS       more arguments for the command that the target ends in: make test ARGS="-k protos"

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
PYTHON ?=
ARGS ?=
BUF := @bufbuild/buf@1.75.0
PINS := pyproject.toml constraints.txt
ORACLES := .oracles
MAKERS := tests/parity/make
ASK := PYTHONPATH=tests/parity HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# A process for each core, four at most; a file's tests stay together, since they share servers and backbones.
PYTEST = $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-long lint protos bench oracles clean

help:  ## Say what there is to make
	@echo "make TARGET [PIP_ARGS=...] [PYTHON=...] [ARGS=...]"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | \
		while IFS='|' read -r target text; do printf '  %-10s %s\n' "$$target" "$$text"; done

demo: $(VENV)/.server  ## Start a server on a small built-in model and send one batch, each request with another delta
	$(BIN)/python -m deltaserve demo $(ARGS)

test: $(VENV)/.dev  ## Run the tests, without those that take minutes
	$(PYTEST) -m "not long" $(ARGS)

test-long: $(VENV)/.dev  ## Run the tests that take minutes
	$(PYTEST) -m long $(ARGS)

lint: $(VENV)/.dev  ## Check style, types, imports between rooms, generated code and the wire contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check
	@export npm_config_fetch_retries=0 npm_config_loglevel=error; \
	if command -v buf >/dev/null; then echo "buf lint"; buf lint; \
	elif command -v npx >/dev/null && timeout 120 npx --yes $(BUF) --version >/dev/null 2>&1; then \
		echo "npx $(BUF) lint"; npx --yes $(BUF) lint; \
	else echo "buf lint: skipped, there is no buf here and npx cannot get it"; fi

protos: $(VENV)/.dev  ## Generate the code of protos/ again
	$(BIN)/python protos/generate.py

bench: $(VENV)/.dev  ## Measure what deltas cost per forward (minutes, on a quiet machine); writes bench/results
	$(BIN)/python -m bench micro $(ARGS)

oracles: $(ORACLES)/adapterhub/.made $(ORACLES)/opendelta/.made  ## Ask AdapterHub's library and OpenDelta again for what tests/parity compares with
	$(ASK) $(ORACLES)/adapterhub/bin/python -P -m make.backbones
	$(ASK) $(ORACLES)/adapterhub/bin/python -P -m make.adapterhub $(ARGS)
	$(ASK) $(ORACLES)/opendelta/bin/python -P -m make.opendelta $(ARGS)

clean:  ## Remove .venv and everything else that was made here
	rm -rf $(VENV) $(ORACLES) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
		if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "making $(VENV) with $$("$$python" --version)"; \
			exec "$$python" -m venv --clear $(VENV); \
		fi; \
	done; \
	echo "no Python >= 3.11 with venv among: $(or $(PYTHON),python3.11 python3.12 python3.13 python3); set PYTHON=..." >&2; exit 1

# The libraries that oracles are asked of need other versions of transformers than ours, and wheels of Python 3.11.
$(ORACLES)/%/.made: $(MAKERS)/%.txt
	@echo "installing $* into $(ORACLES)/$* (minutes)"
	$(or $(PYTHON),python3.11) -m venv --clear $(ORACLES)/$*
	$(ORACLES)/$*/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) --requirement $<
	@if test $* = opendelta; then \
		$(ORACLES)/$*/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps opendelta==0.3.2; fi
	@touch $@

# .dev holds all that .server holds, so that `make demo` after `make test` has nothing to install.
$(VENV)/.server: $(PINS) | $(BIN)/python
	@echo "installing the server into $(VENV) (torch is large: this takes minutes the first time)"
	$(INSTALL) --editable ".[server]"
	@touch $@

$(VENV)/.dev: $(PINS) | $(BIN)/python
	@echo "installing the server and the development tools into $(VENV) (torch is large: this takes minutes the first time)"
	$(INSTALL) --editable ".[dev]"
	@touch $(VENV)/.server $@
