# Everything runs in an environment of its own, .venv, made from Python >= 3.10 with venv, g++ and make.
#   make demo          a text VAE that collapses, and the same one cured, side by side
#   make test          build, lint, type check, CUDA objects where nvcc is, tests
#   make test-integrations  the tests on diffusers, scvi-tools, Pyro, pythae and Lightning; it installs them
#   make fuzz          fuzzes the CPU kernels, guided by coverage, under ASan and UBSan: make fuzz MINUTES=30
#   make check-slow    the tests that are too slow for `make test`; results in benchmarks/results/
#   make docs          the documentation, as pages in build/docs
#   make bench         the speed table
#   make install-matrix  installs the package in every way, in fresh environments (20 minutes, 10 GB, a registry)
#   make instructions  counts the CPU kernels' instructions per element (needs valgrind)
#   make predicted-cycles  what llvm-mca expects of those loops on other processors
#   make sass          the CUDA kernels' instructions, counted (needs nvcc): benchmarks/results/sass.csv
#   make gpu-check     everything that a GPU can tell about the kernels; installs and downloads nothing:
#   make gpu-bench     it and the speed on a GPU use PYTHON's own torch (make gpu-check PYTHON=/usr/bin/python3)
#   make lint | build | cuda-objects | clean

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-integrations fuzz check-slow docs install-matrix bench instructions predicted-cycles
.PHONY: lint types cuda-objects sass gpu-check gpu-bench build clean

PYTHON ?= python3
OUT ?= build/gpu
VENV := .venv
INTEGRATIONS := .venv-integrations
FUZZ := .venv-fuzz
MINUTES ?= 5
PY := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/environment.stamp
BUILT := $(VENV)/built.stamp
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(NATIVE) $(shell find tests -name '*.h' -o -name '*.cpp')
PIP := $(PY) -m pip install --disable-pip-version-check -q -c constraints.txt

help:
	@sed -n 's/^#   //p' Makefile

$(ENVIRONMENT): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than 3.10: set PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) lacks venv: install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; p = pathlib.Path(sysconfig.get_path("include"), "Python.h"); sys.exit(not p.is_file())' || \
	  { echo "$(PYTHON) lacks its C headers: install them (Debian, Ubuntu: apt-get install python3-dev)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --upgrade pip setuptools torch
	VAEKERNELS_BUILD=0 $(PIP) --no-build-isolation -e '.[train,dev,docs]'
	touch $@

$(BUILT): $(ENVIRONMENT) setup.py vaekernels/_build.py $(NATIVE)
	VAEKERNELS_BUILD=1 $(PIP) --no-build-isolation --no-deps -e .
	touch $@

build: $(BUILT)

demo: $(BUILT)
	$(PY) -m vaekernels demo docstrings

test: $(BUILT) lint types
	if $(PY) vaekernels/_build.py nvcc; then $(MAKE) cuda-objects; else echo 'no nvcc: cuda-objects is left out'; fi
	VAEKERNELS_REQUIRE_NATIVE=1 $(PY) -m pytest

# An environment on top of $(VENV), whose packages it sees: no second torch, and nothing of theirs in $(VENV).
define on-top
	$(PY) -m venv --clear $(1)
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir({!r})".format(sysconfig.get_path("purelib")))' \
	  > $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(1)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt $(2)
endef

$(INTEGRATIONS)/environment.stamp: $(ENVIRONMENT)
	$(call on-top,$(INTEGRATIONS),diffusers lightning pyro-ppl pythae scvi-tools)
	touch $@

test-integrations: $(BUILT) $(INTEGRATIONS)/environment.stamp
	VAEKERNELS_REQUIRE_NATIVE=1 VAEKERNELS_REQUIRE_INTEGRATIONS=1 \
	  $(INTEGRATIONS)/bin/python -m pytest -m 'slow or not slow' tests/integrations \
	  tests/test_docs.py::test_before_and_after

$(FUZZ)/environment.stamp: $(ENVIRONMENT)
	$(call on-top,$(FUZZ),atheris) || \
	  { echo "make fuzz needs atheris, which is for Linux and Python 3.11 and later"; exit 1; }
	touch $@

fuzz: $(FUZZ)/environment.stamp
	$(FUZZ)/bin/python tests/fuzz --minutes $(MINUTES)

lint: $(ENVIRONMENT)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

types: $(ENVIRONMENT)
	$(PY) -m mypy

cuda-objects: $(ENVIRONMENT)
	$(PY) vaekernels/_build.py cuda-objects build/cuda-objects

sass: $(ENVIRONMENT)
	$(PY) tests/sass.py

check-slow: $(BUILT)
	mkdir -p benchmarks/results
	VAEKERNELS_REQUIRE_NATIVE=1 $(PY) -m pytest -m slow -rA --no-header --color=no | tee benchmarks/results/check-slow.txt

# Strict: a link or a reference that leads nowhere fails.
docs: $(BUILT)
	$(PY) -m sphinx -W --keep-going -q -E docs build/docs
	@echo build/docs/index.html

install-matrix: $(ENVIRONMENT)
	$(PY) tests/install_matrix

instructions: $(BUILT)
	$(PY) tests/instruction_counts.py

predicted-cycles: $(BUILT)
	$(PY) tests/predicted_cycles.py

bench: $(BUILT)
	$(PY) -m vaekernels bench --quick

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --out $(OUT)

gpu-bench:
	$(PYTHON) benchmarks/gpu_build.py
	XDG_CACHE_HOME=$(CURDIR)/build/gpu/cache PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu_bench.py --out $(OUT)

clean:
	rm -rf build dist *.egg-info $(VENV) $(INTEGRATIONS) $(FUZZ) .mypy_cache .pytest_cache .ruff_cache
	rm -f vaekernels/_C*.so vaekernels/_build.json
	find vaekernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
