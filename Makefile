# Two commands set everything up by themselves: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow bench-gpu lint format clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# The build warns that a folder named like the package could shadow it: here that folder is the package.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/ready  ## tune a classifier of support messages, reload it with plain transformers; SEED=N for others
	$(BIN)/python examples/demo.py $(if $(SEED),--seed $(SEED))

test: $(VENV)/ready  ## the default suite, in parallel
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: $(VENV)/ready  ## the slower cases
	$(BIN)/python -m pytest -m slow --numprocesses auto --dist loadscope

bench-gpu: $(VENV)/ready  ## an hour on one NVIDIA GPU: benchmarks/results/gpu and docs/gpu.md
	$(BIN)/python -m benchmarks.gpu run
	$(BIN)/python -m benchmarks.gpu docs

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info demo-run
