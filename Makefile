# One word per chore. `make` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo real compare study test test-faults test-slow test-bases test-gpu check format bench clean

help: ## list the chores
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@

setup: $(READY) ## make the virtual environment with the tested versions

demo: setup ## adapt, evaluate and merge the embedded model (two minutes with the set-up)
	$(BIN)/loratune train recipe=demo

real: setup ## a real model on a help desk's messages: fetches 93 MB, under ten minutes
	$(BIN)/python scripts/make_real_base.py outputs/real/base
	$(BIN)/python scripts/help_desk_rows.py outputs/real/rows
	$(BIN)/loratune train recipe=help_desk model.path=outputs/real/base \
	  data.path=outputs/real/rows/train.jsonl data.eval_path=outputs/real/rows/dev.jsonl \
	  data.test_path=outputs/real/rows/test.jsonl

compare: setup ## compare the four variants on the demo (under ten minutes)
	$(BIN)/loratune compare recipe=demo

study: setup ## run the study's comparisons on BASE=DIR (all, or STUDY="scale places"), write docs/study.md
	OMP_NUM_THREADS=1 $(BIN)/python scripts/study.py $(BASE) $(STUDY)

test: setup ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not bases" -n logical --maxprocesses 4 --dist loadfile

test-faults: setup ## run the fault suites alone: kills, full disks, drift, hostile input
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" tests/faults tests/faults_security

test-slow: setup ## run the tests that take minutes, among them 200 random kills
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

test-bases: setup ## try all base model types, write docs/bases.md (under ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m bases tests/bases -n 2; status=$$?; \
	$(BIN)/python scripts/bases_page.py && exit $$status

test-gpu: setup ## run the tests that need a CUDA device (five minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m gpu tests/gpu -n 4

check: setup ## format, lint and types, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p loratune

format: setup ## put the code in shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## measure against peers and the physical floor, write benchmarks/results
	$(BIN)/pip install -q --disable-pip-version-check -e ".[bench]" -c constraints.txt
	$(BIN)/python benchmarks/run_all.py

clean: ## remove the environment, caches and run folders
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find outputs -mindepth 1 ! -name .gitkeep -delete
