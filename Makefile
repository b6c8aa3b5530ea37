# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
# Compressing and serving need other versions of the same packages: an environment each.
SERVE_VENV ?= .venv-serve
# Threads that spin while they wait stall each other on a machine that does other work: OMP_WAIT_POLICY=PASSIVE below.

.PHONY: demo serve-demo test test-serve lint schema results clean

demo: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/reasoner_demo.py

# prunes the embedded reasoner, serves it with `vllm serve`, asks it problems over HTTP and checks the answers
serve-demo: $(VENV)/.installed $(SERVE_VENV)/.installed
	test -d demo/served || OMP_WAIT_POLICY=PASSIVE $(BIN)/rac prune reasoner demo/served --recipe recipes/rac_2of4.yaml \
		--set calibration.tokens=32768 --set traces.sampling.max_new_tokens=512 --set traces.sampling.batch_size=128 \
		--precision float32
	$(SERVE_VENV)/bin/python examples/serve_demo.py demo/served

test: $(VENV)/.installed $(SERVE_VENV)/.installed lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest
	OMP_WAIT_POLICY=PASSIVE $(SERVE_VENV)/bin/python -m pytest tests/vllm_plugin tests/kernels/test_plan.py tests/checkpoint/test_stored_weight.py \
		tests/checkpoint/test_fuzz_stored_weight.py -m "not slow"

# all of the plugin's tests, which start vLLM's engines and servers
test-serve: $(SERVE_VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(SERVE_VENV)/bin/python -m pytest tests/vllm_plugin

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the JSON Schemas of the recipe entries, published in docs/
schema: $(VENV)/.installed
	$(BIN)/rac schema > docs/recipe.schema.json
	$(BIN)/rac schema ReasoningAwareCalibrationModifier > docs/calibration.schema.json

# the figures of docs/results; takes hours on 2 cores (smollm2.py says what it needs)
results: $(VENV)/.installed
	$(BIN)/python benchmarks/pruning_time.py
	$(BIN)/python benchmarks/reasoner_table.py
	$(BIN)/python benchmarks/smollm2.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

$(SERVE_VENV)/.installed: pyproject.toml scripts/serve_cpu_env.sh
	PYTHON=$(PYTHON) scripts/serve_cpu_env.sh $(SERVE_VENV)
	$(SERVE_VENV)/bin/python -m pip install --quiet 'pytest>=8' 'hypothesis>=6.100'
	touch $@

clean:
	rm -rf $(VENV) $(SERVE_VENV) build demo
