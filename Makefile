# Two targets, each does all its own set-up: Python 3.11, make and gcc are enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
THREADS ?= 2

.PHONY: demo test clean

demo: $(VENV)/.run
	$(BIN)/moesim demo

test: $(VENV)/.dev $(VENV)/.compiled
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

# numba's cache notices a change in a compiled function's own file only, not in those it calls.
SOURCES := $(shell find traces hwmodels planners moesim -name '*.py' 2>/dev/null)
$(VENV)/.compiled: $(SOURCES) | $(VENV)
	find traces hwmodels planners moesim -name '*.nb[ci]' -delete
	touch $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) moesim-demo build *.egg-info .mypy_cache .ruff_cache
