# Every target sets up what it needs. A fresh machine needs python3 (3.10 or newer, with venv) and make.
#   make demo      the main job on a real checkpoint
#   make test      the tests, on two transformers releases
#   make test-latest   on whatever transformers, torch and triton are newest on the index
#   make test-matrix   kernels on every Triton, tests on every Python that is supported (not in CI)
#   make theirs    transformers' own tests of two families, with our attention in sdpa's place
#   make coverage  which lines the tests run, by file; fails below 90% of a package
#   make audit     the pinned packages, held to the database of known vulnerabilities
#   make check     format, lint, types, tables
#   make docs      the site, with strict links
#   make bench     CPU rows into results/: attention; make bench-model: a whole model
#   make results   the tables of README.md and docs/ from results/*.csv
#   make gpu SLICE=correctness   on a GPU machine

PYTHON ?= python3
SLICE ?= all
ARGS ?=
VENV := .venv
OLDEST := .venv-oldest
LATEST := .venv-latest
MATRIX := .venv-matrix
DOCS := .venv-docs
AUDIT := .venv-audit
BIN := $(VENV)/bin/python
PIP := -m pip --disable-pip-version-check install -qq

# Two workers of one thread each: torch's own threads would only fight with them.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2
# what touches names that differ between releases of transformers
OLDEST_TESTS := $(addprefix tests/patch/test_,$(addsuffix .py,registry private_names masks flash_names batching_tables batching_update continuous paged_cache mla_models mla_layers)) \
	$(addprefix tests/repo/test_,$(addsuffix .py,hub_kernel))
# what runs in Triton's interpreter
TRITON_TESTS := $(addprefix tests/kernels/test_kernel_,$(addsuffix .py,interpreter append decode attention mla))

.PHONY: setup demo test test-newest test-oldest test-latest test-matrix theirs coverage audit docs bench bench-model results gpu wheel clean
.PHONY: check check-format check-lint check-types check-tables format
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PRECIOUS: $(MATRIX)-triton-%/.ready $(MATRIX)-python-%/.ready

setup: $(VENV)/.ready

# torch first and by its exact version, so that no later step pulls a second one; the build runs
# without isolation, in the environment that already has setuptools.
define make_venv
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit("$(PYTHON) is Python %d.%d, hf-attn-patch needs 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" % v)'
	@echo "setting up $(1), which takes a few minutes: torch ..."
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python $(PIP) -c $(2) setuptools wheel torch
	@echo "setting up $(1): transformers and the rest ..."
	@$(1)/bin/python $(PIP) -c $(2) --no-build-isolation -e '.$(3)' $(4)
	@touch $(1)/.ready
endef

$(VENV)/.ready: pyproject.toml constraints/cpu.txt
	$(call make_venv,$(VENV),constraints/cpu.txt,[dev$(comma)compare$(comma)uptrain],)

$(OLDEST)/.ready: pyproject.toml constraints/oldest.txt constraints/oldest-triton.txt
	$(call make_venv,$(OLDEST),constraints/oldest.txt,,hypothesis kernels psutil pytest pytest-xdist)
	@rm $@
	@$(OLDEST)/bin/python $(PIP) --no-deps -r constraints/oldest-triton.txt
	@touch $@

comma := ,

demo: $(VENV)/.ready
	@$(BIN) scripts/demo.py $(ARGS)

test: test-newest test-oldest

test-newest: $(VENV)/.ready
	$(TEST_ENV) $(BIN) -m pytest -q -n $(WORKERS) --dist worksteal --durations 10 $(ARGS)

test-oldest: $(OLDEST)/.ready
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -q -n $(WORKERS) $(OLDEST_TESTS)

# Nothing is pinned, so it is made anew each time: what fails here is the next release's news.
test-latest:
	rm -rf $(LATEST)
	$(call make_venv,$(LATEST),/dev/null,[dev$(comma)compare$(comma)uptrain],)
	$(LATEST)/bin/hf-attn check
	$(TEST_ENV) $(LATEST)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

# Each in an environment of its own, on request: make test-matrix TRITONS=3.9.0 PYTHONS=
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
PYTHONS ?= 3.10 3.11 3.12 3.13

test-matrix: $(addprefix test-triton-,$(TRITONS)) $(addprefix test-python-,$(PYTHONS))

# Triton against the pin of torch, and NumPy below 2.4, which Triton 3.6 needs.
$(MATRIX)-triton-%/.ready: pyproject.toml constraints/oldest.txt
	$(call make_venv,$(MATRIX)-triton-$*,constraints/oldest.txt,,hypothesis psutil pytest pytest-xdist)
	@rm $@
	@$(MATRIX)-triton-$*/bin/python $(PIP) --no-deps triton==$*
	@touch $@

test-triton-%: $(MATRIX)-triton-%/.ready
	$(TEST_ENV) $(MATRIX)-triton-$*/bin/python -m pytest -q -n $(WORKERS) $(TRITON_TESTS) $(ARGS)

$(MATRIX)-python-%/.ready: PYTHON = python$*
$(MATRIX)-python-%/.ready: pyproject.toml constraints/cpu.txt
	$(call make_venv,$(MATRIX)-python-$*,constraints/cpu.txt,[dev$(comma)compare$(comma)uptrain],)

test-python-%: $(MATRIX)-python-%/.ready
	$(TEST_ENV) $(MATRIX)-python-$*/bin/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

theirs: $(VENV)/.ready
	$(TEST_ENV) $(BIN) scripts/upstream_tests.py --families llama,bert $(ARGS)

# Processes that the tests start are measured too: [tool.coverage.run] in pyproject.toml.
PACKAGES := hf_attn_patch converters/hf_attn_converters kernels/hf_attn_kernels

coverage: $(VENV)/.ready
	rm -rf .coverage
	$(TEST_ENV) $(BIN) -m coverage run -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)
	$(BIN) -m coverage combine --quiet
	@$(foreach package,$(PACKAGES),$(BIN) -m coverage report --show-missing --include='$(package)/*' --fail-under=90 || low="$$low $(package)"; ) \
	test -z "$$low" || { echo "below 90%:$$low"; exit 1; }

$(AUDIT)/.ready: constraints/audit.txt
	@echo "setting up $(AUDIT) ..."
	@$(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/python $(PIP) -r constraints/audit.txt
	@touch $@

audit: $(AUDIT)/.ready
	$(AUDIT)/bin/python scripts/audit.py $(ARGS)

check: check-format check-lint check-types check-tables

check-format: $(VENV)/.ready
	$(BIN) -m ruff format --check .

check-lint: $(VENV)/.ready
	$(BIN) -m ruff check .

check-types: $(VENV)/.ready
	$(BIN) -m mypy

check-tables: $(VENV)/.ready
	$(BIN) scripts/result_tables.py --check

format: $(VENV)/.ready
	$(BIN) -m ruff format .
	$(BIN) -m ruff check --fix .

# Docstrings are read, not imported: torch is not needed.
$(DOCS)/.ready: constraints/docs.txt
	@echo "setting up $(DOCS) ..."
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python $(PIP) -r constraints/docs.txt
	@touch $@

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs --quiet build --strict

bench: $(VENV)/.ready
	$(BIN) scripts/bench_attention.py --out results/attention_cpu.csv $(ARGS)

# up to ten minutes for a dtype; what was not reached is measured when it is started again
bench-model: $(VENV)/.ready
	$(BIN) scripts/fetch_checkpoint.py smollm2 .cache/smollm2-135m
	for dtype in float32 bfloat16; do $(BIN) scripts/bench_model.py .cache/smollm2-135m --dtype $$dtype --out results/model_cpu.csv $(ARGS) || exit 1; done

results: $(VENV)/.ready
	$(BIN) scripts/result_tables.py

# No virtual environment: a GPU machine brings its own torch and triton.
gpu:
	PYTHONPATH=.:kernels:converters $(PYTHON) scripts/gpu.py --slice $(SLICE) $(ARGS)

wheel: $(VENV)/.ready
	$(BIN) -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) $(OLDEST) $(LATEST) $(MATRIX)-* $(DOCS) $(AUDIT) .coverage site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
