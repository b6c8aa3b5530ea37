# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
# Threads that spin while they wait stall each other on a machine that does other work: OMP_WAIT_POLICY=PASSIVE below.

.PHONY: demo test lint schema results clean

demo: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/reasoner_demo.py

test: $(VENV)/.installed lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the JSON Schema of the recipe entry, published in docs/
schema: $(VENV)/.installed
	$(BIN)/rac schema > docs/recipe.schema.json

# the figures of docs/results.md; takes hours on 2 cores (smollm2.py says what it needs)
results: $(VENV)/.installed
	$(BIN)/python benchmarks/pruning_time.py
	$(BIN)/python benchmarks/reasoner_table.py
	$(BIN)/python benchmarks/smollm2.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build demo
