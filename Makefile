# make train | test | lint | nightly | sass-oldest | bench | test-gpu | bench-gpu | clean      options for the command: make test ARGS="-k dialect -x"
# The first one creates $(VENV) and installs moefx into it; later ones only after pyproject.toml or constraints.txt change.
# SYSTEM=1: without a network, on top of what $(PYTHON) has installed (torch, triton, pytest, ...), whatever its versions.

SYSTEM ?=
VENV ?= $(if $(SYSTEM),.venv-system,.venv)
PYTHON ?= python3

# Always the environment's own interpreter, by path: another active environment does not matter.
PY := $(abspath $(VENV))/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.moefx-installed
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

# Everything a wheel is built from.
SOURCES := pyproject.toml LICENSE $(wildcard README.md) moefx passes kernels models
CHECKED := $(abspath $(VENV))/checked-wheel

.PHONY: help venv train test test-gpu lint nightly sass-oldest bench bench-gpu clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,3s/^# //p' Makefile

venv: $(STAMP)

ifneq ($(SYSTEM),)
# The environment sees the packages of $(PYTHON) by a .pth file: --system-site-packages would see those of the Python that
# $(PYTHON) was made from, where it is an environment itself. pip and setuptools are $(PYTHON)'s, too. PYTHONPATH alone
# would not do: moefx.passes, moefx.kernels and moefx.models lie elsewhere (pyproject.toml), which an install records.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv --without-pip --clear $(VENV)
	$(PYTHON) -c 'import sys; print("import site; list(map(site.addsitedir, %r))" % [p for p in sys.path[1:] if "-packages" in p])' \
	  >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-system.pth"
	$(PIP) install --no-index --no-deps --no-build-isolation -e .
	@touch $@
else
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
endif

train: $(STAMP)
	$(abspath $(VENV))/bin/moefx train $(ARGS)

# Every test computes on one thread (tests/conftest.py), so the cores are shared out among processes.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal $(ARGS)

nightly: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal -m nightly $(ARGS)

# The gates on machine code with the oldest Triton that pyproject.toml allows, which lies beside the environment's own.
# Ten minutes of a core and a download of 190 MB, hence no part of other targets. Some modules: ARGS="permute glu".
TRITON_OLDEST := $(shell sed -n 's/^ *"triton>=\([0-9.]*\).*/\1/p' pyproject.toml | awk -F. '{ print $$1 "." $$2 "." $$3 + 0 }')
TRITON_ASIDE := $(abspath $(VENV))/triton-$(TRITON_OLDEST)

sass-oldest: $(STAMP) $(TRITON_ASIDE)
	TRITON_INTERPRET=0 PYTHONPATH=$(TRITON_ASIDE) $(PY) -m moefx.kernels.gpu.sass $(ARGS) --target sm_90

$(TRITON_ASIDE):
	$(PIP) install -q --no-deps --upgrade --target $@.part triton==$(TRITON_OLDEST)
	@mv $@.part $@

# On a machine with a CUDA device. Kernels are compiled, not interpreted, which takes most of the time: ARGS="-n 8" shares
# it out where pytest-xdist is installed.
test-gpu: $(STAMP)
	TRITON_INTERPRET=0 $(PY) -m pytest -m gpu tests/gpu $(ARGS)

bench-gpu: $(STAMP)
	$(PY) -m benchmarks.gpu $(ARGS)

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
