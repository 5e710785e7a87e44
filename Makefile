# Everything starts from a virtual environment that these commands make themselves.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test check fix figures docs clean
.DEFAULT_GOAL := help

help:  ## say what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,check]'
	touch $@

demo: $(READY)  ## probe, compare and report on the embedded models, offline
	$(BIN)/attnbias probe -m demo:vit-p16 -m demo:vit-p8 -m demo:vit-p4 --images demo -o runs/demo-vision --overwrite
	$(BIN)/attnbias probe -m demo:lm --texts demo -o runs/demo-language --overwrite
	$(BIN)/attnbias compare runs/demo-vision -o runs/demo-comparison
	$(BIN)/attnbias report runs/demo-vision runs/demo-language -o runs/demo-report.html
	@echo
	@echo "figures: runs/demo-vision/figures and runs/demo-language/figures; a page to open: runs/demo-report.html"

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(READY)  ## mend what can be mended by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(READY)  ## draw every figure and table of the embedded models, under figures/
	$(BIN)/attnbias figures configs/demo.yaml -o figures

docs: $(READY)  ## write the tables of docs/metrics.md; check that the commands in README and docs are real
	$(BIN)/python -m tools.metrics_page
	$(BIN)/python -m pytest tests/test_docs.py

clean:  ## remove the virtual environment and runs
	rm -rf $(VENV) runs figures
