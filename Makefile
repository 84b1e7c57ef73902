# Every target sets up what it needs; `make help` lists them. Nothing here asks a question.
#
#   PYTHON=/path/to/python3.12   the Python to set up with
#   PYTEST_ARGS="-n 0 -k plan"   further arguments for pytest
#   ARGS="..."                   further arguments for demo, study, bench, fuzz and gpu-check
#   COUNT=20000 SEED=0           how many cases fuzz runs, and which
#   VERSIONS="0.18.2 main"        the Megatrons of test-versions; MEGATRON_MAIN=path for main

PYTEST_ARGS ?=
ARGS ?=
COUNT ?= 20000
SEED ?= 0
CXX ?= g++
BIN := .venv/bin
SHELL_FILES := $(wildcard examples/*.sh examples/slurm/*.sbatch tools/*.sh benchmarks/gpu/*.sh) .ci/run
CORE_FILES := $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp))
ISSUE_FORMS := $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/tests/*.cpp csrc/tests/*.h)

# Compiled Python files are kept even where the caller's shell forbids it: Megatron and torch take
# twenty seconds to import without them, once per process.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo study test test-fast test-distributed test-versions bench fuzz gpu-check docs check format \
	sanitize clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: ## Make .venv with everything pinned and the C++ extension built (also done by the others)
	@PYTHON='$(PYTHON)' sh tools/setup_venv.sh

demo: venv ## Collect real documents, train with MeCo and without on this machine, show what it did
	@$(BIN)/python examples/local_demo/run.py $(ARGS)

study: venv ## Measure what metadata does in invented worlds, over seeds (all settings: ARGS=--full)
	@$(BIN)/python -m benchmarks.study.run $(ARGS)

test: venv ## Run the test suite, two files at a time
	@$(BIN)/python -m pytest -q -m "not slow and not gpu" -n 2 --dist loadfile $(PYTEST_ARGS)

test-fast: venv ## Run the suite without the tests that start several ranks
	@$(BIN)/python -m pytest -q -m "not slow and not gpu and not distributed" -n 2 --dist loadfile $(PYTEST_ARGS)

test-distributed: venv ## Run every test that starts several ranks, the slow ones too
	@$(BIN)/python -m pytest -q -m "distributed and not gpu" $(PYTEST_ARGS)

test-versions: venv ## Run tests under other Megatrons (MEGATRON_MAIN=path adds a checkout, VERSIONS="0.18.2" chooses)
	@MEGATRON_MAIN='$(MEGATRON_MAIN)' sh tools/test_versions.sh $(VERSIONS)

fuzz: venv ## Damage files and call with hostile numbers, COUNT times (a short run is part of test)
	@PYTHONPATH=tests $(BIN)/python -W ignore -m fuzz --count $(COUNT) --seed $(SEED) $(ARGS)

bench: venv ## Run the benchmarks
	@$(BIN)/python benchmarks/run.py $(ARGS)

gpu-check: ## On a host with a GPU: run the GPU tests and measure, resumably (no network needed)
	@PYTHON='$(PYTHON)' sh benchmarks/gpu/run.sh $(ARGS)

docs: venv ## Build the documentation as a site, in build/site (no network needed)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: build/site/index.html"

check: venv ## Check formatting, lint, types, shell scripts, workflows, imports and dependencies
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_FILES)
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(ISSUE_FORMS)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/python -m pytest -q tests/test_import_direction.py tests/test_packaging.py

format: venv ## Format the Python and C++ sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

sanitize: ## Run the C++ tests under the address and undefined-behaviour sanitizers
	@test -f csrc/tests/test_core.cpp || { echo "sanitize: csrc/tests/test_core.cpp is missing" >&2; exit 1; }
	@mkdir -p build/sanitize
	$(CXX) -std=c++17 -g -O1 -Wall -Wextra -fno-omit-frame-pointer -pthread -Icsrc \
	    -fsanitize=address,undefined -fno-sanitize-recover=all \
	    csrc/tests/test_core.cpp $(CORE_FILES) -o build/sanitize/test_core
	build/sanitize/test_core

clean: ## Remove everything that was built, the environment included
	rm -rf .venv build dist *.egg-info megatron_meco/_core.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_meco tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
