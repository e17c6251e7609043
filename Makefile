# `make vlm`, `make mllm` and `make test` work on a fresh machine with Python 3.11 or newer: each builds what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/vlm
MLLM_RUN ?= runs/mllm

.PHONY: vlm mllm test test-quick test-engines test-kill lint bench install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'hyma_mllm needs Python 3.11 or newer; set PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[zoo,quant,trackers,rivals,dev]"
	touch $@

vlm: install
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml recipes/vlm.py --run $(RUN)

mllm: install
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml recipes/mllm.py --run $(MLLM_RUN)

test: install
	$(BIN)/python -m pytest -m "not engines and not kill"

test-quick: install
	$(BIN)/python -m pytest -m "not zoo and not corpus and not slow and not distributed and not engines and not kill"

test-engines: install
	$(BIN)/python -m pip install --quiet -e ".[deepspeed]"
	$(BIN)/python -m pytest -m engines

test-kill: install
	$(BIN)/python -m pytest -m kill

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/contrastive_step.py
	$(BIN)/python benchmarks/causal_step.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
