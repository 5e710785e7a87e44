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

demo: $(READY)  ## probe the embedded models: three patch sizes and a language model, offline
	$(BIN)/attnbias probe -m demo:vit-p16 -m demo:vit-p8 -m demo:vit-p4 --images demo -o runs/demo-vision --overwrite
	$(BIN)/attnbias probe -m demo:lm --texts demo -o runs/demo-language --overwrite
	@echo
	@echo "figures: runs/demo-vision/figures and runs/demo-language/figures"

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n 2

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(READY)  ## mend what can be mended by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: demo  ## draw the figures of the embedded models again

docs: $(READY)  ## check that the commands in README and docs are real
	$(BIN)/python -m pytest tests/test_docs.py

clean:  ## remove the virtual environment and runs
	rm -rf $(VENV) runs
