# make quickstart | make test | make lint | make soak. Each makes .venv first: Python 3.11 or 3.12 and pip are all it needs.
# PYTHON=... chooses the interpreter. pip's own settings (PIP_INDEX_URL and others) are obeyed.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
REQUIREMENTS := $(if $(shell nvidia-smi -L 2>/dev/null),requirements.txt,requirements-cpu.txt)
BIN := .venv/bin

.PHONY: quickstart test soak lint clean
.DELETE_ON_ERROR:

quickstart: .venv/run-ready
	$(BIN)/python -m fast_ft recipes/quickstart.yaml

test: lint
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

# Hours: kill tests at 40 moments and of the quickstart, then an hour of fuzzing.
soak: .venv/test-ready
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-soak.txt
	$(BIN)/python -m pytest -m soak
	$(BIN)/python tests/fuzz.py --minutes 60

lint: .venv/test-ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/run-ready: $(REQUIREMENTS) requirements-cpu.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed, and neither was found. Set PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

.venv/test-ready: .venv/run-ready requirements-dev.txt requirements-sweep.txt requirements-ray.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
