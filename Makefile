# The project's verbs. They install what they need into .venv, given Python 3.11 or newer and the network.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: quickstart test test-all test-cluster check docs bench rivals clean

quickstart: .venv/installed ## a real search on a synthetic archive, about four minutes on two cores
	$(BIN)/csmae search spaces/quickstart.yaml

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

test: check ## what every change must pass
	$(PYTEST) -m "not slow"

test-all: check ## everything, the long checks included
	$(PYTEST)

test-cluster: .venv/cluster ## `ray up` on three hosts made of network namespaces; root, installs Debian's packages
	tests/cluster/hosts.sh packages
	$(BIN)/python -m pytest -s tests/cluster/real_losses.py tests/cluster/real_cluster.py

check: .venv/installed ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/installed ## docs/reference, generated from the code
	$(BIN)/python docs/generate_reference.py

bench: .venv/installed ## each benchmark prints one JSON line
	@for benchmark in benchmarks/*.py; do echo "# $$benchmark" >&2; $(BIN)/python $$benchmark || exit 1; done

SEEDS ?= 5
WORKERS ?= 1
RUNS ?= benchmarks/rivals/runs.jsonl
RIVAL = PYTHONPATH=benchmarks OMP_NUM_THREADS=1 .venv-rivals
RIVAL_OPTIONS = -m rivals.run $(RUNS) --seeds $(SEEDS) --workers $(WORKERS) --methods

rivals: .venv-rivals/synetune/installed .venv-rivals/neps/installed ## other projects' methods for search_curves.py; takes hours and continues
	$(RIVAL)/synetune/bin/python $(RIVAL_OPTIONS) "syne-tune asha" "optuna tpe" "optuna tpe+hyperband"
	$(RIVAL)/neps/bin/python $(RIVAL_OPTIONS) "neps async hyperband" "neps priorband"
	$(RIVAL)/synetune/bin/python $(RIVAL_OPTIONS) "syne-tune dyhpo" "syne-tune mobster" "syne-tune hypertune"

.venv-rivals/%/installed: benchmarks/rivals/constraints-%.txt benchmarks/rivals/requirements-%.txt
	$(PYTHON) -m venv .venv-rivals/$*
	.venv-rivals/$*/bin/python -m pip install --disable-pip-version-check -q -c $< -r benchmarks/rivals/requirements-$*.txt
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	@touch $@

.venv/cluster: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[cluster]"
	@touch $@

clean: ## remove what the other verbs made, except studies
	rm -rf .venv .venv-rivals .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
