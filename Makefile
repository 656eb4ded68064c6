# make demo   the main job on the bundled data set
# make test   the whole suite
# make quick  the tests that take seconds, in under a minute
# make check  lint, types, spelling, who imports whom
# make docs   the documentation site, in site/
# make bench  the benchmark suite, on a quiet machine; two to three hours (docs/benchmarks.md)
# Each does its own set-up: a virtual environment in .venv with the versions of requirements.lock.

PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= runs/demo
# Torch's threads spin while they wait; on cores that others use too, that slows everybody many times.
QUIET_THREADS := OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1

.PHONY: demo test quick check docs bench clean

.venv/installed: pyproject.toml requirements.lock requirements-torchrec.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-torchrec.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: .venv/installed
	rm -rf $(DEMO_OUT)
	OMP_WAIT_POLICY=passive $(BIN)/embtrim run flights --config recipes/demo.toml --out $(DEMO_OUT)

test: .venv/installed
	$(QUIET_THREADS) $(BIN)/python -m pytest -n 2

quick: .venv/installed
	$(QUIET_THREADS) $(BIN)/python -m pytest -n 2 -m "not slow"

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell
	$(BIN)/lint-imports --no-cache --no-logo

# The theme's advertisement of its successor is left out.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/installed
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/bench.py
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/growth.py

clean:
	rm -rf .venv benchmarks/.peers-venv runs build dist site
