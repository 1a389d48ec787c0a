# All developer commands. Needs make and Python 3.11 or newer; everything else that a target needs
# is installed into .venv the first time, in the releases listed in tools/locked/.
#
#     make test ARGS="-k softmax"        ARGS is passed to the program that the target runs
#     make test PYTHON=python3.13        the Python for .venv, used once to make it
#     make test TORCH_INDEX=URL          where PyTorch comes from, if not from PyPI (see README)

PYTHON ?= python3
PY := .venv/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL: # two pips must not write into the same .venv
.PHONY: help venv need-npm demo bench test lint format types docs docs-serve check-site print \
  check-planted fuzz fuzz-guided interrupts mutation coverage clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

# Installing ------------------------------------------------------------------------------------

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pvt_ref needs Python 3.11 or newer, and '$(PYTHON)' is not one ($$($(PYTHON) --version 2>&1)). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@$(PYTHON) -m venv .venv

# One stamp for each extra; newer lists make pip run again. Files are verified by their hashes, then
# the project is installed. PyTorch has no hash there, because its builds differ. pip's output is
# stored, and shown if it fails.
PIP := $(PY) -m pip --disable-pip-version-check install --progress-bar off
TORCH := $(PIP) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
.venv/.stamp-%: tools/locked/%.txt pyproject.toml constraints.txt | .venv/bin/pip
	@echo "Installing the extra '$*' into .venv (the first time, this takes a few minutes) ..."
	@{ $(PIP) --require-hashes -r $< $(if $(filter test bench site coverage fuzz,$*),&& $(TORCH)) && \
	  $(PIP) --no-deps --no-build-isolation -e .; } >.venv/install-$*.log 2>&1 || { \
	  cat .venv/install-$*.log >&2; exit 1; }
	@touch $@

venv: .venv/bin/pip ## an empty .venv, into which you can install your own PyTorch

# The documentation's npm packages, in the releases that package-lock.json names.
NPM := docs/tools/node_modules/.package-lock.json
need-npm: # checked before pip runs for minutes
	@command -v npm >/dev/null || { \
	  echo "The documentation needs npm, which comes with Node.js: https://nodejs.org" >&2; exit 1; }
$(NPM): docs/tools/package.json docs/tools/package-lock.json
	@npm ci --prefix docs/tools --no-audit --no-fund --loglevel=error
	@touch $@

# Using -----------------------------------------------------------------------------------------

demo: .venv/.stamp-examples ## runs two PVTs on a photo; writes pyramid.png and segmentation.png
	@$(PY) examples/forward.py $(ARGS)
	@echo "Next: '. .venv/bin/activate', then 'python -m pvt_ref segment .venv/lib/python3*/site-packages/sklearn/datasets/images/china.jpg', or your own photo; classify names what it shows"

bench: .venv/.stamp-bench ## times everything against PyTorch and others on this CPU; about an hour
	@$(PY) benchmarks/cpu.py $(ARGS)

# Checking --------------------------------------------------------------------------------------

# small chunks keep the order of tests/conftest.py: layers first
PYTEST := -m pytest -n auto --maxprocesses 8 --maxschedchunk 4
test: .venv/.stamp-test ## all tests; those that compute run with the kernels and the readable layers
	@$(PY) $(PYTEST) $(ARGS)

# one test is left out: coverage holds a lock of its own, which an interrupt would leave held
coverage: .venv/.stamp-coverage ## all tests, with the lines and branches that none of them runs
	@$(PY) -m coverage erase
	@$(PY) -m coverage run $(PYTEST) --deselect \
	  tests/test_interrupts.py::test_a_hundred_interrupts_at_random_moments $(ARGS)
	@$(PY) -m coverage combine --quiet && $(PY) -m coverage json --quiet -o build/coverage.json
	@$(PY) tools/coverage_floors.py build/coverage.json

lint: .venv/.stamp-lint ## checks formatting and style
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .

format: .venv/.stamp-lint ## fixes formatting and everything else that ruff can fix
	@.venv/bin/ruff check --fix --exit-zero --quiet .
	@.venv/bin/ruff format .

types: .venv/.stamp-lint .venv/.stamp-test .venv/.stamp-docs ## checks static types, of the package by strict rules
	@.venv/bin/pyright --pythonpath $(PY) $(ARGS)

# The date is the commit's, so that two builds have the same bytes.
MKDOCS := SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 0) \
  NO_MKDOCS_2_WARNING=1 PYTHONPATH=docs/tools .venv/bin/mkdocs

docs: need-npm .venv/.stamp-docs $(NPM) ## builds the documentation as a site in site/
	@$(MKDOCS) build --strict

docs-serve: need-npm .venv/.stamp-docs $(NPM) ## serves the documentation locally, rebuilt at every change
	@$(MKDOCS) serve --strict $(ARGS)

check-site: need-npm .venv/.stamp-docs .venv/.stamp-site $(NPM) ## builds site/ twice and checks every page in Chromium or Chrome
	@again=$$(mktemp -d) && trap 'kill $$second 2>/dev/null; rm -rf "$$again"' EXIT && \
	  { $(MKDOCS) build --quiet --site-dir "$$again" & second=$$!; } && \
	  $(MKDOCS) build --strict && wait $$second && \
	  SITE_AGAIN="$$again" $(PY) -m pytest tests/check_site.py tests/check_recall.py \
  tests/check_notebooks.py tests/check_try.py -n auto --maxprocesses 4 $(ARGS)

print: need-npm .venv/.stamp-site docs ## the course as one PDF, print/course.pdf; needs Chromium or Chrome
	@$(PY) docs/tools/print_course.py $(ARGS)

# Checking the tests (hours, not minutes) -------------------------------------------------------

check-planted: .venv/.stamp-test ## plants known mistakes one at a time; do the tests notice?
	@HYPOTHESIS_PROFILE=mutation $(PY) tests/planted_bugs/run.py $(ARGS)

fuzz: ARGS ?= --count 100000 --seed 0
fuzz: .venv/.stamp-test ## reads 100,000 damaged weights files of each kind
	@$(PY) tests/fuzz_checkpoints.py $(ARGS)

fuzz-guided: ARGS ?= -max_total_time=60
fuzz-guided: .venv/.stamp-fuzz ## fuzzes each reader of files, guided by coverage
	@for reader in pickle legacy safetensors config picture; do \
	  echo "$$reader" && $(PY) tests/fuzz_atheris.py $$reader $(ARGS) || exit 1; done

interrupts: ARGS ?= --count 5000 --seed 0
interrupts: .venv/.stamp-test ## sends Ctrl-C 5,000 times at random moments; is all as before?
	@$(PY) tests/interrupt_campaign.py $(ARGS)

mutation: .venv/.stamp-test .venv/.stamp-mutation ## mutates the layers line by line; do the tests notice?
	@PVT_REF_OPS=reference HYPOTHESIS_PROFILE=mutation .venv/bin/mutmut run $(ARGS)
	@.venv/bin/mutmut results | grep -v ': not checked' || echo "no mutant survived"

# Cleaning --------------------------------------------------------------------------------------

clean: ## removes build outputs and caches; keeps .venv
	@rm -rf site print build dist mutants pyramid.png segmentation.png .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis
	@find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## removes .venv too
	@rm -rf .venv docs/tools/node_modules
