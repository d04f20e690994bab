# Two commands for a fresh machine: `make demo` and `make test`. Both set themselves up.
PYTHON ?= python3
VENV := .venv
# Exact versions of all packages; `make test LOCK=` takes the newest that pyproject.toml allows.
LOCK ?= requirements.lock
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --no-compile $(if $(LOCK),--constraint $(LOCK))
# On all cores, where pip takes one. Some packages carry code of other Pythons, which does not compile.
COMPILE := $(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test lint bench docs install setup lock clean

demo: $(VENV)/.installed-demo
	dvc repro
	@echo
	pipeline metrics
	pipeline times
	@echo "report: $(CURDIR)/reports/index.html"

test: setup
	pytest

lint: setup
	ruff check .
	ruff format --check .
	mypy
	lint-imports

bench: setup
	python -m speed

docs: setup
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	@echo "site: $(CURDIR)/site/index.html"

install: $(VENV)/.installed-demo

setup: $(VENV)/.installed-dev

$(VENV)/.installed-demo: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(INSTALL) --editable '.[demo]'
	$(COMPILE)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-demo
	$(INSTALL) --editable '.[demo,dev]'
	# The same OpenCV without its windows, which need libGL: a bare server has none.
	$(INSTALL) --no-deps --force-reinstall opencv-python-headless
	$(COMPILE)
	touch $@

# Resolves anew, as for an empty environment, and installs nothing. Take the oldest Python that is
# supported: what it can install, later ones can.
lock: $(VENV)/.installed-demo
	$(PIP) install --dry-run --ignore-installed --report $(VENV)/resolved.json \
		--editable '.[demo,dev]' opencv-python-headless
	python .ci/lock.py $(VENV)/resolved.json > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV)
