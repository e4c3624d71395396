# Targets: install quickstart test test-all check docs bench bench-mix faults sbom audit.
#
# `make install` needs python3 (3.11 or newer) with pip, and nothing else: no compiler, no GPU.
# Variables: PYTHON, VENV, VENV_ARGS (for `python -m venv`), PIP_ARGS (for every `pip install`),
# PYTEST_ARGS, LAYOUT, RANKS and PRECISION (for the quickstart).

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
PIP_ARGS ?=
# Tests wait for processes much of the time: three workers fill two cores. In the order of the
# files: those with few and long tests would come last otherwise, one worker at a time.
PYTEST_ARGS ?= -n 3 --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_ARGS)

# `make quickstart LAYOUT=tp2` (pp2, "tp2 pp2", zero3 …: names of configs/parallel) trains in that
# layout, into a run folder of its own; RANKS is the number of processes.
LAYOUT ?=
RANKS ?= 2
# A fifth of a step's time less where the processor multiplies bf16 itself, much more where it does not.
PRECISION ?= $(shell grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null && echo bf16 || echo fp32)
empty :=
RUN_DIR := runs/quickstart$(subst $(empty) $(empty),,$(addprefix -,$(strip $(LAYOUT))))

# DeepSpeed comes as source: nothing of it is compiled, at installation or later.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all check docs bench bench-mix faults sbom audit

help:
	@echo "make install     make $(VENV) with everything needed to train"
	@echo "make quickstart  build seven domains, train on them with odm, write the report"
	@echo "                 (LAYOUT=tp2 or pp2: under tensor or pipeline parallelism;"
	@echo "                 PRECISION=fp32 or bf16, which processors with instructions for it take)"
	@echo "make test        the tests of a few minutes; make test-all: all of them"
	@echo "make check       ruff, mypy, import-linter"
	@echo "make docs        the documentation site, into build/site"
	@echo "make bench       the benchmarks of benchmarks/"
	@echo "make faults      runs broken on purpose: the fault table (COLUMN=release: hours)"
	@echo "make sbom        the list of what is installed, into build/sbom.json; make audit checks it"
	@echo "make bench-mix   MixBench, the small tier: methods compared, in under an hour"

# A stamp per state of the environment: done once, and again when what it was made from changes.
$(VENV)/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 install"; exit 2; }
	@echo "making $(VENV)"
	@# Some distributions ship Python without ensurepip: then the outer pip furnishes the inner one.
	@$(PYTHON) -m venv --clear $(VENV_ARGS) $(VENV) >/dev/null 2>&1 || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV_ARGS) $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet --ignore-installed pip; }
	@touch $@

$(VENV)/.stamp-train: $(VENV)/.stamp-python pyproject.toml constraints.txt
	@echo "installing what training needs (a few minutes the first time)"
	@$(PIP) -e '.[train]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-train
	@echo "installing what the tests and checks need"
	@$(PIP) -e '.[dev]'
	@touch $@

install: $(VENV)/.stamp-train
	@echo "ready: $(BIN)/python"

quickstart: install
	$(BIN)/python prepare_data.py quickstart
	CUDA_VISIBLE_DEVICES= $(BIN)/python deepy.py train.py -d configs local/quickstart mixing/odm \
	  $(addprefix parallel/,$(LAYOUT)) --set run_dir=$(RUN_DIR) num_gpus=$(RANKS) precision=$(PRECISION)
	$(BIN)/python tools/report.py $(RUN_DIR) -o $(RUN_DIR)/report.html
	@echo "report: $(CURDIR)/$(RUN_DIR)/report.html"

test: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A warning (a link or anchor that leads nowhere) is an error; `make test` builds it likewise.
# Not --quiet: warnings that are not shown would not count.
docs: $(VENV)/.stamp-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site: $(CURDIR)/build/site/index.html"

# Every method at equal FLOPs on small families of domains; what was run is not run again.
bench-mix: $(VENV)/.stamp-dev
	$(BIN)/python prepare_data.py mixbench --families m2 l2 m3 r3 l3 t3
	CUDA_VISIBLE_DEVICES= $(BIN)/python tools/mix.py compare configs/mixbench/small.yml \
	  --jobs 2 --out runs/mixbench/small
	@echo "report: $(CURDIR)/runs/mixbench/small/report.html"

# Stops at the first that fails. The tables of README.md and docs/performance.md follow the results.
bench: $(VENV)/.stamp-dev
	@for script in benchmarks/*.py; do \
	  echo "== $$script"; start=$$(date +%s); \
	  OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python $$script || exit 1; \
	  echo "== $$script: $$(($$(date +%s) - start)) s"; done
	$(BIN)/python tools/generate_docs.py

# What has passed is not run again: remove build/faults-*.json to begin anew.
COLUMN ?= ci
faults: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python tools/fault_campaign.py --column $(COLUMN) \
	  --json build/faults-$(COLUMN).json

sbom: $(VENV)/.stamp-dev
	$(BIN)/python tools/sbom.py -o build/sbom.json

audit: $(VENV)/.stamp-dev
	$(BIN)/python tools/sbom.py --audit
