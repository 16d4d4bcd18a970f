SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The first Python on the path that can run Fathom; PYTHON=/path/to/python names another.
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.10; do \
	"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo "$$python" && break; done)
CONSTRAINTS ?= constraints.txt
# Test processes that run at once.
JOBS ?= 2
# Family and depth scheme of `make quickstart`; empty means the default ones.
FAMILY ?=
SCHEME ?=
# After which `make test-gpu` and `make bench-gpu` begin nothing new, each.
MINUTES ?= 6
# Further arguments of pytest, or of the benchmarks.
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.fathom-installed
CODE := model parallel pretrain tools tests $(wildcard benchmarks)

.PHONY: help
help: ## Show this list
	@echo "Fathom. Targets:"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16
	@echo "Variables: PYTHON, CONSTRAINTS, FAMILY and SCHEME (quickstart), JOBS and ARGS (tests), MINUTES (GPU), e.g. make quickstart SCHEME=b2t"

.PHONY: check-host
check-host: ## Say what this machine lacks for the installation
	@echo "check-host: looking for Python 3.10 to 3.12 with venv, and a C++ compiler"
	@test -n "$(PYTHON)" || { echo "check-host: no Python 3.10, 3.11 or 3.12 found: install one, or say make install PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "check-host: PYTHON=$(PYTHON) is not Python 3.10, 3.11 or 3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "check-host: $(PYTHON) cannot make an environment with pip: install its venv package (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@command -v g++ >/dev/null || \
		echo "check-host: g++ is missing: training works, but kernels that compile on first use (optimizer offload) do not (apt-get install g++)" >&2
	@echo "check-host: $$($(PYTHON) --version) is usable"

.PHONY: install
install: $(STAMP) ## Make .venv with everything pinned in constraints.txt (again only when it or pyproject.toml changed)
	@echo "install: .venv is up to date; activate it with: source .venv/bin/activate"

# DeepSpeed's set-up runs in pip's isolated build environment, where it finds no torch and so builds no kernels: those compile on first use.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(MAKE) check-host
	@echo "install: making .venv from $(CONSTRAINTS); the first time downloads PyTorch and takes some minutes"
	@test -x $(RUN) && $(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip install --quiet --upgrade --constraint $(CONSTRAINTS) pip setuptools wheel
	@DS_BUILD_OPS=0 PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --build-constraint $(CONSTRAINTS) --editable ".[dev]"
	@touch $@

.PHONY: quickstart
quickstart: $(STAMP) ## Train a 48-layer model on this machine, from text to report, in minutes (FAMILY=bert, seq2seq, speech or vit, SCHEME=name)
	@echo "quickstart: text, tokenizer, training, resume, export, report"
	@$(RUN) -m tools.dev.quickstart $(if $(FAMILY),--family $(FAMILY)) $(if $(SCHEME),--scheme $(SCHEME))

.PHONY: test
test: $(STAMP) ## Run the quick tests (JOBS=2 at a time, ARGS for pytest)
	@echo "test: everything but GPU and slow tests; a file's tests share what one process measured for them"
	@$(RUN) -m pytest -m "not gpu and not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: test-slow
test-slow: $(STAMP) ## Run the tests that take minutes
	@echo "test-slow: tests marked slow"
	@$(RUN) -m pytest -m "slow and not gpu" --timeout 3600 $(ARGS)

.PHONY: test-gpu
test-gpu: $(STAMP) ## Run the tests that need a GPU
	@echo "test-gpu: tests marked gpu or te, the most valuable first; none of tests/gpu begins after $(MINUTES) minutes"
	@FATHOM_GPU_MINUTES=$(MINUTES) $(RUN) -m pytest -v -m "gpu or te" $(ARGS)

.PHONY: docs
docs: $(STAMP) ## Build the documentation as a site, in site/
	@echo "docs: site/index.html"
	@$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --build-constraint $(CONSTRAINTS) --editable ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

.PHONY: bench
bench: $(STAMP) ## Run the benchmarks on the CPU
	@echo "bench: benchmarks on the CPU"
	@$(RUN) -W ignore -m benchmarks.run --rounds 2 $(ARGS)
	@echo "bench: checkpoints of 1000 layers"
	@$(RUN) -W ignore -m benchmarks.checkpoint
	@echo "bench: cost of a layer by depth, start-up, data preparation, memory against the plan"
	@$(RUN) -W ignore -m benchmarks.depth --rounds 2 --out benchmarks/results/depth.json
	@$(RUN) -W ignore -m benchmarks.startup --out benchmarks/results/startup.json
	@$(RUN) -W ignore -m benchmarks.data --rounds 2 --out benchmarks/results/data.json
	@$(RUN) -W ignore -m benchmarks.memory

.PHONY: bench-profile
bench-profile: $(STAMP) ## Show where the time of a 1000-layer step goes, on the CPU
	@echo "bench-profile: one step under the profiler, and the bare loop's"
	@$(RUN) -W ignore -m benchmarks.profile --repeats 1 --out benchmarks/results/profile.json $(ARGS)

.PHONY: bench-gpu
bench-gpu: $(STAMP) ## Run the benchmarks on the GPU
	@echo "bench-gpu: benchmarks on the GPU"
	@$(RUN) -m benchmarks.gpu --minutes $(MINUTES) $(ARGS)

.PHONY: lint
lint: $(STAMP) ## Check style and layout with ruff
	@echo "lint: ruff"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check . || { echo "lint: the files above are not formatted: make format" >&2; exit 1; }

.PHONY: format
format: $(STAMP) ## Lay out the code with ruff, and mend what it can
	@echo "format: ruff"
	@$(RUN) -m ruff check --fix-only --quiet .
	@$(RUN) -m ruff format .

.PHONY: typecheck
typecheck: $(STAMP) ## Check types with mypy
	@echo "typecheck: mypy"
	@$(RUN) -m mypy $(CODE)

.PHONY: imports
imports: $(STAMP) ## Check that imports point one way: tools, pretrain, parallel, model
	@echo "imports: import-linter"
	@$(VENV)/bin/lint-imports

.PHONY: check
check: lint typecheck imports ## lint, typecheck and imports
	@echo "check: all passed"

.PHONY: clean
clean: ## Remove caches and build products; .venv, data and runs stay
	@echo "clean: caches and build products"
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
