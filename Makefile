# Two commands to know: `make demo` and `make test`. Both need only make and Python 3.10-3.12 (with venv).
# The first interpreter that runs and fits (a pyenv shim may be on the PATH and lead nowhere).
FITS := import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
    if $$p -c '$(FITS)' 2>/dev/null; then echo $$p; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-with-$(shell cksum pyproject.toml | cut -d' ' -f1)

.PHONY: demo test bench lint clean
demo: $(STAMP)
	$(BIN)/mvcodec demo

# The tests' tensors are tiny: threads would only wait for each other, two processes do not.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

bench: $(STAMP)
	$(BIN)/mvcodec bench
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[peers]'
	$(BIN)/python benchmarks/peers.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Editable, so that one installation serves every later change of the sources; a changed pyproject.toml reinstalls.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "needs Python 3.10-3.12 with venv: make $(MAKECMDGOALS) PYTHON=/path/to/it" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@rm -f $(VENV)/.installed-with-*
	@touch $@

clean:
	rm -rf $(VENV) build dist demo
