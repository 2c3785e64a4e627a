PYTHON ?= python3
# For pip, such as another index: see "Which torch" in docs/quickstart.md.
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Python compiles the modules that are imported, a small part of all, and keeps that, which some machines forbid.
export PYTHONDONTWRITEBYTECODE =
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt $(PIP_FLAGS)
# A path, so that Python finds the package beside the clone too: the clone's own folder has the package's name.
EDIT := $(PIP) --config-settings editable_mode=compat --editable
RUN := $(VENV)/.ready-to-run
READY := $(VENV)/.ready
QUICK := adapters/quickstart

.PHONY: quickstart test lint types quick slow clients gpu schema docs clean

# From nothing to an adapter, and two sentences answered by the one that ships; needs a package index and nothing else.
quickstart: $(RUN)
	$(BIN)/accelerate launch -m lora_sentiment.train recipes/quickstart.yaml output.overwrite=true
	$(BIN)/lora-sentiment evaluate $(QUICK)
	rm -rf $(QUICK)-merged
	$(BIN)/lora-sentiment merge $(QUICK) $(QUICK)-merged
	$(BIN)/lora-sentiment predict adapters/imdb_small \
	    "One of those films you want to see again at once." \
	    "Dull, long and not worth a cent."
	@echo
	@echo "Made:  $(QUICK)         the adapter: weights, card.json, report.json, README.md, pictures"
	@echo "       $(QUICK)-merged  the same as a stock transformers model"
	@echo "Next:  . $(BIN)/activate"
	@echo "       lora-sentiment predict adapters/imdb_small --explain 'Not half as good as the book.'"
	@echo "       accelerate launch -m lora_sentiment.train recipes/my_data.yaml    # copy it, and name your own csv"
	@echo "       accelerate launch -m lora_sentiment.train recipes/imdb_lora.yaml  # DistilBERT on IMDB, from the Hub"

test: lint types quick

# Made from the pinned constraints; made again when they or the requirements change.
$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	    || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.12, say"; exit 1; }
	@# Half a venv (no ensurepip, say) would be taken for a whole one the next time.
	$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip --version > /dev/null || { rm -rf $(VENV); exit 1; }

$(RUN): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(EDIT) .
	touch $(RUN)

$(READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(EDIT) '.[dev]'
	touch $(READY) $(RUN)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy

# A file's tests share a process, and what was made for them once.
quick: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Other people's clients, in a folder of their own: those of JavaScript need npm, and older versions of Python's packages
# stand beside this environment's own ones. A test whose client is absent skips.
CLIENTS ?= $(VENV)/clients
export CLIENTS
clients: $(READY)
	mkdir -p $(CLIENTS) && cp tests/clients/package.json $(CLIENTS)
	! command -v npm > /dev/null || (cd $(CLIENTS) && ONNXRUNTIME_NODE_INSTALL=skip \
	    ONNXRUNTIME_NODE_INSTALL_CUDA=skip npm install --no-audit --no-fund --no-package-lock)
	$(BIN)/python -m venv $(CLIENTS)/old
	$(CLIENTS)/old/bin/python -m pip install --quiet --no-deps \
	    transformers==4.57.6 peft==0.13.2 tokenizers==0.22.2 huggingface_hub==0.36.2
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	    > "$$($(CLIENTS)/old/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth"
	$(BIN)/python -m pip install --quiet --no-deps --target $(CLIENTS)/openvino openvino
	PYTHONPATH=$(CLIENTS)/openvino $(BIN)/python -m pytest -m clients tests/clients

# For a machine with a card and its own torch: no venv and no network. OUT: folder of all results. GPU_FLAGS: for
# benchmarks/gpu.py, such as --base-small FOLDER --data imdb=FOLDER.
OUT ?= benchmarks
GPU_FLAGS ?=
gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) benchmarks/gpu_check.py --out "$(OUT)" $(GPU_FLAGS)

# The site, in docs/_build. A warning is an error. No network once the packages are installed.
$(VENV)/.ready-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(EDIT) '.[docs]'
	touch $@

docs: $(VENV)/.ready-docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env docs docs/_build

schema: $(READY)
	$(BIN)/lora-sentiment schema > recipes/schema.json

clean:
	rm -rf $(VENV) docs/_build docs/generated build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
