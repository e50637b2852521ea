# Two commands set up everything they need in a fresh clone:
#   make demo    three sites plan, train and predict with one model, on phantom scans
#   make test    the test suite
# PYTHON picks the interpreter (3.10 to 3.13), VENV the folder of the virtual environment.
PYTHON ?= python3
VENV ?= .venv
REFERENCE ?= .venv-reference

.PHONY: demo test quick parity reference federation-matrix lint clean

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

demo: $(VENV)/.installed
	$(VENV)/bin/python -m demo

# Everything, the comparison with the reference release included.
test: $(VENV)/.installed $(REFERENCE)/.installed lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

# What a change should pass while it is being made.
quick: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not parity"

parity: $(VENV)/.installed $(REFERENCE)/.installed
	$(VENV)/bin/python -m pytest tests/parity

reference: $(REFERENCE)/.installed

# Crashes, cut networks and invented requests in full number: half an hour. `make test` runs fewer of each.
federation-matrix: $(VENV)/.installed
	NNUNET_FED_MATRIX=full OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -s \
		tests/federated/system/test_crash_matrix.py tests/federated/system/test_network_cuts.py tests/federated/system/test_fuzz.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check nnunetv2 tests benchmarks demo documentation setup.py
	$(VENV)/bin/ruff format --check nnunetv2 tests benchmarks demo documentation setup.py

clean:
	rm -rf $(VENV) $(REFERENCE) demo-output build *.egg-info
