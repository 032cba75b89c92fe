PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/ready

.PHONY: help run test lab refresh stamp clean

help:  ## show these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

run: $(READY)  ## execute all notebooks; copies and HTML pages go to build/
	$(PY) tools/notebooks.py run

test: $(READY)  ## lint, unit tests, and all notebooks against their stored outputs
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pytest

lab: $(READY)  ## open JupyterLab on the first notebook
	$(PY) -m jupyterlab --ServerApp.root_dir=. $(firstword $(sort $(wildcard notebooks/*.ipynb)))

refresh: $(READY)  ## execute all notebooks in place and clean their stored outputs
	$(PY) tools/notebooks.py refresh

stamp: $(READY)  ## write the repository's address into badges, set-up cells and README
	$(PY) tools/notebooks.py stamp

clean:  ## remove build/, caches and unpacked data; .venv stays
	rm -rf build .pytest_cache .ruff_cache data/MNIST/raw/*-ubyte data/MNIST.lock
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The set-up: once, and again when requirements.txt changes. A failed step leaves no `ready`.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + v + ". Try: make PYTHON=/path/to/a/newer/python3 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -r requirements.txt
	touch $@
