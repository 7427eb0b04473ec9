# Everything runs in .venv, which `setup` makes. Python 3.11 or 3.12 with pip, and
# a C compiler for what the runtime compiles on the way; no root, no GPU.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup test test-long unit lint format docs demo

# The newest stock release; the lab keeps the older ones outside the repository.
RELEASE := 0.5.23
DEMO_RELEASE := 0.5.12
BIN := .venv/bin

help: ## this text
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## make .venv: stock SGLang, Mooncake, this package, test tools
	@tools/setup.sh $(RELEASE)

test: setup ## lint, unit, contract (all stock wheels) and end-to-end tests
	@$(BIN)/python tools/run_tests.py

test-long: setup ## real servers for minutes more; before a release
	@$(BIN)/python tools/run_tests.py long

unit: setup ## the fast tests only, side by side: no wheels, no servers
	@$(BIN)/python -m pytest tests/unit -n auto --dist=worksteal -q

lint: setup ## ruff and mypy only
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup ## lay the code out as `make lint` wants it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup ## renew the generated tables and pictures of the documents
	@$(BIN)/python -m tests.model.diagram
	@$(BIN)/python -m tools.reference

demo: setup ## corrupt a stock server's KV, then show the fix preventing it
	@$(BIN)/sglang-scaling-fixes lab install $(DEMO_RELEASE)
	@$(BIN)/sglang-scaling-fixes lab reclaim --release $(DEMO_RELEASE) --scenario abort --output demo.json
