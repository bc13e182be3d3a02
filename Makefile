# Each target sets up what it needs in .venv; the first run takes some minutes.

PYTHON ?= python3
BIN := .venv/bin
OLDEST ?= $(lastword python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python))
NEWEST ?= $(lastword python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python))
INSTALLED := .venv/installed
TWO_PROCESSES := --numprocesses 2 --dist worksteal
CASES_OF_EACH = $(if $(CASES),--cases $(CASES))

.PHONY: help demo test coverage test-slow test-oldest test-newest test-clients lint bench bench-report docs clean

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):[^#]*## */  make \1  /p' Makefile

demo: $(INSTALLED)  ## street scenes through the weights that are shipped, in seconds; then VNet is trained on such scenes; all under runs/demo
	rm -rf runs/demo
	$(BIN)/revseg data synthesize --out runs/demo/scenes --size 256 512 --train-samples 1 --val-samples 4
	$(BIN)/revseg predict vnet-camvid runs/demo/scenes/leftImg8bit/val --write overlay --out runs/demo/shipped
	@echo "runs/demo/shipped has these scenes as a network sees them that was trained on photographs alone; now one learns them."
	$(BIN)/revseg train --data synthetic --size 128 256 --train-samples 192 --val-samples 24 --epochs 12 --threads 1 --out runs/demo/trained
	$(BIN)/revseg predict runs/demo/trained/best.safetensors runs/demo/scenes/leftImg8bit/val --write colour overlay --out runs/demo/predicted

test: $(INSTALLED)  ## all tests, or those of a folder, FOLDER=engine; kernels in Triton's interpreter, which a process chooses once
	$(BIN)/python -m pytest $(TWO_PROCESSES) --maxfail 20 $(if $(FOLDER),tests/$(FOLDER))
ifeq ($(filter-out interpreted kernels,$(FOLDER)),)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(TWO_PROCESSES) --maxfail 20 tests/interpreted
endif

coverage: $(INSTALLED)  ## the same, and which lines of revseg/ and kernels/ they do not run; fails below 95 %
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest $(CASES_OF_EACH) $(TWO_PROCESSES) --ignore tests/benchmarks
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/coverage run -m pytest $(CASES_OF_EACH) $(TWO_PROCESSES) tests/interpreted
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-slow: $(INSTALLED)  ## what takes minutes: each network compiled, exported for any size
	$(BIN)/python -m pytest -m slow $(TWO_PROCESSES)

# The whole suite; with CASES=K at most K cases of each test. Kernels in Triton's interpreter, which a process chooses once.
define suite
OMP_NUM_THREADS=1 $(1)/bin/python -m pytest $(CASES_OF_EACH) $(TWO_PROCESSES)
OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(1)/bin/python -m pytest $(CASES_OF_EACH) $(TWO_PROCESSES) tests/interpreted
endef

test-oldest: .venv-oldest/installed  ## all tests with the oldest supported Python, torch, Triton and numpy; some GB
	$(call suite,.venv-oldest)

test-newest: .venv-newest/installed  ## the same with the newest Python, and the newest of all others there is; some GB
	$(call suite,.venv-newest)

test-clients: .venv-clients/installed  ## networks of torchvision, timm and segmentation_models.pytorch, fitted as they come; some GB
	OMP_NUM_THREADS=1 .venv-clients/bin/python -m pytest --numprocesses 2 --dist worksteal tests/clients

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## measure memory and time here; hours; sizes as large as the memory lets them be
	$(BIN)/python -m benchmarks measure

bench-report: $(INSTALLED)  ## tables and pictures from the files under benchmarks/results
	$(BIN)/python -m benchmarks report

docs: $(INSTALLED)  ## the pages of docs/ as a site under build/site; a warning is an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

clean:  ## take .venv, those of test-oldest, test-newest and test-clients, and runs away
	rm -rf .venv .venv-oldest .venv-newest .venv-clients runs

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(OLDEST) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[test]"
	touch $@

.venv-clients/installed: pyproject.toml constraints-clients.txt
	$(PYTHON) -m venv --clear .venv-clients
	.venv-clients/bin/python -m pip install --quiet --constraint constraints-clients.txt --editable ".[dev]" torchvision timm segmentation_models_pytorch
	touch $@

.venv-newest/installed: pyproject.toml
	$(NEWEST) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@
