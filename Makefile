# Every target sets up what it needs in a fresh clone; `make help` lists them.
# PYTHON picks the interpreter (3.10 to 3.13), VENV the folder of the virtual environment, WORKERS how many tests run at
# the same time.
PYTHON ?= python3
WORKERS ?= 3
VENV ?= .venv
REFERENCE ?= .venv-reference
NVFLARE ?= .venv-nvflare
SOURCES = nnunetv2 tests benchmarks demo documentation setup.py
PYTEST = $(VENV)/bin/python -m pytest --durations=15

# Tests start hundreds of processes: whatever the environment says, let them share what Python has compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test quick coverage parity reference engine nvflare federation-matrix lint format typing-baseline clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 25

# torch comes first: with its CPU build in place nothing asks for the CUDA packages.
$(VENV)/.installed: setup.py constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[dev]"
	touch $@

$(REFERENCE)/.installed: constraints-cpu.txt
	$(PYTHON) -m venv $(REFERENCE)
	$(REFERENCE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt torch nnunetv2==2.8.1
	touch $@

# The engine's own requirements, Flask and gRPC among them, stay out of the environment that everything else is tested in.
$(NVFLARE)/.installed: setup.py constraints-cpu.txt
	$(PYTHON) -m venv $(NVFLARE)
	$(NVFLARE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt torch
	$(NVFLARE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[nvflare]"
	$(NVFLARE)/bin/python -m pip check
	touch $@

demo: $(VENV)/.installed  ## three sites train one model on phantom scans; SECURE=1: behind masks
	$(VENV)/bin/python -m demo $(if $(SECURE),--secure)

test: $(VENV)/.installed $(REFERENCE)/.installed $(NVFLARE)/.installed lint  ## lint, and all tests: twenty minutes
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile

# Many of these tests wait for a moment; a third worker fills it.
quick: WORKERS = 4
quick: $(VENV)/.installed  ## the tests that a change should pass while it is being made: two minutes
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow and not parity and not engine"

# A target of its own, since tracing costs half of the time again.
coverage: $(VENV)/.installed  ## the quick tests, and the share of lines that they run
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow and not parity and not engine" --cov --cov-report=term:skip-covered

parity: $(VENV)/.installed $(REFERENCE)/.installed  ## the comparison with the reference release
	$(PYTEST) tests/parity

reference: $(REFERENCE)/.installed  ## the virtual environment of the reference release

engine: $(VENV)/.installed $(NVFLARE)/.installed  ## federations on a network of NVIDIA FLARE, on the loopback interface: four minutes
	OMP_NUM_THREADS=1 $(PYTEST) -m engine

nvflare: $(NVFLARE)/.installed  ## the virtual environment of NVIDIA FLARE

# `make test` runs fewer of each.
federation-matrix: $(VENV)/.installed  ## crashes, cut networks and invented requests in full number: half an hour
	NNUNET_FED_MATRIX=full OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -s \
		tests/federated/system/test_crash_matrix.py tests/federated/system/test_network_cuts.py tests/federated/system/test_fuzz.py

lint: $(VENV)/.installed  ## rules, format, directions of imports, types
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python tests/lint/typing_baseline.py

format: $(VENV)/.installed  ## mend what ruff can mend
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

typing-baseline: $(VENV)/.installed  ## note that mypy finds fewer errors than before
	$(VENV)/bin/python tests/lint/typing_baseline.py --update

clean:  ## remove what these targets made
	rm -rf $(VENV) $(REFERENCE) $(NVFLARE) demo-output build .coverage* .mypy_cache .import_linter_cache *.egg-info
