# `make run` and `make test` do the set-up that they need; both are quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# An interpreter named on the command line replaces an environment made from another one.
ifneq ($(origin PYTHON),file)
ifneq ($(PYTHON),$(shell cat $(VENV)/.python 2>/dev/null))
.PHONY: $(READY)
CLEAR := --clear
endif
endif

# Tests run in one process per core, which TEST_PROCESSES changes; 0 runs them in pytest's own process.
# Each computes and compiles in one thread. Where a test asks for more, those that wait leave the cores to others.
TEST_PROCESSES ?= auto
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TORCHINDUCTOR_COMPILE_THREADS=1 \
	$(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=worksteal

.PHONY: run test test-all test-long test-arm lint format docs wheel table compat gpu gpu-correct gpu-speed gpu-why gpu-prepare size clean

run: $(READY)
	$(BIN)/esper-train grow

test: lint
	$(PYTEST) -m "not slow and not long" --durations=10

test-all: test
	$(PYTEST) -m "slow and not long" --durations=10

# By hand and before a release: every value instead of a sample, with the figures that these tests print.
test-long: $(READY)
	$(PYTEST) -m long -rP

# The CPU kernels on aarch64, in an emulator. On Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static
test-arm: $(READY)
	$(BIN)/python -m pytest tests/kernels/test_arm.py -rs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files csrc 'tests/*.cpp' 'tests/*.h' 'benchmarks/*.cpp')

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files csrc 'tests/*.cpp' 'tests/*.h' 'benchmarks/*.cpp')

# The documentation as pages in build/docs, which open without a server or a network.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A wheel for other Linux machines, with CUDA kernels if a toolkit is installed. auditwheel tags it with
# the oldest system that it runs on and shows why. Libraries of torch and of the driver stay out of it.
# ARCH=aarch64 cross-compiles the CPU kernels. On Debian: apt-get install g++-aarch64-linux-gnu
ARCH ?= $(shell uname -m)
wheel: $(READY)
	rm -rf build/wheel build/lib.* build/bdist.* && mkdir -p build/wheel
	PATH="$(abspath $(BIN)):$$PATH" ESPER_ARCH=$(ARCH) \
		FORCE_CUDA=$${FORCE_CUDA-$$(PATH="$$CUDA_HOME/bin:$$PATH" command -v nvcc >/dev/null && test $(ARCH) = $$(uname -m) && echo 1)} \
		$(BIN)/python -m pip wheel -v --no-build-isolation --no-deps -w build/wheel . >build/wheel.log 2>&1 \
		|| { tail -n 30 build/wheel.log; exit 1; }
	@grep -m1 'esper-kernels: ' build/wheel.log
	rm -rf dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair -w dist --allow-pure-python-wheel \
		--exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda.so.*' build/wheel/*.whl
	$(BIN)/python -m auditwheel show --allow-pure-python-wheel dist/*.whl

table: $(READY)
	$(BIN)/python -m benchmarks growth

# By hand: downloads every minor release of torch from 2.10 on and of Triton from 3.5 on, one at a time.
# docs/clusters.md has the table.
compat: $(READY)
	$(BIN)/python -m benchmarks compat

# The first half hour on a GPU, in parts of at most ten minutes; see docs/gpu.md. Any Python with torch will do.
GPU_SESSION = $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks gpu_session
gpu:
	$(GPU_SESSION) correct speed why
gpu-correct gpu-speed gpu-why: gpu-%:
	$(GPU_SESSION) $*

# What a GPU machine without a package index needs: kernels for Hopper, and pure-Python packages.
gpu-prepare: $(READY)
	TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST-9.0} FORCE_CUDA=1 $(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	rm -rf build/gpu
	$(BIN)/python -m pip install --no-deps --no-compile --only-binary=:all: --target build/gpu \
		liger-kernel tyro docstring-parser typeguard

size:
	@printf '%-14s %5d lines\n' csrc $$(find csrc -type f -exec cat {} + | wc -l)
	@for package in esper_kernels esper_train; do \
		printf '%-14s %5d lines, %5d without blank lines and comments\n' $$package \
			$$(find $$package -name '*.py' -exec cat {} + | wc -l) \
			$$(find $$package -name '*.py' -exec cat {} + | grep -cv '^ *\(#.*\)\?$$'); done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache esper_kernels/lib esper_kernels/*.so tests/helpers/*.so

# Where that torch is, since the packages of a virtual environment are not those of the system.
FIND_TORCH := 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])'
OWN_PACKAGES := 'import sysconfig; print(sysconfig.get_path("purelib"))'

# If PYTHON already has torch, that torch is used; otherwise the pinned one is installed.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		echo "using the torch of $(PYTHON)"; \
		$(PYTHON) -m venv $(CLEAR) --system-site-packages $(VENV); \
		$(PYTHON) -c $(FIND_TORCH) > $$($(BIN)/python -c $(OWN_PACKAGES))/torch.pth; \
		grep -v -e '^torch=' -e '^triton=' constraints.txt > $(VENV)/constraints.txt; \
	else \
		$(PYTHON) -m venv $(CLEAR) $(VENV) && cp constraints.txt $(VENV)/constraints.txt && \
		$(BIN)/python -m pip install -c constraints.txt torch; \
	fi
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt setuptools ninja pybind11
	ESPER_TESTING=1 $(BIN)/python -m pip install -c $(VENV)/constraints.txt --no-build-isolation -e '.[train,text,dev]'
	@echo '$(PYTHON)' > $(VENV)/.python
	@touch $@
