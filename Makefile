# Everything runs in a virtual environment of its own: make VENV=path PYTHON=python3.12 <target> to choose.
.DEFAULT_GOAL := help
.PHONY: help install quickstart tensorboard test test-slow gpu-check lint format figures notebooks clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Of `make tensorboard`.
PORT ?= 6006
RUNS ?= runs
INSTALLED := $(VENV)/.installed

# Lines that a command says one by one are one output; an execution tells no times, which would be new ones every time.
NBCONVERT := --NotebookExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor --ExecutePreprocessor.record_timing=False

# The layer of the paper's models.
GPU_LAYER := --dtype bfloat16 --d_model 2048 --mixers '[attention, rat, sliding_window, rnn]'

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

tensorboard: install ## Look at the runs in a browser, at the address that it prints (PORT=6006 RUNS=runs)
	@test -d $(RUNS) || { echo "$(RUNS) is not there, so no run is: make quickstart, or RUNS=folder"; exit 1; }
	$(BIN)/tensorboard --logdir $(RUNS) --port $(PORT) --samples_per_plugin text=100

test: install lint ## Lint, type-check and run the tests
	$(BIN)/python -m pytest -n auto

test-slow: install ## The tests that take minutes
	$(BIN)/python -m pytest -m slow

gpu-check: install ## Check and time the kernels on an NVIDIA GPU; the tables go into docs/kernels.md (an hour)
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu-check needs an NVIDIA GPU and a PyTorch for CUDA; this is torch %s without one" % torch.__version__)'
	$(BIN)/python -m pytest -n 0 -m gpu tests
	$(BIN)/python cli.py bench kernels --page docs/kernels.md
	$(BIN)/python cli.py bench layer --device cuda $(GPU_LAYER) --modes '[train, prefill]' --seq_lens '[1024, 4096, 16384, 32768]'
	$(BIN)/python cli.py bench layer --device cuda $(GPU_LAYER) --modes '[decode]' --seq_lens '[4096]' --batch_size 64

lint: install ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install ## Let ruff put the code in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

figures: install ## Draw the pictures of the pages again, those of TensorBoard with RUNS=runs and Chromium
	$(BIN)/python docs/draw_layer.py
	$(BIN)/python docs/draw_tensorboard.py --runs $(RUNS)

notebooks: install ## Execute the notebooks: they read finished sweeps, and do what is not done yet: train the quickstart, measure layers of this machine (half an hour; RAT_NOTEBOOKS=small: a quick look, in RUNS/notebooks)
	$(BIN)/python -m nbconvert --execute --to notebook $(if $(filter small,$(RAT_NOTEBOOKS)),--output-dir $(RUNS)/notebooks,--inplace) $(NBCONVERT) notebooks/*.ipynb

clean: ## Remove caches, prepared data and runs
	rm -rf data runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
