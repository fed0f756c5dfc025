# Everything runs in .venv, which is made when it is first needed and again when what it is made from changes.
PYTHON ?= python3
ARGS ?=

RUN := .venv/bin/python
# a test process a core; neighbouring tests stay together, since they share what is compiled or computed once
PARALLEL := -n auto --dist worksteal
# a kernel that never ends: where it was launched is printed, and its process ends
HANGS := -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train test quick bench gpu sanitize lint format clean FORCE

help:
	@echo 'make train   train a network on handwritten digits   ARGS="--hidden 500 500 --epochs 20"'
	@echo 'make test    run all tests                           ARGS="-k forward"'
	@echo 'make quick   run all but the slow ones'
	@echo 'make bench   time the kernels'
	@echo 'make gpu     on a machine with a GPU: run the GPU tests, then time the kernels   ARGS="--quick"'
	@echo 'make sanitize run the CPU kernels under sanitizers of memory, undefined behaviour and threads'
	@echo 'make lint    check style and types;  make format  put the style right'
	@echo 'make clean   remove all that was built, .venv included'
	@echo 'The first of them makes .venv and builds the extension. PYTHON=python3.12 picks the interpreter for it,'
	@echo 'FFKERNELS_BUILD=auto|cpu|cuda|none, TORCH_CUDA_ARCH_LIST="8.0;9.0" and MAX_JOBS=4 say what is built and how.'

train: .venv/built
	$(RUN) -m ffkernels train $(ARGS)

test: .venv/built
	$(RUN) -m pytest $(PARALLEL) $(ARGS)

quick: .venv/built
	$(RUN) -m pytest $(PARALLEL) -m 'not slow' $(ARGS)

gpu: .venv/installed
	@$(RUN) -m ffkernels.benchmark.gpu
	@$(MAKE) --no-print-directory .venv/built
	@failed=0; \
	$(RUN) -m pytest $(PARALLEL) --maxprocesses 8 -m gpu $(HANGS) || failed=1; \
	$(RUN) -m pytest bench/bench_suite.py --device cuda --output build/gpu $(ARGS) || failed=1; \
	exit $$failed

bench: .venv/built
	$(RUN) -m ffkernels bench $(ARGS)

sanitize: .venv/installed
	$(RUN) tests/sanitize.py $(ARGS)

lint: .venv/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(RUN) -m mypy

format: .venv/installed
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format
	.venv/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv build dist ffkernels.egg-info ffkernels/_C.abi3.so

# The package's build requirements come first: it is installed without build isolation, which would download a second
# torch. The extension is built by the next rule, where ninja finds the objects of the last build.
.venv/installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet setuptools wheel ninja torch
	FFKERNELS_BUILD=none $(RUN) -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

# Written when a setting changes or a compiler comes or goes, and only then.
COMPILERS := $(shell for name in c++ g++ clang++ nvcc; do command -v $$name; done; true)
SETTINGS := $(FFKERNELS_BUILD):$(TORCH_CUDA_ARCH_LIST):$(CUDA_HOME):$(CXX):$(COMPILERS)
.venv/settings: .venv/installed FORCE
	@test "$$(cat $@ 2>/dev/null)" = '$(SETTINGS)' || echo '$(SETTINGS)' > $@

# The folders under csrc are prerequisites too: they change when a file is removed.
.venv/built: .venv/installed .venv/settings setup.py $(shell find csrc)
	rm -f ffkernels/_C.abi3.so
	$(RUN) setup.py build_ext --inplace
	@touch $@
