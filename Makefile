# Every target sets up what it needs: Python 3.11+, a C compiler and make are enough.
PYTHON ?= python3
VENV   ?= .venv
SF     ?= 0.1

py     := $(VENV)/bin/python
pip    := $(py) -m pip install --disable-pip-version-check
ready  := $(VENV)/.ready
twin   := tests/unit tests/property tests/concurrency tests/isolated tests/flight tests/distributed
# Minutes of random input and whole benchmarks: they ask nothing of the cache that it is not asked
# elsewhere, and coverage, which slows them by half, has few lines from them alone.
long   := $(patsubst %,tests/distributed/test_%.py,\
	random_sql random_joins sql_features tpch fuzz worker_memory)
rest   := $(long:%=--deselect %)
# In these no cache is made, by them or by their workers; and the command line, whose options,
# output and signals are the same on both. CI leaves them out of the twin's run; make test does not.
alike  := $(patsubst %,tests/unit/test_%.py,guard imports packaging) \
	$(patsubst %,tests/flight/test_%.py,\
	aio_cancellation basic_authentication exchange presets server_process service_clients \
	tls_failures) \
	$(patsubst %,tests/distributed/test_%.py,\
	batches cluster_start exchange inputs loops plan_proto planner repeatable scheduler sql_command \
	stage task task_pool wire worker_tls)
pytest := $(py) $(if $(COVERAGE),-m coverage run) -m pytest

.DEFAULT_GOAL := help
.PHONY: help run test test-compiled test-twin tpch bench check coverage covered uncovered sanitize free-threaded stress clean

help:            ## what there is
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(ready)    ## the main job: a local cluster, TPC-H distributed, plan, result, statistics
	$(py) -m resolver demo --scale-factor $(SF)

test: $(ready)   ## all tests, on the compiled cache and on its Python twin
	@$(MAKE) --no-print-directory test-compiled
	@$(MAKE) --no-print-directory test-twin

test-compiled: $(ready)
	@echo "== the compiled cache"
	RESOLVER_BACKEND=compiled $(pytest) $(PYTEST)

test-twin: $(ready)
	@echo "== its Python twin"
	RESOLVER_BACKEND=python CACHES=python $(pytest) $(twin) $(rest) $(PYTEST)

coverage: $(ready) ## the same in less time, with line and branch coverage of the Python modules
	rm -f .coverage .coverage.*
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target covered uncovered
	$(py) -m coverage combine -q
	$(py) -m coverage report

covered: $(ready)
	@$(MAKE) --no-print-directory test-compiled COVERAGE=1 PYTEST="$(rest) $(PYTEST)"

uncovered: $(ready)
	@echo "== the compiled cache, the long tests"
	RESOLVER_BACKEND=compiled $(pytest) $(long) $(PYTEST)
	@$(MAKE) --no-print-directory test-twin PYTEST="$(alike:%=--deselect %) $(PYTEST)"

tpch: $(ready)   ## all 22 TPC-H queries, distributed beside single-node, checked (SF=1)
	$(py) -m benchmarks.tpch --scale-factor $(SF)

bench: $(ready)  ## one table: the resolver, every peer, every target
	sh tools/free-threaded -m benchmarks.scaling --json > $(VENV)/free-threaded.json
	$(py) -m benchmarks --free-threaded $(VENV)/free-threaded.json

check: $(ready)  ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

sanitize: $(ready) ## unit and concurrency tests under AddressSanitizer and UBSan
	sh tools/sanitize $(abspath $(py))

free-threaded:   ## the resolver's tests on a free-threaded interpreter, where there is one
	sh tools/free-threaded

stress: $(ready) ## concurrency and property tests, for longer
	HYPOTHESIS_PROFILE=stress $(py) -m pytest tests/concurrency tests/property $(PYTEST)

$(ready): pyproject.toml setup.py constraints.txt resolver/_cache.pyx resolver/_cache.pxd \
		resolver/_platform.h resolver/aio/_hits.pyx resolver/aio/_hits.h
	@echo "== setting up $(VENV): a minute or two, once"
	@test -x $(py) || $(PYTHON) -m venv $(VENV)
	@{ $(pip) --upgrade 'pip>=25.3' && \
		$(pip) --constraint constraints.txt --build-constraint constraints.txt \
			--group dev --editable '.[all]'; } >$(VENV)/install.log 2>&1 \
		|| { cat $(VENV)/install.log; exit 1; }
	@touch $@

clean:           ## remove what was built
	rm -rf $(VENV) .venv-3.* build dist *.egg-info resolver/_cache.c resolver/*.so
