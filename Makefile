# Each target sets up what it needs itself: a machine with Python 3.11, make and git is enough.
PYTHON ?= python3.11
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help venv reproduce bench test lint notebooks docs outputs faults recipes clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: .venv/ready  ## .venv with everything in it

# Without --no-compile pip translates every module of every library, a minute's work; Python itself translates those that are imported.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[suite,dev,oracles]'
	touch $@

reproduce: venv  ## train, evaluate and draw the demo suite into figures/demo/
	$(BIN)/advssl reproduce --scale demo

bench: venv  ## single parts beside the plain forms that they replace, into figures/bench/
	$(BIN)/python tools/bench.py

test: venv lint notebooks  ## all that CI runs: lint, notebooks, tests; the docs' strict build is one of these
	$(BIN)/pytest -n auto --dist loadfile

lint: venv  ## ruff and the import contract
	$(BIN)/ruff check .
	$(BIN)/lint-imports

notebooks: venv  ## every notebook runs from top to bottom
	$(BIN)/python tools/run_notebooks.py

docs: venv  ## the site, in _site/
	$(BIN)/python docs/build.py

outputs: venv  ## run every notebook and store its outputs
	$(BIN)/python tools/run_notebooks.py --store

faults: venv  ## kill the suite at twenty random moments; minutes
	$(BIN)/pytest -m faults tests/test_faults.py

recipes: venv  ## one step of every recipe of every scale for GPUs, on this processor; minutes
	$(BIN)/pytest -m recipes tests/test_recipes.py

clean:  ## remove what was built, but no runs and no figures
	rm -rf _md _site _proc build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
