# make demo    a small model trained on Python's own standard library, from nothing, on two CPU cores
# make test    all CPU tests        make lint    style and types        make format    rewrite the style
# Everything is installed into .venv; nothing else on the machine is touched.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready
# More than the two cores of a small machine: some tests only wait.
WORKERS ?= 3
DEMO := runs/demo
DEMO_DATA := $(DEMO)/data

export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED := 1

.PHONY: install demo test lint format clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' -c constraints.txt
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m data prepare stdlib: --out $(DEMO_DATA) --train-tokenizer 2048 --validation 0.05
	$(BIN)/torchrun --nproc-per-node 2 -m pretrain train configs/tiny.toml \
	    --set run.dir=$(DEMO) --set 'data.datasets=[{ path = "$(DEMO_DATA)" }]'
	$(BIN)/python -m pretrain eval $(DEMO)/tiny --data $(DEMO_DATA) --baselines
	$(BIN)/python -m pretrain generate $(DEMO)/tiny --max-new-tokens 64 --prompt '    def __init__(self, name, value):'
	$(BIN)/python -m pretrain report $(DEMO)/tiny
	@echo
	@echo "corpus and tokenizer  $(DEMO_DATA)"
	@echo "run                   $(DEMO)/tiny            (config.toml, metrics.jsonl, tensorboard/, log.txt)"
	@echo "checkpoints           $(DEMO)/tiny/checkpoints"
	@echo "report                $(DEMO)/tiny/report.html"

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs build *.egg-info
