# make demo   set up .venv, then sweep -> evaluation -> report on the embedded sample data
# make test   set up .venv, then all tests            make fast    the tests that are not slow
# make check  format, lint, types                     make venv    only set up .venv
# make lock   pin requirements.txt and requirements-dev.txt anew from their .in files (needs uv)
# make clean  remove what demo and tests leave

REQUIREMENTS ?= requirements.txt requirements-dev.txt
PYTHON_IN_VENV := .venv/bin/python
LOCK := uv pip compile --universal --fork-strategy fewest --python-version 3.9 --quiet \
  --no-emit-index-url --no-emit-find-links --no-header --no-annotate

.PHONY: demo test fast check format venv lock clean

demo: venv
	@scripts/demo.sh

test: venv
	$(PYTHON_IN_VENV) -m pytest

fast: venv
	$(PYTHON_IN_VENV) -m pytest -m "not slow"

check: venv
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m mypy

format: venv
	$(PYTHON_IN_VENV) -m ruff format .
	$(PYTHON_IN_VENV) -m ruff check --fix .

venv:
	@PYTHON="$(PYTHON)" scripts/setup_venv.sh $(REQUIREMENTS)

lock:
	$(LOCK) requirements.in -o requirements.txt
	$(LOCK) requirements-dev.in -o requirements-dev.txt

clean:
	rm -rf demo_output data_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
