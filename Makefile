# Needs Python >= 3.10 with venv and headers, g++ and make. Everything else is installed into .venv.
#   make demo          a text VAE that collapses, and three that do not, side by side
#   make test          build, lint, type check, CUDA objects where nvcc is, tests
#   make test-integrations  the tests on the libraries of docs/integrations.md; it installs them
#   make test-peers    libraries' own tests without and with the fused classes: make test-peers PEERS=checkouts
#   make test-cuda-host  the host code of the CUDA library, on a CUDA runtime that computes nothing; it installs a
#                      CUDA torch (6 GB) and needs nvcc 13, but no GPU
#   make fuzz          fuzzes the CPU kernels, guided by coverage, under ASan and UBSan: make fuzz MINUTES=30
#   make check-slow    the tests that are too slow for make test
#   make docs          the documentation, as pages in build/docs
#   make bench         the speed table
#   make install-matrix  installs the package in every way, in fresh environments (45 minutes, 25 GB, a registry)
#   make instructions  counts the CPU kernels' instructions per element (needs valgrind)
#   make predicted-cycles  cycles that llvm-mca predicts for those loops on other processors
#   make sass          the CUDA kernels' instructions, counted (needs nvcc): benchmarks/results/sass.csv
#   make gpu-check     builds the CUDA kernels and tests them on this machine's GPU
#   make gpu-bench     builds the CUDA kernels and times them on this machine's GPU; both use the torch of PYTHON
#                      and install nothing (make gpu-check PYTHON=/usr/bin/python3)
#   make lint | build | cuda-objects | clean

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-ops test-training test-build test-collapse test-rest test-integrations test-peers test-cuda-host fuzz check-slow docs install-matrix bench
.PHONY: instructions predicted-cycles lint types cuda-objects cuda-objects-where-nvcc sass gpu-build gpu-check gpu-bench build clean

PYTHON ?= python3
OUT ?= build/gpu
VENV := .venv
INTEGRATIONS := .venv-integrations
CUDA_HOST := .venv-cuda-host
FUZZ := .venv-fuzz
MINUTES ?= 5
PY := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/environment.stamp
BUILT := $(VENV)/built.stamp
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(NATIVE) $(shell find tests benchmarks -name '*.h' -o -name '*.cpp')
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

# Two processes side by side, each of which takes one core: the longest parts first, so that both end at about the same
# time, with and without nvcc. The output of each part comes at its end.
PARTS := ops training build collapse
test: $(BUILT)
	$(MAKE) -k -j2 -O --no-print-directory test-ops test-training cuda-objects-where-nvcc test-build test-rest \
	  test-collapse types lint

$(PARTS:%=test-%): test-%: $(BUILT)
	VAEKERNELS_REQUIRE_NATIVE=1 $(PY) -m pytest tests/$*

test-rest: $(BUILT)
	VAEKERNELS_REQUIRE_NATIVE=1 $(PY) -m pytest $(PARTS:%=--ignore=tests/%)

# An environment that uses the packages of $(VENV), so that torch is not installed twice and $(VENV) stays
# without these libraries.
define on-top
	$(PY) -m venv --clear $(1)
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir({!r})".format(sysconfig.get_path("purelib")))' \
	  > $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(1)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt $(2)
endef

$(INTEGRATIONS)/environment.stamp: $(ENVIRONMENT)
	$(call on-top,$(INTEGRATIONS),diffusers lightning monai pyro-ppl pythae scvi-tools torchrl)
	touch $@

test-integrations: $(BUILT) $(INTEGRATIONS)/environment.stamp
	VAEKERNELS_REQUIRE_NATIVE=1 VAEKERNELS_REQUIRE_INTEGRATIONS=1 \
	  $(INTEGRATIONS)/bin/python -m pytest -m 'slow or not slow' tests/integrations \
	  tests/build/test_docs.py::test_before_and_after

# PEERS: a folder with checkouts of the libraries. Their code stays there; nothing is fetched but what
# test-integrations installs.
test-peers: $(BUILT) $(INTEGRATIONS)/environment.stamp
	$(INTEGRATIONS)/bin/python tests/peers/run.py $(PEERS)

# Without constraints.txt: the newest torch, whose build for Linux has CUDA where nothing else is asked for.
$(CUDA_HOST)/environment.stamp:
	$(PYTHON) -m venv --clear $(CUDA_HOST)
	$(CUDA_HOST)/bin/python -m pip install --disable-pip-version-check -q torch numpy setuptools pytest pytest-timeout
	touch $@

test-cuda-host: $(CUDA_HOST)/environment.stamp
	$(CUDA_HOST)/bin/python tests/cuda_host

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

cuda-objects-where-nvcc: $(ENVIRONMENT)
	if $(PY) vaekernels/_build.py nvcc; then $(MAKE) cuda-objects; else echo 'no nvcc: cuda-objects is left out'; fi

sass: $(ENVIRONMENT)
	$(PY) benchmarks/codegen/sass.py

check-slow: $(BUILT)
	VAEKERNELS_REQUIRE_NATIVE=1 $(PY) -m pytest -m slow

# -W: a broken link or reference is an error.
docs: $(BUILT)
	$(PY) -m sphinx -W --keep-going -q -E docs build/docs
	@echo build/docs/index.html

install-matrix: $(ENVIRONMENT)
	$(PY) tests/install_matrix

instructions: $(BUILT)
	$(PY) benchmarks/codegen/instruction_counts.py

predicted-cycles: $(BUILT)
	$(PY) benchmarks/codegen/predicted_cycles.py

bench: $(BUILT)
	$(PY) -m vaekernels bench --quick

# ---- on a GPU, with PYTHON's own torch ----------------------------------------------------------------------
# Each file of tests/gpu is a process of its own: one that hangs, or breaks the GPU's context, ends alone. Three
# run side by side. Every test has a limit where PYTHON has pytest-timeout; without it a test that hangs is ended
# with its whole file after LIMIT seconds, and faulthandler shows where it was. Verdicts and logs: OUT/check.
START := $(shell date +%s)
GPU_SECONDS := 530
GPU_ENV = XDG_CACHE_HOME=$(CURDIR)/build/gpu/cache PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
GPU_PARTS := $(addprefix gpu-check-,suite sanitizers \
  $(filter-out sanitizers,$(patsubst tests/gpu/test_%.py,%,$(wildcard tests/gpu/test_*.py))))
has = $(shell $(PYTHON) -c 'import $(1)' 2>/dev/null && echo yes)

# 77: nothing to build for, with the reason; the tests are then skipped.
gpu-build:
	timeout -k 5 240 $(PYTHON) benchmarks/gpu_build.py || [ $$? = 77 ]

gpu-check: gpu-build
	rm -rf $(OUT)/check
	@$(if $(call has,pytest_timeout),,echo 'no pytest-timeout: a test that hangs is ended with its whole file')
	timeout -k 5 $$(( $(START) + $(GPU_SECONDS) - $$(date +%s) )) $(MAKE) -k -j3 -O --no-print-directory $(GPU_PARTS)

gpu-check-%: LIMIT = 120
gpu-check-%: TEST_LIMIT = 60
gpu-check-%: GPU_FILES = tests/gpu/test_$*.py
gpu-check-sanitizers: LIMIT = 470
gpu-check-sanitizers: TEST_LIMIT = 130
gpu-check-suite: LIMIT = 420
gpu-check-suite: TEST_LIMIT = 200
# What the other tests need may be missing here: their modules are then named, and the rest is run.
gpu-check-suite: GPU_FILES = --device=cuda --continue-on-collection-errors tests/ops $(if $(call has,xdist),-n 8)

gpu-check-%:
	mkdir -p $(OUT)/check
	$(GPU_ENV) VAEKERNELS_REQUIRE_NATIVE=1 TORCHINDUCTOR_COMPILE_THREADS=1 timeout -k 5 $(LIMIT) \
	  $(PYTHON) -m pytest $(GPU_FILES) -q -rfEs -p no:cacheprovider --color=no \
	  --junitxml=$(OUT)/check/$*.xml -o faulthandler_timeout=$(TEST_LIMIT) \
	  $(if $(call has,pytest_timeout),--timeout=$(TEST_LIMIT) --timeout-method=thread) 2>&1 | tee $(OUT)/check/$*.log

gpu-bench: gpu-build
	mkdir -p $(OUT)/record
	$(GPU_ENV) $(PYTHON) -m vaekernels.bench --device cuda --record $(OUT)/record --csv $(OUT)/gpu-bench.csv \
	  --markdown $(OUT)/gpu-bench.md $(if $(call has,matplotlib),--plots $(OUT))
	cp $(OUT)/gpu-bench.* benchmarks/results/

clean:
	rm -rf build dist *.egg-info $(VENV) $(INTEGRATIONS) $(CUDA_HOST) $(FUZZ) .mypy_cache .pytest_cache .ruff_cache
	rm -f vaekernels/_C*.so vaekernels/_build.json
	find vaekernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
