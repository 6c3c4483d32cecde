# `make demo` and `make test` do all the set-up a machine with only Python 3.11+ and make needs.
PYTHON ?= python3
BIN := .venv/bin

FASHION_MNIST ?= /usr/share/datasets/fashion-mnist

.PHONY: demo check test soak study figures quantizer-study docs reference lint audit format clean
demo: .venv/installed
	$(BIN)/python scripts/run.py experiment=quickstart

# The linters, and what needs neither a training nor a process nor seconds.
check: .venv/installed-dev lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow and not soak and not gpu'

# A process of tests per core, which takes tests over from the other when it has no more.
test: .venv/installed-dev lint
	$(BIN)/python -m pytest -n auto --dist worksteal

# What takes long: runs killed at many moments, memory over many jobs, every method and optimizer stopped and resumed.
soak: .venv/installed-dev
	$(BIN)/python -m pytest -m soak

# Teachers, methods, students, pruning, orders, runtimes and quantizers, three seeds: about nine hours on two cores, of
# which `scripts/study.py outputs/study --dry-run` tells the parts. Interrupted, it goes on where it was.
# OVERRIDES=data.limit=12000 takes a fifth of the images for training, and as little time; `make figures` needs it too.
OVERRIDES ?=
STUDY := scripts/study.py outputs/study data.root=$(FASHION_MNIST) hydra/launcher=joblib $(OVERRIDES)
study: .venv/installed-study
	$(BIN)/python $(STUDY)
	$(MAKE) quantizer-study

# docs/study.md from what `make study` has finished.
figures: .venv/installed-study
	$(BIN)/python $(STUDY) --page docs/study.md --quantizers $(STUDIED)/quantizers.md

# Every quantizer on trained networks, three seeds: about three hours on two cores. What is measured is not measured
# again. With the package nncodec (see docs/results.md) the ISO codec, too.
STUDIED := outputs/quantizer-study
SWEEP := scripts/run.py -m experiment=fashion_mnist_resnet20 seed=0,1,2 quantizer=none data.root=$(FASHION_MNIST)
quantizer-study: .venv/installed
	test -d $(STUDIED)/narrow || $(BIN)/python $(SWEEP) hydra.sweep.dir=$(STUDIED)/narrow
	test -d $(STUDIED)/wide || $(BIN)/python $(SWEEP) student=resnet8x4 trainer.max_epochs=3 \
		trainer.precision=bf16-mixed hydra.sweep.dir=$(STUDIED)/wide
	$(BIN)/python scripts/quantizer_study.py $(STUDIED) $(STUDIED)/narrow/[012] $(STUDIED)/wide/[012]

# The pages of docs/ as a site in build/site; a link that leads nowhere is an error.
docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

# docs/reference.md from conf/, which a test compares.
reference: .venv/installed-dev
	$(BIN)/python -m compress.config.reference docs/reference.md

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

# Known vulnerabilities of what is installed; it asks a database on the network.
audit: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --skip-editable

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache

# Installing happens once, and again only when pyproject.toml has changed.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "compress needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

.venv/installed-study: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[executorch,joblib,litert,onnx,openvino]'
	touch $@
