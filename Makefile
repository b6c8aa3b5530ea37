# Two commands set everything up on a fresh machine: `make demo` and `make test`. `make help` lists the others.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
# Compressing and serving need other versions of the same packages: an environment each.
SERVE_VENV ?= .venv-serve
SERVE_BIN = $(SERVE_VENV)/bin
# lighteval needs other versions than this package's checks of answers.
LIGHTEVAL_VENV ?= .venv-lighteval
LIGHTEVAL_BIN = $(LIGHTEVAL_VENV)/bin
# What builds wheels; small.
DIST_VENV ?= .venv-dist
DIST_BIN = $(DIST_VENV)/bin
# Threads that wait do not spin: on a machine that does other work, spinning threads stall each other.
export OMP_WAIT_POLICY = PASSIVE
TEST_PROCESSES ?= 2

.PHONY: help api demo serve-demo test test-compress test-plugin test-serve test-processors sanitize lighteval arm-tools lint schema docs results dist wheels test-dist newcomer test-matrix clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## prune the embedded reasoner and compare it with the dense model
	$(BIN)/python examples/reasoner_demo.py

serve-demo: $(VENV)/.installed $(SERVE_VENV)/.installed ## serve the pruned reasoner with `vllm serve`, ask it problems and check the answers
	test -d demo/served || $(BIN)/rac prune reasoner demo/served --recipe rac_2of4 \
		--set calibration.tokens=32768 --set traces.sampling.max_new_tokens=512 --set traces.sampling.batch_size=128 \
		--precision float32
	$(SERVE_BIN)/python examples/serve_demo.py demo/served

test: lint test-compress test-plugin ## lint and all tests of both environments but those that start vLLM's engines

# a thread per process: TEST_PROCESSES processes fill TEST_PROCESSES cores, each needs up to 6 GB
test-compress: $(VENV)/.installed ## all tests of the compressing environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

# the files that tests/conftest.py (SERVING_TESTS) lets through; named, so that no other folder's conftest.py is loaded
SERVING_TESTS = tests/vllm_plugin tests/kernels/test_plan.py tests/formats/test_words.py tests/formats/test_stored_weight.py tests/formats/test_fuzz_stored_weight.py

test-plugin: $(SERVE_VENV)/.installed ## the quick tests of the serving environment
	OMP_NUM_THREADS=1 $(SERVE_BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(SERVING_TESTS) -m "not slow"

test-serve: $(SERVE_VENV)/.installed ## all tests of the serving environment: starts vLLM's engines and servers
	$(SERVE_BIN)/python -m pytest $(SERVING_TESTS)

test-processors: $(VENV)/.installed ## numeric tests with other thread counts and instruction sets; not part of `make test`
	scripts/test_processors.sh $(BIN)/python

sanitize: $(VENV)/.installed ## random and hostile calls of the kernels under AddressSanitizer and UBSan; minutes; not part of `make test`
	$(BIN)/python -m tests.kernels.cpu.sanitize

lighteval: $(VENV)/.installed $(SERVE_VENV)/.installed $(LIGHTEVAL_VENV)/.installed ## install lighteval, and test it on a packed checkpoint; not part of `make test`
	RAC_LIGHTEVAL=$(abspath $(LIGHTEVAL_BIN))/lighteval RAC_VLLM=$(abspath $(SERVE_BIN))/vllm $(BIN)/python -m pytest -rs tests/evaluation/test_lighteval.py

arm-tools: ## what `make test` needs to run the ARM kernels too, in an emulator; Debian and Ubuntu, without root
	scripts/arm_tools.sh

lint: $(VENV)/.installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

schema: $(VENV)/.installed ## write the JSON Schemas of the recipe entries to docs/
	$(BIN)/rac schema > docs/recipe.schema.json
	$(BIN)/rac schema ReasoningAwareCalibrationModifier > docs/calibration.schema.json

docs: $(VENV)/.installed ## build the documentation site in build/site; stops at any warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

results: $(VENV)/.installed ## write the tables of results/*.json into docs/; `python -m bench --list` measures them anew
	$(BIN)/python -m bench.render
	$(BIN)/python -m bench.plot

dist: $(DIST_VENV)/.installed ## wheel (with compiled kernels where there is a compiler) and sdist in dist/
	$(DIST_BIN)/python scripts/dist.py

wheels: $(DIST_VENV)/.installed ## the wheel of this processor in dist/, built in a manylinux container; needs Docker
	$(DIST_BIN)/python -m cibuildwheel --output-dir dist

test-dist: dist ## install the wheel in fresh environments, without a compiler and without write access, and use it; 10 minutes, 6 GB
	$(DIST_BIN)/python scripts/dist_check.py dist

newcomer: ## run the commands of README.md and docs/your-model.md in a fresh clone; half an hour, 9 GB
	$(PYTHON) scripts/newcomer.py

test-matrix: $(DIST_VENV)/.installed ## test with Python 3.11 to 3.13 and both ends of every version range; an hour; ROW="3.12 newest" alone
	$(DIST_BIN)/python scripts/matrix.py $(if $(ROW),--only "$(ROW)")

api: $(VENV)/.installed ## compare the stable names (docs/support.md) with those of the newest version tag
	$(BIN)/python scripts/api.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

$(SERVE_VENV)/.installed: pyproject.toml scripts/serve_cpu_env.sh
	PYTHON=$(PYTHON) scripts/serve_cpu_env.sh $(SERVE_VENV)
	$(SERVE_BIN)/python -m pip install --quiet 'pytest>=8' 'pytest-xdist>=3.6' 'hypothesis>=6.100' 'coverage>=7.6'
	touch $@

# litellm 1.110 and xxhash 4.1 break it; it downloads this file if it is not there, whatever the task
$(LIGHTEVAL_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LIGHTEVAL_VENV)
	$(LIGHTEVAL_BIN)/python -m pip install --quiet --upgrade pip
	$(LIGHTEVAL_BIN)/python -m pip install --quiet -e . 'lighteval==0.13.0' 'litellm<1.80' 'xxhash<4' diskcache \
		'transformers>=5.15,<5.18' 'compressed-tensors>=0.19,<0.20' loguru
	touch $$(echo $(LIGHTEVAL_VENV)/lib/python3.*/site-packages/lighteval/tasks/tasks)/tinyBenchmarks.pkl
	touch $@

# --group needs pip 25.1
$(DIST_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DIST_VENV)
	$(DIST_BIN)/python -m pip install --quiet --upgrade pip
	$(DIST_BIN)/python -m pip install --quiet --group dist
	touch $@

clean: ## remove the environments and everything that was built
	rm -rf $(VENV) $(SERVE_VENV) $(DIST_VENV) build dist demo
