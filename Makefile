# Everything sets itself up: `make demo` on a machine that has Python and this checkout needs nothing before it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := jasper_store tests $(wildcard tools)

# pytest-xdist's workers; 0 runs everything in one process. PYTEST_ARGS adds whatever you want to pass on.
WORKERS ?= 2
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo fuzz test test-slow test-min test-integrations test-pythons test-asan test-ubsan test-tsan check-compilers coverage lint format types layers prose check bench docs screenshot wheel wheels clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt hatch_build.py hatch_readme.py $(wildcard jasper_store/native/*.[ch])
	@echo "Setting up $(VENV) (once; about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

install: $(STAMP) ## set up .venv with everything that development needs

demo: $(STAMP) ## the main job on real embeddings: convert, plan, train, compare (under two minutes)
	@$(BIN)/jasper-store demo

test: $(STAMP) ## every test but the slow ones
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) $(PYTEST_ARGS)

test-slow: $(STAMP) ## every test
	@$(BIN)/python -m pytest --slow $(PYTEST_ARGS)

# The lowest bounds of pyproject.toml in an environment of their own. TORCH stays at the pin of constraints.txt unless it is
# given, because that one is a CPU build: PyPI's builds of other releases bring gigabytes of CUDA.
MIN_VENV ?= .venv-min
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

# What was found before is taken up again; TARGETS names some parsers. Without atheris, inputs are changed at random only.
MINUTES ?= 10
FUZZ ?= build/fuzz

fuzz: $(STAMP) ## fuzz all parsers for MINUTES=10 of processor time, guided by coverage, and print the counts of all runs so far
	@$(PIP) atheris || echo "no atheris for this Python: inputs are changed at random only"
	@$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(FUZZ) $(TARGETS)

test-min: ## the tests with the oldest allowed dependencies (torch at its pin, or TORCH=x.y.z; any PYTHON=)
	@mkdir -p build
	@$(PYTHON) tools/minimum.py --torch $(TORCH) > build/minimum.txt
	@test -x $(MIN_VENV)/bin/python || $(PYTHON) -m venv $(MIN_VENV)
	@$(MIN_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint build/minimum.txt --editable '.[test]'
	@$(MIN_VENV)/bin/python -m pytest --numprocesses $(WORKERS) $(PYTEST_ARGS)

test-integrations: $(STAMP) ## whole training programs under torchrun, Lightning, Accelerate and Ray
	@$(PIP) --no-build-isolation --editable '.[dev,integrations]'
	@$(BIN)/python -m pytest --slow tests/integrations $(PYTEST_ARGS)

# ARGS passes tests and arguments of pytest: make test-asan ARGS="tests/native -x".
ARGS ?=

test-asan: $(STAMP) ## the compiled library under AddressSanitizer: its harness, and tests in Python
	@$(BIN)/python -m tools.sanitizers address -- $(ARGS)

test-ubsan: $(STAMP) ## the same under UndefinedBehaviorSanitizer
	@$(BIN)/python -m tools.sanitizers undefined -- $(ARGS)

test-tsan: $(STAMP) ## the same under ThreadSanitizer
	@$(BIN)/python -m tools.sanitizers thread -- $(ARGS)

check-compilers: $(STAMP) ## the C by gcc, clang, musl and for aarch64, without a warning; its harness, by qemu if need be
	@$(BIN)/python -m tools.compilers

# PYTHONS="--python 3.12 --with oldest" chooses; see tools/pythons.py.
PYTHONS ?=

test-pythons: $(STAMP) ## the tests on every supported Python found here, with the newest and the oldest dependencies
	@$(BIN)/python -m tools.pythons --torch $(TORCH) $(PYTHONS) -- --numprocesses $(WORKERS) $(PYTEST_ARGS)

coverage: $(STAMP) ## branch coverage of the tests; fails below the floor in pyproject.toml
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --cov --cov-report=term --cov-report=html:build/coverage $(PYTEST_ARGS)

lint: $(STAMP) ## ruff: rules and formatting
	@$(BIN)/ruff check $(SOURCES) hatch_build.py hatch_readme.py
	@$(BIN)/ruff format --check $(SOURCES) hatch_build.py hatch_readme.py

format: $(STAMP) ## let ruff format, and fix what it can
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

types: $(STAMP) ## mypy, strict
	@$(BIN)/mypy $(SOURCES)

layers: $(STAMP) ## imports run downwards only (import-linter)
	@$(BIN)/lint-imports

prose: $(STAMP) ## phrases that the documents and docstrings do not use (tools/prose.txt)
	@$(BIN)/python -m tools.prose

check: lint types layers prose ## lint, types, layers and prose

bench: $(STAMP) ## measure on this machine: JSON first, plots after
	@$(PIP) --no-build-isolation --editable '.[bench]'
	@$(BIN)/python -m tools.bench

docs: $(STAMP) ## build the documentation site into site/
	@$(PIP) --no-build-isolation --editable '.[docs]'
	@$(BIN)/mkdocs build --strict

screenshot: $(STAMP) ## the picture of a report in docs/, made anew from DATA=a dataset directory (needs chromium)
	@test -n "$(DATA)" || { echo "pass a dataset: make screenshot DATA=path/to/a/dataset"; exit 2; }
	@$(PIP) --no-build-isolation --editable '.[docs]'
	@$(BIN)/python tools/screenshot.py $(DATA)

wheel: $(STAMP) ## build the wheel into dist/
	@rm -rf dist
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

wheels: $(STAMP) ## build the wheels of x86-64 and aarch64, glibc and musl, into dist/, and check them
	@rm -rf dist
	@$(PIP) ziglang auditwheel twine check-wheel-contents
	@$(BIN)/python tools/wheels.py
	@$(BIN)/check-wheel-contents dist/*.whl
	@$(BIN)/twine check --strict dist/*.whl
	@for wheel in dist/*manylinux*.whl; do $(BIN)/auditwheel show $$wheel; done

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) $(MIN_VENV) dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
