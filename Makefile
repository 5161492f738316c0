# The two that matter: `make serve` and `make test`. Each sets up what it needs, once, in .venv.
# Needs git, make, gcc and Python >= 3.11. PYTHON=… chooses the interpreter, VENV=… another folder.
PYTHON ?= python3
VENV ?= .venv
BIND ?= tcp://127.0.0.1:8800
ARGS ?=
# Tests wait half of their time: on two cores four at once took three quarters of the time that two did.
JOBS ?= 4

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: serve test soak sanitize lint format types layers docs pictures changelog bench wheel clean help

serve: $(VENV)/.have-run ## serve examples/echo.py on BIND, by default tcp://127.0.0.1:8800
	@exec $(BIN)/harken serve examples/echo.py:Echo --bind $(BIND) $(ARGS)

test: $(VENV)/.have-test ## run the tests (ARGS="-k name" picks some), JOBS at a time
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# What else has a long form than tests/soak: storms against limits, floods, the slow cases of CPython's own suites, and
# every kind of work that a rival takes.
LONG := tests/soak tests/fuzz/test_verbs.py tests/faults/test_limits.py tests/faults/test_floods.py tests/compat tests/benchmarks

soak: $(VENV)/.have-test ## run tests/soak in full: 30,000 messages, 100,000 connections …, and what else has a long form
	HARKEN_SOAK=full $(BIN)/python -m pytest $(LONG) $(ARGS)

sanitize: $(VENV)/.have-test ## the compiled hub's tests under gcc's sanitizers
	tools/sanitize $(BIN)/python $(ARGS)

lint: $(VENV)/.have-lint ## ruff over everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

format: $(VENV)/.have-lint ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.have-lint $(VENV)/.have-test ## mypy --strict over src, and over programs as users write them
	$(BIN)/mypy

layers: $(VENV)/.have-lint ## imports go down only
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/.have-run ## write docs/reference anew from the code
	$(BIN)/python tools/build_docs.py

pictures: $(VENV)/.have-test ## take the pictures in docs anew, in Chromium
	HARKEN_PICTURES=$(CURDIR)/docs/pictures $(BIN)/python -m pytest tests/browser -k 'pictures or traced' $(ARGS)

changelog: $(VENV)/.have-docs ## show what the next release's changelog will say
	$(BIN)/towncrier build --draft

bench: $(VENV)/.have-bench ## measure side by side with other servers (ARGS="--scenario echo-100 --rounds 3")
	$(BIN)/python benchmarks/run.py $(ARGS)

wheel: $(VENV)/.have-run ## build a wheel into dist/
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove everything that was built
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A stamp file for each set of requirements: set-up runs once, and again when pyproject.toml changes.
$(VENV)/.have-run: pyproject.toml | $(BIN)/pip
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.have-%: pyproject.toml | $(BIN)/pip
	$(PIP) install --quiet --editable '.[$*]'
	@touch $@ $(VENV)/.have-run

# Debian ships python3 without ensurepip; its virtualenv serves as well.
$(BIN)/pip:
	@set -eu; \
	for python in '$(PYTHON)' python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "harken needs Python >= 3.11 and '$(PYTHON)' is not: install one, then make PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "setting up $(VENV) with $$("$$found" --version)"; \
	if "$$found" -c 'import ensurepip, venv' 2>/dev/null; then "$$found" -m venv $(VENV); \
	elif "$$found" -m virtualenv --version >/dev/null 2>&1; then "$$found" -m virtualenv --quiet $(VENV); \
	elif command -v virtualenv >/dev/null; then virtualenv --quiet --python "$$found" $(VENV); \
	else echo "$$found cannot make a virtual environment: apt-get install python3-venv, then make again" >&2; exit 1; fi
