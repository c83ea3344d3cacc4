# Every target does its own set-up: an environment in .venv, made again when pyproject.toml changes.
# ARGS goes to the command behind the target: make train ARGS="trainer.max_epochs=1"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=
TEST := -m pytest $(ARGS)

.PHONY: help train bench report verify-weights test test-page test-timm fuzz test-gpu lint fix type wheel

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[demo,dev]'
	touch $@

train: $(INSTALLED)  ## train the default experiment: a small NAT on real digits, on the CPU or a GPU
	$(BIN)/python train.py $(ARGS)

bench: $(INSTALLED)  ## measure throughput: make bench ARGS="model.name=nat_tiny"
	$(BIN)/nat-bench $(ARGS)

report: $(INSTALLED)  ## one page of all results (index.html), its tables and pictures in outputs/report, and the README's numbers; no GPU
	PYTHONPATH=.:kernels $(BIN)/python benchmarks/report.py $(ARGS)

verify-weights: $(INSTALLED)  ## download and check every published file: make verify-weights ARGS="'dinat_s_*'"
	$(BIN)/python -m nat_models.verify_weights --record benchmarks/results/weights.json $(ARGS)

test: $(INSTALLED)  ## run every test that needs no GPU
	$(BIN)/python $(TEST) -n auto --maxprocesses 8 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python $(TEST) -n auto --maxprocesses 8 --dist worksteal -m interpreter tests/kernels tests/nat_models/fused

test-page: $(INSTALLED)  ## open the report's page in headless Chromium: apt-get install chromium-headless-shell
	$(BIN)/python $(TEST) -m browser tests/benchmarks

test-timm: $(INSTALLED)  ## run timm's own model tests, downloaded, on ours: make test-timm ARGS="nat_mini dinat_s_*"
	$(BIN)/python tests/timm_suite.py $(ARGS)

fuzz: $(INSTALLED)  ## thousands of random attention problems against the definition, other ones each time
	$(BIN)/python $(TEST) -n auto --maxprocesses 8 --hypothesis-profile=fuzz -k random_problems tests/kernels

test-gpu: export PYTHONPATH := .:kernels:$(PYTHONPATH)
test-gpu:  ## run the GPU's tests with $(PYTHON) and its own packages
	$(PYTHON) $(TEST) -m "" tests/kernels
	$(PYTHON) $(TEST) -m "gpu or interpreter" --ignore=tests/kernels tests

lint: $(INSTALLED)  ## check style and format; edits nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: $(INSTALLED)  ## repair what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(INSTALLED)  ## check types
	$(BIN)/mypy

wheel: $(INSTALLED)  ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation
