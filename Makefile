# Everything runs in a virtual environment of its own: make VENV=path PYTHON=python3.12 <target> to choose.
.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow lint format figures clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## Install the locked versions into $(VENV)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is %d.%d, 3.11 or newer is needed: make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

quickstart: install ## Train a RAT model on real English, compare it with n-grams, read what it writes (6 minutes)
	$(BIN)/python cli.py prepare pretrain --output data/docstrings --held_out 0.02
	$(BIN)/python cli.py fit --config configs/quickstart.yaml --ckpt_path last
	$(BIN)/python cli.py report --run runs/quickstart/rat

test: install lint ## Lint, type-check and run the tests
	$(BIN)/python -m pytest -n auto

test-slow: install ## The tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: install ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install ## Let ruff put the code in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

figures: install ## Draw the pictures of the README again
	$(BIN)/python docs/draw_layer.py

clean: ## Remove caches, prepared data and runs
	rm -rf data runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
