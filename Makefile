# Two targets, each does all its own set-up: Python 3.11, make and gcc are enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
THREADS ?= 2

.PHONY: demo test clean

demo: $(VENV)/.run
	$(BIN)/moesim demo

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/pytest -n $(THREADS)

# The stamp files hold the installed state; a changed pyproject.toml installs again.
$(VENV)/.run: pyproject.toml | $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.run

$(VENV):
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) moesim-demo build *.egg-info .mypy_cache .ruff_cache
