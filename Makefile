# Every target makes its virtual environment first, if it is not there: Python 3.10 or newer, make
# and a network for packages are all it needs. `make PYTHON=python3.12 test` takes another Python.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CLIENTS ?= .venv-clients
RUN := runs/quickstart
BASE := models/base_tiny.nemo

# The CPU's share in the quickstart. More threads than this do not help a model so small.
quickstart: export OMP_NUM_THREADS = 2

.PHONY: quickstart test test-clients test-all bench kernels lint clean

# An empty file in the environment marks what is installed in it.
$(VENV)/.%-installed: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@

# Run again, it goes on where it was stopped; `rm -r runs/quickstart` starts it anew.
quickstart: $(VENV)/.quickstart-installed
	@echo "--- 1. Speak a corpus: sentences over a small vocabulary; others, in other voices, to test"
	$(BIN)/python -m training.synthesize $(RUN)/train --vocabulary quickstart --count 1600 --seed 1 --jobs 2
	$(BIN)/python -m training.synthesize $(RUN)/test --vocabulary quickstart --count 60 --seed 2 --voices heldout --jobs 2
	@echo "--- 2. Error rates of the base model, before"
	$(BIN)/python -m fastconformer.evaluate $(RUN)/test/manifest.jsonl --model $(BASE) -o $(RUN)/before.json
	@echo "--- 3. Fine-tune it"
	$(BIN)/python -m training.finetune recipes/quickstart.yaml
	@echo "--- 4. Error rates after, beside those before"
	$(BIN)/python -m fastconformer.evaluate $(RUN)/test/manifest.jsonl --model $(RUN)/model/model.nemo -o $(RUN)/after.json --against $(RUN)/before.json
	@echo "--- 5. Transcribe a file, with the times of words: name, channel, start, duration (s), word"
	$(BIN)/python -m fastconformer.transcribe $(RUN)/test/audio/000000.flac --model $(RUN)/model/model.nemo --format ctm
	@echo "--- Done. The fine-tuned model, for NeMo too: $(RUN)/model/model.nemo"

# A process a core, with a thread each; the tests of a file stay together.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Real clients of the exports and of the server, and a browser, in an environment of their own.
test-clients: $(CLIENTS)/.clients-installed
	$(CLIENTS)/bin/python -m pytest tests/clients

$(CLIENTS)/.clients-installed: setup.py constraints.txt tests/clients/requirements.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet -c constraints.txt -e ".[test]" -r tests/clients/requirements.txt
	touch $@

test-all: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m "not network"

bench: $(VENV)/.test-installed
	$(BIN)/python -m benchmarks.cpu_vs_nemo $(BENCH)

# Compiles the Triton and the CUDA kernels for each target, which takes an hour of a core, and checks
# what they spill; the latter skip without nvcc.
kernels: $(VENV)/.test-installed
	$(BIN)/python -m benchmarks.triton_kernels --out runs/benchmarks/triton_kernels.json
	$(BIN)/python -m pytest -m slow tests/rwkv_cuda/test_wkv7_cuda.py

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(CLIENTS) build *.egg-info .pytest_cache .ruff_cache .hypothesis
