# Every target works on a fresh clone by itself: it makes .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test check test-slow benchmark docs ui

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("raydit needs Python 3.11 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing raydit and what it needs: about 6 GB, some minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/raydit run pipelines/recipes/digits.toml

# Two processes, each with a Ray of its own; the files of each in their usual order.
test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

benchmark: install
	$(BIN)/python tests/benchmarks/run.py $(ARGS)

docs: install
	$(BIN)/python docs/generate.py

ui: install
	$(BIN)/raydit ui
