# Every target makes .venv and installs into it if that has not been done since settings.ini or setup.py last changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV ?= .venv
README ?= README.md
# Threads that wait sleep: on a busy machine, spinning ones make a run several times longer.
export OMP_WAIT_POLICY ?= PASSIVE
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-long one check newest faults test-browser bench lab docs sync readme clean

help: ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(STAMP) ## make .venv and install the kit into it
	@echo "$(VENV) is ready"

$(STAMP): settings.ini setup.py
	@echo "== installing into $(VENV): some minutes and about 6 GB the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## train on scribbles, compare with plain training; results in runs/quickstart
	@$(BIN)/spml_run quickstart --out runs/quickstart

test: $(STAMP) ## run every notebook, and every test but the long ones
	@echo "== notebooks (nbdev_test); lessons run among the tests"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py
	@echo "== tests (pytest)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder -m 'not browser and not long' tests

test-long: $(STAMP) ## the whole commands that `make test` leaves out for the sake of time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n 2 -m long tests

one: $(STAMP) ## NB=50_relations: run one notebook, and the tests of its module
	@OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py $(NB)

check: $(STAMP) ## what ruff and the project's own rules find
	@$(BIN)/ruff check --quiet .
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_project.py

NEWEST := build/newest
newest: $(STAMP) ## train and predict a tiny run beside the newest fastai, which the notebook tools do not know yet
	@rm -rf $(NEWEST) && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(NEWEST) fastai fastcore fastprogress fasttransform plum-dispatch
	@PYTHONPATH=$(NEWEST) $(BIN)/python -W ignore -c 'import fastai, fastcore; print("fastai", fastai.__version__, "fastcore", fastcore.__version__)'
	@PYTHONPATH=$(abspath $(NEWEST)) PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 $(BIN)/spml_run quickstart --profile tiny --out $(NEWEST)/run

faults: $(STAMP) ## kill, fill the disk, spoil files, at length: what was tried, held and failed in the last line
	@FAULTS=long OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rfEs -q tests/test_faults.py

test-browser: $(STAMP) ## the widgets in JupyterLab in a real browser; needs Chromium and its driver
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m browser tests/look/test_browser.py

bench: $(STAMP) ## time the kit against straightforward forms, and how its cost grows; tables and plots in benchmarks/
	@PYTHONWARNINGS=ignore $(BIN)/python benchmarks/speed.py
	@PYTHONWARNINGS=ignore $(BIN)/python benchmarks/growth.py
	@PYTHONWARNINGS=ignore $(BIN)/python benchmarks/folders.py

lab: $(STAMP) ## open JupyterLab on the tutorials
	@$(BIN)/jupyter lab --ServerApp.root_dir=nbs --LabApp.default_url=/lab/tree/tutorials

docs: $(STAMP) ## build the website in _docs, offline, and check its links
	@$(BIN)/python site/build.py

sync: $(STAMP) ## after editing notebooks: export the library, clean the notebooks, write README.md
	@$(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level ERROR nbs/index.ipynb
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export
	@$(MAKE) --no-print-directory readme

# Links in the notebook are relative to nbs/; README.md lies one folder above.
readme:
	@$(BIN)/jupyter nbconvert --to markdown --no-input --stdout --log-level ERROR nbs/index.ipynb \
	| sed -E 's#\]\(([a-z]+/)#](nbs/\1#g; s#\]\(\.\./#](#g' | cat -s > $(README).part
	@mv $(README).part $(README)

clean: ## remove what was built, except .venv and runs
	@rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	@find nbs spml_kit tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
