# Set-up, tests and demo; on a bare machine only Python 3.11 and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip, with versions that are known to install together.
TORCH := torch==2.14.1 torchvision==0.29.1

.DEFAULT_GOAL := help
.PHONY: help setup demo examples test sweep lint types wheel bench clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

setup: $(VENV)/installed ## Create .venv and install the package with all extras

demo: setup ## Fine-tune EfficientNet-Lite0 on handwritten digits; under two minutes on 2 cores
	$(BIN)/python -W ignore examples/finetune_vision.py

test: setup ## Run all tests and doctests but the slow sweeps
	$(BIN)/python -m pytest

sweep: setup ## Run the slow sweeps
	$(BIN)/python -m pytest -m slow

lint: setup ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## Check types
	$(BIN)/mypy

wheel: setup ## Build the wheel and import it from a clean environment
	rm -rf dist build/clean
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet $(TORCH)
	build/clean/bin/python -m pip install --quiet dist/*.whl
	cd build && clean/bin/python -c "import lightning_freeze as f; print('imported', len(f.__all__), 'names from', f.__file__)"

bench: setup ## Run the benchmarks
	for script in rivals overhead frozen_step; do $(BIN)/python -W ignore benchmarks/$$script.py || exit 1; done

clean: ## Remove what was built
	rm -rf $(VENV) build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis
