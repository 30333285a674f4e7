# Every target sets up what it needs: Python 3.11+, a C compiler and make are enough.
PYTHON ?= python3
VENV   ?= .venv
SF     ?= 0.1

py     := $(VENV)/bin/python
ready  := $(VENV)/.ready
unit   := tests/unit tests/property tests/concurrency tests/isolated
twin   := $(unit) tests/flight tests/distributed

.DEFAULT_GOAL := help
.PHONY: help run test bench check coverage sanitize free-threaded stress clean

help:            ## what there is
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(ready)    ## the main job: a local cluster, TPC-H distributed, plan, result, statistics
	$(py) -m resolver demo --scale-factor $(SF)

test: $(ready)   ## all tests, on the compiled cache and on its Python twin
	@echo "== the compiled cache"
	RESOLVER_BACKEND=compiled $(py) -m pytest $(PYTEST)
	@echo "== its Python twin"
	RESOLVER_BACKEND=python $(py) -m pytest $(twin) $(PYTEST)

bench: $(ready)  ## one table: the resolver, every peer, every target
	$(py) -m benchmarks

check: $(ready)  ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

coverage: $(ready) ## line and branch coverage of the Python modules, on both caches
	rm -f .coverage .coverage.*
	RESOLVER_BACKEND=compiled $(py) -m coverage run -m pytest -q $(PYTEST)
	RESOLVER_BACKEND=python $(py) -m coverage run -m pytest -q $(twin) $(PYTEST)
	$(py) -m coverage combine -q
	$(py) -m coverage report

sanitize: $(ready) ## unit and concurrency tests under AddressSanitizer and UBSan
	sh tools/sanitize $(abspath $(py))

free-threaded: $(ready) ## the tests that matter there, on a free-threaded interpreter
	sh tools/free-threaded

stress: $(ready) ## concurrency and property tests, for longer
	HYPOTHESIS_PROFILE=stress $(py) -m pytest tests/concurrency tests/property $(PYTEST)

$(ready): pyproject.toml setup.py constraints.txt resolver/_cache.pyx resolver/_platform.h
	@echo "== setting up $(VENV) (once)"
	@test -x $(py) || $(PYTHON) -m venv $(VENV)
	@$(py) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(py) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--group dev --editable '.[all]'
	@touch $@

clean:           ## remove what was built
	rm -rf $(VENV) build dist *.egg-info resolver/_cache.c resolver/*.so
