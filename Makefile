# Two commands for a fresh machine: `make demo` and `make test`. Both set themselves up.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# OpenMP threads that spin while they wait slow down small networks on few cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint bench setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[demo,dev]'
	# The same OpenCV without its windows, which need libGL: a bare server has none.
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall \
		opencv-python-headless
	touch $@

demo: setup
	dvc repro
	@echo
	pipeline metrics
	@echo "report: $(CURDIR)/reports/index.html"

test: setup
	pytest

lint: setup
	ruff check .
	ruff format --check .
	mypy

bench: setup
	python -m speed

clean:
	rm -rf $(VENV)
