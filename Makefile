# make train | test | lint | nightly | bench | test-gpu | bench-gpu | borrow | clean      options: make test ARGS="-k dialect -x"
# The first one creates $(VENV) and installs moefx into it; later ones only after pyproject.toml or constraints.txt change.

VENV ?= .venv
PYTHON ?= python3

# Always the environment's own interpreter, by path: another active environment does not matter.
PY := $(abspath $(VENV))/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.moefx-installed
BORROWED := $(VENV)/.moefx-borrowed
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

# Everything a wheel is built from.
SOURCES := pyproject.toml LICENSE $(wildcard README.md) moefx passes kernels models
CHECKED := $(abspath $(VENV))/checked-wheel

.PHONY: help venv borrow gpu-venv train test test-gpu lint nightly bench bench-gpu clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,2s/^# //p' Makefile

venv: $(STAMP)

# torch goes first and by its exact version: resolved from a range, it may come with gigabytes of CUDA packages.
# setuptools comes before moefx because the build uses it from the environment, pinned, not a fresh download.
$(STAMP): pyproject.toml constraints.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "moefx needs Python 3.10 or newer, but PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH)
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# An environment of the packages that PYTHON has, without a network and without changing PYTHON's own: a machine with a
# GPU often comes with its torch and Triton, and cannot fetch others. PYTHON may itself be of an environment, which
# --system-site-packages would pass over.
borrow: $(BORROWED)

$(BORROWED):
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -c 'import site; print(*(f"import site; site.addsitedir({d!r})" for d in site.getsitepackages()), sep="\n")' \
	  > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(PIP) install --no-index --no-deps --no-build-isolation -e .
	@touch $@

# What is there is used; else, where PYTHON's torch sees a device, its packages are; else the usual ones are installed.
gpu-venv:
	@if test -e $(BORROWED); then :; \
	elif ! test -e $(STAMP) && $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then $(MAKE) --no-print-directory $(BORROWED); else $(MAKE) --no-print-directory $(STAMP); fi

train: $(STAMP)
	$(abspath $(VENV))/bin/moefx train $(ARGS)

# Every test computes on one thread (tests/conftest.py), so the cores are shared out among processes.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal $(ARGS)

nightly: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal -m nightly $(ARGS)

# On a machine with a CUDA device. Kernels are compiled, not interpreted.
test-gpu: gpu-venv
	TRITON_INTERPRET=0 $(PY) -m pytest -m gpu tests/gpu $(ARGS)

bench-gpu: gpu-venv
	$(PY) benchmarks/gpu.py $(ARGS)

bench: $(STAMP)
	$(PY) benchmarks/step_time.py $(ARGS)

# mypy sees what users get: the wheel, built from a copy (an old build/ would leak deleted files into it).
# It runs inside the unpacked wheel, because it also searches the current directory for packages.
lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@rm -rf $(CHECKED) && mkdir -p $(CHECKED)/src && cp -R $(SOURCES) $(CHECKED)/src
	$(PIP) wheel -q --no-deps --no-build-isolation -w $(CHECKED) $(CHECKED)/src
	$(PIP) install -q --no-deps --target $(CHECKED)/site $(CHECKED)/moefx-*.whl
	cd $(CHECKED)/site && $(PY) -m mypy --strict --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p moefx

# Leaves the environment and the results of training (runs/) alone.
clean:
	rm -rf build dist moefx.egg-info $(CHECKED) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./.git -o -path './$(VENV)' -o -path '$(VENV)' \) -prune -o -type d -name __pycache__ -exec rm -rf {} +
