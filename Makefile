# The project's commands; `make` lists them.
#
# Each one first makes the environment that it needs, in .venv. Stamps in there say which extras are installed,
# and are older than pyproject.toml or constraints.txt only when there is something to install again.

# The interpreter that .venv is made with: python3.11 where there is one, else python3.
PYTHON ?= $(shell for python in python3.11 python3; do \
	"$$python" -c pass 2>/dev/null && echo "$$python" && exit; done; echo python3)

PY := .venv/bin/python
INSTALL = $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable

# What drives a browser is installed where there is one, and the tests that need it run.
BROWSER = $(if $(and $(shell command -v chromium),$(shell command -v chromedriver)),.venv/.site)

# What other environments set must not reach into this one.
unexport PYTHONPATH PYTHONHOME PYTHONWARNINGS VIRTUAL_ENV MYPYPATH
unexport PIP_USER PIP_TARGET PIP_PREFIX
# The versions are those of constraints.txt: nobody need ask the network for newer ones, or speak of successors.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test faults docs bench bench-short pictures api-check site-check clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: .venv/.examples  ## train on real data: prints a table, writes pictures below runs/
	$(PY) examples/real_data.py
	$(PY) examples/workflow.py

test: .venv/.dev $(BROWSER)  ## all checks: ruff, mypy, pyright, the tests, the site, the API; with Chromium, in it too
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m pyright --verifytypes loopwright --ignoreexternal
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup
	$(PY) -m mkdocs build --strict
	$(PY) tests/api_check.py

faults: .venv/.dev  ## kill, damage and starve runs by the hundred, and print what was lost
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup -m faults

docs: .venv/.dev  ## build the site into site/
	$(PY) -m mkdocs build --strict

bench: .venv/.examples .venv-peers/.made  ## every benchmark, beside other trainers too; takes long; the figures and pictures of the docs
	$(PY) benchmarks/everything.py --peers .venv-peers/bin/python

bench-short: .venv/.examples .venv-peers/.made  ## the same with few rounds: some minutes; writes into build/bench
	$(PY) benchmarks/everything.py --short --peers .venv-peers/bin/python --results build/bench --pictures build/bench

api-check: .venv/.dev  ## what the public API has lost or changed since the last version
	$(PY) tests/api_check.py

pictures: .venv/.dev  ## make the pictures of the callback gallery anew, and what is generated of its cards
	$(PY) tests/gallery_pictures.py
	$(PY) tests/gallery.py

site-check: docs .venv/.site  ## look at the built site in Chromium; screenshots go into build/site-check
	$(PY) tests/site_check.py site --screenshots build/site-check

clean:  ## remove what was built and cached; the environments and runs/ stay
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# dev brings everything that examples brings.
.venv/.dev: .venv/.made pyproject.toml constraints.txt
	$(INSTALL) '.[dev]'
	@touch .venv/.examples $@

.venv/.examples: .venv/.made pyproject.toml constraints.txt
	$(INSTALL) '.[examples]'
	@touch $@

# The other trainers have an environment of their own: nobody who works on the library needs them.
.venv-peers/.made: .venv/.made benchmarks/requirements-peers.txt pyproject.toml constraints.txt
	$(PY) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
		--requirement benchmarks/requirements-peers.txt --editable .
	@touch $@

# What drives the browser. Chromium and chromium-driver are Debian's: apt-get install chromium chromium-driver
.venv/.site: .venv/.dev tests/site-check-requirements.txt
	$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt \
		--requirement tests/site-check-requirements.txt
	@touch $@

.venv/.made:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "loopwright needs Python 3.11 or newer, and $(PYTHON) is: $$("$(PYTHON)" --version 2>&1)" >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	@touch $@
