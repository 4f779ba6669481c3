# kv4: set-up, demo and tests from a clean clone. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

# The same compiler names in every build, so that ccache hits. Make's own defaults are cc and g++.
ifeq ($(origin CC),default)
  CC := gcc
endif
export CC CXX
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Sources of the compiled module. Python files are used in place and need no reinstall.
CORE := CMakeLists.txt pyproject.toml $(shell find cmake include src python/bindings -type f 2>/dev/null)
# Directories change when a file is added or removed.
CORE += $(shell find include src python/bindings -type d 2>/dev/null)
FORMATTED := '*.h' '*.cpp' '*.inl' '*.c' '*.cu' '*.cuh'

# Each step uses all processors.
.NOTPARALLEL:
.PHONY: help setup system demo test test-cpp test-python test-slow fuzz soak test-isas test-oldest test-newest site site-version test-neon test-metal test-tools setup-vllm test-vllm metal-tools llama test-llama test-llama-slow check lint format asan tsan shared bench wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make setup    system packages, .venv with kv4 installed"
	@echo "make demo     setup, then text from a real model with its own cache and with kv4, side by side"
	@echo "make test     setup, then every test: C++, Python, guideline checks, Arm under qemu"
	@echo "make test-cpp | test-python | test-neon | check      one of them; test-metal: the Metal tests of the first two"
	@echo "make test-slow      every causal model class of transformers, tiny, against its own cache"
	@echo "make setup-vllm     vLLM for CPUs with kv4 as its plug-in, in .venv-vllm;  make test-vllm: its tests"
	@echo "make llama    libggml-kv4.so, for a llama.cpp that is built once beside it, in build/llama;  make test-llama: its tests"
	@echo "make test-llama-slow   those of larger models, 1.5 billion weights the largest"
	@echo "make asan | tsan      the C++ tests under AddressSanitizer with UndefinedBehaviorSanitizer, or ThreadSanitizer"
	@echo "make shared   libkv4.so, programs in C and C++ against the installed one, and what it exports"
	@echo "make fuzz     the fuzz targets, FUZZ_SECONDS each (30), and mutated files;  make soak: SOAK_OPERATIONS random calls (two millions)"
	@echo "make test-isas      the C++ tests on each instruction set that this machine runs, and on older processors in emulation"
	@echo "make test-oldest    the tests of kv4.hf and the command with the oldest versions that they take"
	@echo "make test-newest    the same tests with the newest versions that a package index has"
	@echo "make bench    the C++ benchmarks, built;  make site: the documentation as a site, in build/site"
	@echo "make site-version   that site as version SITE_VERSION (main) beside others, on the branch gh-pages"
	@echo "make lint     check, and clang-tidy over src/;  make format    clang-format and ruff"
	@echo "make wheel    a wheel in dist/;  make clean    removes build/"

setup: $(VENV)/.kv4

$(VENV)/.system: scripts/setup_system.sh
	@PYTHON=$(PYTHON) bash scripts/setup_system.sh build
	@mkdir -p $(VENV) && touch $@

$(VENV)/.python: requirements.txt requirements-build.txt | $(VENV)/.system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "PYTHON: expected Python >= 3.10; got $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-build.txt
	@touch $@

# Separate, so that `make demo` does not install them.
$(VENV)/.tests: requirements-dev.txt $(VENV)/.python
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

# The build folder of the compiled module. The C++ tests link its object files, and so does a wheel.
MODULE := build/module
$(VENV)/.kv4: $(VENV)/.python $(CORE)
	$(BIN)/python -m pip install --quiet --no-build-isolation -C build-dir=$(MODULE) --editable '.[tools]'
	@touch $@

demo: setup
	$(BIN)/kv4 demo

test: setup test-cpp test-python check test-neon
	@echo "all tests passed"

test-tools: $(VENV)/.tests

# The Metal kernels run in an emulator; without clang 19 its tests are left out.
metal-tools: setup test-tools
	@bash scripts/setup_system.sh metal

test-metal: metal-tools
	cmake --preset release
	cmake --build --preset release
	ctest --preset release -R '^Metal' -E SeededBugs
	$(BIN)/python tests/metal/mutate.py --tests build/release/tests/metal/kv4_metal_tests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile tests/metal

# Where no GPU runs it, CUDA code is only seen to compile. Without CUDA the library is the one in the Python module.
CUDA_UNUSED = $(shell nvidia-smi -L >/dev/null 2>&1 && echo OFF || echo ON)

test-cpp: metal-tools
	cmake --preset release -DKV4_CUDA_UNUSED=$(CUDA_UNUSED) -DKV4_OBJECTS=$(MODULE)
	cmake --build --preset release
	ctest --preset release

test-python: metal-tools
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# Not part of `make test`.
test-slow: setup test-tools
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m slow tests/python

# The oldest versions that kv4.hf and the command take, in an environment of its own.
OLDEST := build/venv-oldest
OLDEST_TESTS ?= $(wildcard tests/python/test_hf_*.py tests/python/test_core*.py) tests/python/test_cli.py
test-oldest: | $(VENV)/.system
	test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -r requirements-oldest.txt
	PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" $(OLDEST)/bin/python -m pip install --quiet --no-build-isolation -C build-dir=build/oldest --editable '.[tools]'
	$(OLDEST)/bin/python -m pytest -p no:cacheprovider --numprocesses $(JOBS) --dist loadfile $(OLDEST_TESTS)

# What `pip install 'kv4[tools]'` brings today, where the bounds are open.
NEWEST := build/venv-newest
test-newest: | $(VENV)/.system
	test -x $(NEWEST)/bin/pip || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade scikit-build-core nanobind cmake ninja pytest pytest-xdist peft
	PATH="$(CURDIR)/$(NEWEST)/bin:$$PATH" $(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --no-build-isolation -C build-dir=build/newest --editable '.[tools]'
	$(NEWEST)/bin/python -m pip list
	$(NEWEST)/bin/python -m pytest -p no:cacheprovider --numprocesses $(JOBS) --dist loadfile $(OLDEST_TESTS)

# vLLM wants an older transformers: an environment of its own, with kv4 in place too.
VLLM := .venv-vllm
$(VLLM)/.vllm: scripts/setup_vllm.sh requirements-vllm.txt | $(VENV)/.system
	@bash scripts/setup_vllm.sh $(PYTHON) $(VLLM)
	@touch $@

$(VLLM)/.kv4: $(VLLM)/.vllm $(CORE)
	PATH="$(CURDIR)/$(VLLM)/bin:$$PATH" $(VLLM)/bin/python -m pip install --quiet --no-build-isolation --no-deps -C build-dir=build/vllm --editable .
	@touch $@

setup-vllm: $(VLLM)/.kv4

test-vllm: setup setup-vllm
	$(BIN)/kv4 pull gemma-3-270m > /dev/null
	$(VLLM)/bin/python -m pytest -p no:cacheprovider tests/vllm

# llama.cpp's source comes as a part of a package and is built once, outside this tree.
$(VENV)/.llama: scripts/setup_llama.sh requirements-llama.txt $(VENV)/.python
	@bash scripts/setup_llama.sh $(BIN)/python | tail -n 1 > $@.part && mv $@.part $@

llama: $(VENV)/.llama
	cmake --preset llama -DKV4_LLAMA_SOURCE="$$(cat $(VENV)/.llama)/source" -DKV4_LLAMA_LIBRARIES="$$(cat $(VENV)/.llama)/build/bin"
	cmake --build --preset llama --target ggml-kv4

test-llama: llama setup test-tools
	cmake --build --preset llama --target ggml-kv4-for-another kv4_llama_probe kv4_llama_tests kv4-load-backends
	build/llama/hosts/llama.cpp/kv4_llama_tests --gtest_brief=1
	KV4_LLAMA="$$(cat $(VENV)/.llama)" $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(LLAMA_TESTS) tests/llama

# The same on larger models.
test-llama-slow:
	$(MAKE) test-llama LLAMA_TESTS="-m slow"

test-neon: setup
	@bash scripts/setup_system.sh cross
	@if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then \
	  set -ex; cmake --preset aarch64; cmake --build --preset aarch64; ctest --preset aarch64; \
	else \
	  echo "Arm tests left out: they need g++-aarch64-linux-gnu, qemu-user and googletest"; \
	fi

check: setup test-tools
	$(BIN)/python scripts/check_guidelines.py
	$(BIN)/ruff check --quiet --output-format concise .
	@git ls-files $(FORMATTED) | xargs -P $(JOBS) -n 40 $(BIN)/clang-format --dry-run -Werror

# LINT_FILES: those of src/ that clang-tidy reads. Its version decides what it finds; clang has no OpenMP header.
LINT_FILES ?= src/*.cpp
# Not by git's own exclusions: beside them it finds nothing for a pattern inside one folder.
LINTED = git ls-files -co --exclude-standard '$(LINT_FILES)' | grep -Ev '^src/(cuda|reference)/'
lint: check
	$(BIN)/python -m pip install --quiet clang-tidy==19.1.0.1
	cmake --preset debug -B build/lint -DKV4_OPENMP=OFF -DKV4_CUDA=OFF -DKV4_BUILD_TESTS=OFF
	$(LINTED) > build/lint/files || { echo "LINT_FILES: expected files of src/; got $(LINT_FILES)" >&2; exit 1; }
	xargs -P $(JOBS) -n 1 $(BIN)/clang-tidy --quiet -p build/lint < build/lint/files

format: test-tools
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .
	git ls-files -co --exclude-standard $(FORMATTED) | xargs $(BIN)/clang-format -i

asan tsan shared: $(VENV)/.python
	cmake --preset $@
	cmake --build --preset $@
	ctest --preset $@

FUZZ_SECONDS ?= 30
fuzz: setup test-tools
	@bash scripts/setup_system.sh fuzz
	cmake --preset fuzz
	cmake --build --preset fuzz
	$(BIN)/python scripts/fuzz.py --seconds $(FUZZ_SECONDS) --jobs $(JOBS)
	KV4_FUZZ_SEED=$$(date +%s) KV4_FUZZ_TIMES=5 $(BIN)/python -m pytest -q tests/python/test_mutated_files.py

SOAK_OPERATIONS ?= 2000000
# Or tsan, or asan.
SOAK_PRESET ?= release
soak: $(VENV)/.python
	cmake --preset $(SOAK_PRESET)
	cmake --build --preset $(SOAK_PRESET) --target kv4_soak
	TSAN_OPTIONS=halt_on_error=1 build/$(SOAK_PRESET)/tests/kv4_soak --operations $(SOAK_OPERATIONS)

# scripts/test_isas.sh says on which; the tests of all that the machine has are in test-cpp too.
test-isas: setup
	@bash scripts/setup_system.sh isas
	cmake --preset release
	cmake --build --preset release --target kv4_tests
	@JOBS=$(JOBS) bash scripts/test_isas.sh build/release/tests/kv4_tests $$($(BIN)/python -c 'from kv4 import _core; print(*_core.isas())')

# Its packages are no part of the other steps.
site: setup
	$(BIN)/python -m pip install --quiet mkdocs-material
	$(BIN)/python scripts/site.py
	KV4_TITLE="$$($(BIN)/kv4 --version)" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Commits the site, beside those of other versions, to the branch gh-pages. SITE_OPTIONS: mike's, such as --push or --branch NAME
SITE_VERSION ?= main
site-version: site
	$(BIN)/python -m pip install --quiet mike==2.2.0
	KV4_TITLE="$$($(BIN)/kv4 --version)" NO_MKDOCS_2_WARNING=1 $(BIN)/mike --quiet deploy --update-aliases $(SITE_OPTIONS) $(SITE_VERSION)

bench: $(VENV)/.python
	@bash scripts/setup_system.sh bench
	cmake --preset bench
	cmake --build --preset bench

# WHEEL_OPTIONS: of the build, such as -C cmake.define.KV4_CUDA=ON
wheel: setup test-tools
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist $(WHEEL_OPTIONS) .
	$(BIN)/python -m pytest -q tests/python/test_package.py

clean:
	rm -rf build dist
