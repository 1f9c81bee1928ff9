# Needs Python >= 3.11, a C++ compiler and make; the rest is installed into .venv.
# Every path is relative: make cannot quote a target, and the folder's own path may hold spaces.
PYTHON ?= python3
RESULT ?= bench/results/latest.json
OUT ?= runs/gpu
CHECK_PYTHON := import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=python3.12")
PIP := .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt
PIP_OLDEST := .venv-oldest/bin/python -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test campaign distributed oldest lint docs gate sanitize bench gpu wheel notebook clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed  ## render data, train a small model, evaluate it, draw pictures: all in runs/demo
	.venv/bin/encdiff demo

test: .venv/.installed-dev  ## run the tests, and every benchmark once as a smoke test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal --benchmark-disable tests bench

campaign: .venv/.installed-dev  ## minutes of random kills, full disks and damaged files; ARGS="--seed 1" for others
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.campaign.kills $(ARGS)
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.campaign.full_disk $(ARGS)
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.campaign.files $(ARGS)

distributed: .venv/.installed-dev  ## minutes: processes of a launch killed at random, two launchers as of two machines
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.campaign.workers $(ARGS)

# By hand, not in CI: some gigabytes. Its library also serves .venv, since the ABI is stable.
oldest: .venv-oldest/.installed  ## the tests in a second environment, of the oldest torch; needs nvcc for the CUDA half
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal tests

lint: .venv/.installed-dev  ## check style, formatting and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/.installed-dev  ## build the documentation: build/docs/index.html
	.venv/bin/python -m sphinx -E -W --keep-going -n -q docs build/docs

gate: .venv/.installed-dev  ## compile every kernel for three generations of GPU and check its machine code; GATE=--hopper: fewer for the others
	.venv/bin/python -W ignore -m encdiff.kernels._gate $(GATE)
	.venv/bin/python -P encdiff/ops/_build.py --check

sanitize: .venv/.installed-dev  ## the native library's tests under the address and undefined-behaviour sanitizers
	ENCDIFF_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	.venv/bin/python -m pytest tests/test_native.py tests/test_noise_out.py tests/test_self_attention.py \
	tests/test_cross_attention.py tests/test_types.py \
	-k "not compile and not opcheck and not ten_million and not one_graph and not lesser"

bench: .venv/.installed-dev  ## time ops and whole models on this machine; RESULT=FILE.json, ARGS="-k unet" for a part
	.venv/bin/python -m pytest bench --benchmark-json="$(RESULT)" $(ARGS)
	.venv/bin/python -m bench.report "$(RESULT)" --against bench/results

gpu:  ## with an NVIDIA GPU, without network: check, time, train; OUT=folder ARGS="--call 1", then 2 and 3: 5 to 9 min each
	@"$(PYTHON)" -m bench.gpu "$(OUT)" $(ARGS)

wheel: .venv/.installed-dev  ## a wheel and an sdist in dist/: build, look through, use in a fresh environment; some minutes
	rm -rf dist
	.venv/bin/python -m build -q --no-isolation
	.venv/bin/python tools/check_release.py dist --try

notebook: .venv/.installed-dev  ## make examples/tour.ipynb from examples/tour.py
	.venv/bin/jupytext --update --to ipynb examples/tour.py

clean:  ## remove both environments, builds and caches, but never a run
	rm -rf .venv .venv-oldest build dist encdiff.egg-info encdiff/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and by its exact version, so that nothing else chooses one; it also brings setuptools for the build,
# which ninja runs.
.venv/.installed: pyproject.toml setup.py constraints.txt encdiff/__init__.py encdiff/ops/_build.py $(wildcard csrc/*)
	.venv/bin/python -m pip --version 2>/dev/null || { "$(PYTHON)" -c '$(CHECK_PYTHON)' && "$(PYTHON)" -m venv .venv; }
	$(PIP) torch==2.13.0 ninja
	$(PIP) --no-build-isolation -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@

# triton 3.6, which torch 2.11 names, cannot interpret beside numpy 2.4; constraints.txt is that of torch 2.13.
.venv-oldest/.installed: pyproject.toml setup.py encdiff/__init__.py encdiff/ops/_build.py $(wildcard csrc/*)
	.venv-oldest/bin/python -m pip --version 2>/dev/null || \
	{ "$(PYTHON)" -c '$(CHECK_PYTHON)' && "$(PYTHON)" -m venv .venv-oldest; }
	$(PIP_OLDEST) "setuptools>=77" torch==2.11.0 "numpy<2.4" ninja
	ENCDIFF_CUDA=1 $(PIP_OLDEST) --no-build-isolation "numpy<2.4" -e ".[dev]"
	touch $@
