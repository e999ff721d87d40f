# make help lists the targets.
#
#   PYTHON  the interpreter that .venv is made from (3.11 or newer)
#   VENV    where the virtual environment lives
#   CARGO   the Rust toolchain's cargo

PYTHON ?= python3
VENV ?= .venv
CARGO ?= cargo

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
STEP := .ci/step

# One interpreter for all of cargo's work: another one would mean building anew.
export PYO3_PYTHON := $(abspath $(BIN)/python)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Directories are named too, so that removing a file is noticed.
WHEEL_SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md LICENSE NOTICE \
	$(shell find rust \( -path '*/src' -o -path '*/src/*' -o -name Cargo.toml \) -print) \
	$(shell find python \( -type d ! -name __pycache__ \) -o -name '*.py' -o -name '*.pyi' -o -name py.typed)


## What a newcomer needs

.PHONY: help
help: ## List the targets
	@echo 'Targets:'
	@awk -F ':.* ## ' '/^[a-z-]+:.* ## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: tools $(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/lint $(STAMPS)/test $(STAMPS)/installed ## Make .venv with all tools (torch included, 5 GB) and the package in it

.PHONY: demo
demo: demo-plan demo-replay ## Plan DeepSeek-R1's experts, replay a trace, serve one while experts move

.PHONY: demo-plan
demo-plan: tools $(STAMPS)/demo $(STAMPS)/installed ## The parts of it that need no torch
	@mkdir -p demo
	@$(STEP) 'plan' $(BIN)/eplb plan examples/data/deepseek_r1_1k1k.json \
		--gpus 32 --nodes 4 --groups 8 --replicas 288 \
		--plot demo/deepseek-r1.html -o demo/plan.json
	@$(STEP) 'what if' $(BIN)/eplb simulate examples/data/esft_v2lite_load_history_w256.json \
		--merge 4 --gpus 8 --replicas 72 --html demo/what-if.html

.PHONY: demo-replay
demo-replay: tools $(STAMPS)/test $(STAMPS)/installed ## The part of it that runs on 8 processes (torch, 5 GB)
	@mkdir -p demo
	@$(STEP) 'replay' $(BIN)/python examples/replay_choices.py --windows 2 --plot demo/replay.svg


## What a change must pass

.PHONY: test
test: lint test-rust docs test-python ## All checks: lints, types, Rust, docs, then Python on the wheel

# The native module is tested from Python: on its own it has no interpreter to link with.
RUST_TESTED := --workspace --exclude eplb-python

.PHONY: test-rust
test-rust: tools $(STAMPS)/venv ## Rust tests, documentation examples and the example program
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(STEP) 'rust tests' $(CARGO) nextest run --locked $(RUST_TESTED); \
		$(STEP) 'rust doctests' $(CARGO) test --locked $(RUST_TESTED) --doc; \
	else \
		$(STEP) 'rust tests' $(CARGO) test --locked $(RUST_TESTED); \
	fi
	@$(STEP) 'rust example' $(CARGO) run --locked --quiet --package eplb --example plan

.PHONY: test-python
test-python: tools $(STAMPS)/test $(STAMPS)/installed ## Python tests, on the built wheel
	@$(STEP) 'python tests' $(BIN)/pytest

.PHONY: test-slow
test-slow: tools $(STAMPS)/test $(STAMPS)/installed ## The long tests: a million random inputs
	@$(STEP) 'slow python tests' $(BIN)/pytest -m slow -o faulthandler_timeout=3600

# Beside .venv, whose torch it shares: the engines pin versions of their own.
ENGINES := $(VENV)-engines
$(ENGINES)/.made: tests/engines/requirements.txt $(STAMPS)/test
	@$(STEP) 'environment of the engines' $(BIN)/python -m venv --clear $(ENGINES)
	@$(STEP) 'engines, without their dependencies' $(ENGINES)/bin/python -m pip install --quiet \
		--no-deps --requirement tests/engines/requirements.txt
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % \
		sysconfig.get_path("purelib"))' > $$(echo $(ENGINES)/lib/python3*/site-packages)/shared.pth
	@touch $@

.PHONY: test-engines
test-engines: tools $(STAMPS)/test $(STAMPS)/installed $(ENGINES)/.made ## The plug-ins in vLLM's and SGLang's own modules (Linux, 400 MB)
	@$(STEP) 'tests in the engines' $(ENGINES)/bin/python -m pytest tests/engines -o addopts=--import-mode=importlib

# The stub on its own: with the package around it, stubtest reads all of torch.
STUBS := $(VENV)/stubs

.PHONY: lint
lint: tools $(STAMPS)/lint $(STAMPS)/test $(STAMPS)/installed ## Formatting, lints and types, as errors
	@$(STEP) 'rustfmt' $(CARGO) fmt --check
	@$(STEP) 'ruff format' $(BIN)/ruff format --check
	@$(STEP) 'ruff check' $(BIN)/ruff check
	@$(STEP) 'clippy' $(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	@$(STEP) 'mypy' $(BIN)/mypy
	@mkdir -p $(STUBS)/eplb_rs && touch $(STUBS)/eplb_rs/__init__.pyi
	@cp python/eplb_rs/_core.pyi $(STUBS)/eplb_rs/
	@$(STEP) 'stubtest' env MYPYPATH=$(STUBS) $(BIN)/stubtest eplb_rs._core
	@$(STEP) 'workflow schema' $(BIN)/check-jsonschema \
		--builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(STEP) 'workflow audit' $(BIN)/zizmor --offline --no-progress --quiet .github

.PHONY: format
format: tools $(STAMPS)/lint ## Format Rust and Python, mend what ruff can
	$(CARGO) fmt
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: docs
docs: tools $(STAMPS)/docs $(STAMPS)/demo $(STAMPS)/installed ## Documentation in docs/_build/html and target/doc
	@$(STEP) 'sphinx' $(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html
	@$(STEP) 'rustdoc' env RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --workspace --no-deps


## What a release needs

.PHONY: bench
bench: tools $(STAMPS)/bench $(STAMPS)/test $(STAMPS)/installed ## Time everything, beside its peers
	@$(STEP) 'planner' $(BIN)/python benches/planner.py
	@$(STEP) 'balanced plans' $(BIN)/python benches/balance
	@$(STEP) 'shares' $(BIN)/python benches/shares.py
	@$(STEP) 'real time' $(BIN)/python benches/realtime.py
	@$(STEP) 'next window' $(BIN)/python benches/next_window.py
	@$(STEP) 'few moves' $(BIN)/python benches/few_moves.py
	@$(STEP) 'schedules' $(BIN)/python benches/schedules.py
	@$(STEP) 'tables of the schedule page' $(BIN)/python benches/schedule_tables.py
	@$(STEP) 'figures in README.md' $(BIN)/python benches/readme_figures.py

.PHONY: bench-gpu
bench-gpu: tools $(STAMPS)/bench $(STAMPS)/test $(STAMPS)/installed ## Time an expert-parallel layer and its moves; needs a GPU, its second part two
	@$(STEP) 'experts on one GPU' $(BIN)/python benches/moe_one_gpu.py
	@$(STEP) 'experts on two GPUs' $(BIN)/python benches/moe_layer.py

.PHONY: wheel
wheel: tools dist/.built ## Build the release wheel in dist/

.PHONY: clean
clean: ## Remove what the targets wrote, but for .venv
	rm -rf demo dist docs/_build target .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find python tests benches -name __pycache__ -type d -prune -exec rm -rf {} +


## Files

.PHONY: tools
tools:
	@.ci/tools '$(PYTHON)' '$(CARGO)'

$(STAMPS)/venv:
	@$(STEP) 'virtual environment' $(PYTHON) -m venv --clear $(VENV)
	@$(STEP) 'pip' $(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	@mkdir -p $(STAMPS)
	@touch $@

# The dependency groups of pyproject.toml.
GROUPS := bench build demo docs lint test
$(GROUPS:%=$(STAMPS)/%): $(STAMPS)/%: pyproject.toml $(STAMPS)/venv
	@$(STEP) 'tools for: $*' $(BIN)/pip install --quiet --group $*
	@touch $@

dist/.built: $(WHEEL_SOURCES) $(STAMPS)/build
	@mkdir -p dist
	@rm -f dist/eplb_rs-*.whl
	@$(STEP) 'wheel' $(BIN)/maturin build --release --locked --out dist --interpreter $(BIN)/python
	@touch $@

$(STAMPS)/installed: dist/.built
	@$(STEP) 'install the wheel' $(BIN)/pip install --quiet --no-deps --force-reinstall dist/eplb_rs-*.whl
	@touch $@
