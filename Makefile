# SPDX-License-Identifier: Apache-2.0
# Every target makes what it needs by `make setup` first, says what it does and how long it took.

SHELL := /bin/bash
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := help

BIN := .venv/bin
STEP := @tools/step.sh
PYTEST := $(BIN)/python -m pytest
# Extra arguments for the command behind a target, as in: make demo ARGS=--json, make test ARGS='-k btf -x'
ARGS ?=
PART ?=
KERNEL ?=
BPF_SOURCES := $(wildcard bpf/*.c bpf/include/kptrace/*.h)
SHELL_SOURCES := .ci/run $(wildcard tools/*.sh tools/vm/*.sh tests/cluster/tools/*.sh)

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install Debian packages (as root) and make .venv; instant when all is there
	@tools/setup.sh

.PHONY: demo
demo: setup ## Main job on an embedded node, as root (ARGS=--json, ARGS=--keep)
	@$(BIN)/kptrace demo $(ARGS)

.PHONY: test
test: setup ## Unit tests, and native tests as root (ARGS='-k name -x')
	$(STEP) "unit and native tests" $(PYTEST) $(ARGS)

.PHONY: test-vm
test-vm: setup ## The image on old kernels and new, in virtual machines, as root (KERNEL=6.12, ARGS=--list)
	$(STEP) "virtual machine tests" $(BIN)/python tools/vm/run.py $(KERNEL) $(ARGS)

.PHONY: test-cluster
test-cluster: setup ## Tests with a real API server and the real kube-proxy, built once (minutes)
	$(STEP) "Kubernetes for the cluster tests" tests/cluster/tools/build.sh
	$(STEP) "cluster tests" tools/tier.sh cluster $(ARGS)

.PHONY: check check-lint check-format check-types check-imports check-c check-shell
check: check-lint check-format check-types check-imports check-c check-shell ## Lint, formats, types, import contracts (all of them: make -k check)

check-lint: setup
	$(STEP) "lint (ruff)" $(BIN)/ruff check --quiet --output-format concise .

check-format: setup
	$(STEP) "Python format (ruff)" $(BIN)/ruff format --check .

check-types: setup
	$(STEP) "types (mypy --strict)" $(BIN)/mypy --strict kptrace

check-imports: setup
	$(STEP) "import contracts (import-linter)" $(BIN)/lint-imports

check-c: setup
ifneq ($(BPF_SOURCES),)
	$(STEP) "C format (clang-format)" clang-format --dry-run -Werror $(BPF_SOURCES)
endif

check-shell: setup
	$(STEP) "shell scripts (shellcheck)" shellcheck $(SHELL_SOURCES)

.PHONY: format
format: setup ## Format Python and C in place
	$(STEP) "format Python" $(BIN)/ruff format --quiet .
ifneq ($(BPF_SOURCES),)
	$(STEP) "format C" clang-format -i $(BPF_SOURCES)
endif

.PHONY: golden
golden: setup ## Rewrite the golden files from what the code says now; review the diff
	$(STEP) "golden files" $(PYTEST) tests/unit --update-golden $(ARGS)

.PHONY: bench
bench: setup ## Measure what kptrace costs and write docs/overhead.md (ARGS=--check, ARGS=--instructions: in a test machine)
	$(STEP) "benchmark" $(BIN)/python tools/bench $(ARGS)

.PHONY: acceptance
acceptance: setup ## The long demonstrations, as root (PART=name for one)
	$(STEP) "acceptance$(if $(PART), $(PART))" tools/acceptance.sh $(PART)

.PHONY: image
image: ## Build the container image with buildah, as root (ARGS='--build-arg BASE=...')
	$(STEP) "container image" tools/image.sh $(ARGS)

.PHONY: clean
clean: ## Remove .venv and everything generated
	$(STEP) "clean" rm -rf .venv build dist kptrace.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache acceptance-out
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
