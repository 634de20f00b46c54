# Two commands do everything: `make demo` and `make test`. Each makes the environment it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := store/demo

.PHONY: help env demo test lint format slow train clean

help: ## Show the commands.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

env: $(READY) ## Make the environment.

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "editctl needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## Edit the built-in model with specs/*.toml, show it, undo it.
	@BIN=$(BIN) STORE=$(DEMO) sh docs/demo.sh

lint: $(READY) ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## Lint, then every test but the slow ones.
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not slow and not timing"
	$(BIN)/python -m pytest -m timing

slow: $(READY) ## The slow tests: studies, training, hundreds of kills and histories, thousands of hostile inputs.
	$(BIN)/python -m pytest -m slow

format: $(READY) ## Rewrite the code in the house style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(READY) ## Train the built-in model anew into build/atlas.
	$(BIN)/python -m editctl.atlas.train --out build/atlas

clean: ## Remove the environment and what the demo made.
	rm -rf $(VENV) $(DEMO) build
