# Everything a person does daily. Needs make and a Python of 3.11 or newer; the rest comes into .venv.
# `make PYTHON=/path/to/python3.12 setup` chooses another Python; `make test ARGS="-k offsets"` passes arguments on.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
ARGS ?=

# `make chaos`: for how long faults are drawn at random, and over how many jobs.
CHAOS_SECONDS ?= 600
CHAOS_JOBS ?= 40000

# The tests start some thousand Python processes. Without bytecode files each of them would compile the whole package
# again, which takes about a third of its CPU time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo dev test test-all lint format bench bench-peers chaos pictures docs clean
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## everything into .venv (done by the others when it is needed)

$(STAMP): pyproject.toml .ci/install.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else 1)' 2>/dev/null || { \
		echo "Jobledger needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not there')."; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; } >&2
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "$(PYTHON) cannot make virtual environments (on Debian and Ubuntu: the package python3-venv)."; \
		exit 1; } >&2
	@$(PY) .ci/install.py
	@touch $@

demo: $(STAMP) ## import 28,298 real rows in the background, on real Kafka
	@$(PY) -m examples.airports $(ARGS)

dev: $(STAMP) ## broker, worker and stream processor of the demo app, reloading on change
	@$(PY) -m jobledger dev $(or $(APP),examples.airports.app:app) $(ARGS)

# pytest last: its closing line is the last thing to be read. Tests mostly wait for what other processes do, so two CPUs
# can run six files at once, and two of the long ones; the order of their files is made in tests/conftest.py. Each test is in one of the two tiers.
PYTEST := $(PY) -m pytest --dist loadfile --no-loadscope-reorder

test: lint ## lint, types and the tests, on real Kafka: each promise in its short form, about ten minutes
	@$(PYTEST) --numprocesses 6 -m "not extended" $(ARGS)

test-all: $(STAMP) ## all the other tests: long faults, three brokers, compose, upgrades, demo, browser, documents; half an hour
	@$(PYTEST) --numprocesses 2 -m extended $(ARGS)

lint: $(STAMP) ## formatting, lint, types, layers
	@$(PY) -m ruff format --check --quiet . || { echo "run: make format" >&2; exit 1; }
	@$(PY) -m ruff check --quiet .
	@$(PY) -m mypy --no-error-summary
	@$(VENV)/bin/lint-imports --no-logo >$(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log >&2; exit 1; }
	@echo "lint: formatting, rules, types and layers hold"

format: $(STAMP) ## write the formatting that lint asks for
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format --quiet .

bench: $(STAMP) ## figures beside a bare librdkafka loop of the same run
	@$(PY) -m bench $(ARGS)

bench-peers: $(STAMP) ## Celery, Dramatiq, Taskiq, BullMQ and ours in turn; installs them under .bench-peers/
	@$(PY) -m bench.peers $(ARGS)

chaos: $(STAMP) ## the acceptance tests of both tiers and ten minutes of random faults: CHAOS_SECONDS, CHAOS_JOBS, CHAOS_SEED
	@CHAOS_SECONDS=$(CHAOS_SECONDS) CHAOS_JOBS=$(CHAOS_JOBS) FAULT_KILLS=4 FAULT_LONG_S=120 $(PY) -m pytest tests/acceptance --timeout=0 $(ARGS)

pictures: $(STAMP) ## the pictures of docs/dashboard.md, in Chromium
	@mkdir -p docs/pictures
	@JOBLEDGER_PICTURES=docs/pictures $(PY) -m pytest tests/integration/test_pages.py -k pictures $(ARGS)

docs: $(STAMP) ## draw the states of a job, and build the pages as a site in build/docs
	@$(PY) docs/draw.py docs
	@$(PY) -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

clean: ## remove what is made here, .venv included
	@rm -rf $(VENV) build dist .demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage* bench/results .bench-peers
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
