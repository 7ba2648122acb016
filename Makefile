# Two commands do all set-up on a machine that has only Python and pip: make demo, make test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN ?= runs/demo

.PHONY: demo test check lab constraints clean

demo: $(INSTALLED)  ## distil the lab's student with and without the gate, and write runs/demo/report.html
	$(BIN)/opd demo $(RUN)

test: check  ## lint, types, tests
	$(BIN)/pytest --numprocesses 2 --dist worksteal

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

lab: $(INSTALLED)  ## train the lab's two models from nothing, about 20 minutes on two cores
	$(BIN)/opd lab --out opd_jax/lab/models

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

constraints: $(INSTALLED)  ## print what is installed here, for constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .jax_cache
