.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(READY) ## create .venv with everything, at the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt \
		--editable '.[quickstart,lpips,wandb,tensorboard,video,app,export,others,docs,dev]'
	@touch $@

demo: $(READY) ## train a small PReNet on synthetic rain and restore an unseen photo (minutes)
	$(BIN)/derain fit --config experiments/quickstart.yaml
	$(BIN)/derain test --config experiments/quickstart.yaml --weights "$$(ls -t runs/quickstart/fit-*/weights.safetensors | head -1)"
	@echo "before and after: $$(ls -td runs/quickstart/test-*/panels | head -1)"

test: $(READY) ## run the quick tests of every file (5 minutes on 2 cores)
	$(PYTEST) -m "not slow and not gpu and not network"

lint: $(READY) ## check style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY) ## check types with mypy --strict
	$(BIN)/mypy

arch: $(READY) ## check with import-linter which layers import which
	$(BIN)/lint-imports

check: lint type arch ## everything that CI runs: lint, type, arch, and all tests without GPU and internet
	$(PYTEST) -m "not gpu and not network"

mutants: $(READY) ## plant faults one by one and report those that no test catches
	$(BIN)/python -m tests.mutants

bench: $(READY) ## compare with reference implementations and print the ratios
	@failed=0; for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || failed=1; done; exit $$failed

gpu: $(READY) ## run the tests and benchmarks of a GPU and write benchmarks/gpu.md (under 9 minutes; continues)
	$(BIN)/python -m benchmarks.gpu

notebooks: $(READY) ## execute the notebooks, two at a time, the longest first
	@echo notebooks/0[!1245]*.ipynb notebooks/0[1245]*.ipynb | OMP_NUM_THREADS=1 xargs -n 1 -P 2 $(BIN)/jupyter execute --inplace

docs: $(READY) ## build the site of docs/ in site/
	$(BIN)/mkdocs build --strict --quiet --site-dir site

clean: ## remove everything that can be rebuilt
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install demo test lint type arch check mutants bench gpu notebooks docs clean
