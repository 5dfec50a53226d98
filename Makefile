# All targets run in a virtual environment; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv$(if $(filter python3,$(PYTHON)),,-$(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])'))
CUDA := $(shell nvidia-smi >/dev/null 2>&1 && echo ,cuda12)
BIN = $(VENV)/bin
# Compiled modules are kept, for every process would compile all packages anew (3 s instead of 1).
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-faults test-slow test-soak test-torch test-compile test-compile-gpu docs notebook lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

demo: $(VENV)/.demo  ## pretrain on real photographs in a few minutes; figures and a table of accuracies
	$(BIN)/python train.py --config configs/demo.py --workdir runs/demo

test: $(VENV)/.dev  ## run the unit tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-faults: $(VENV)/.dev  ## kill, suspend, starve and corrupt real runs (docs/fault_tolerance.md)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/faults $(ARGS)

test-slow: $(VENV)/.dev  ## more fault tolerance tests, programs for hundreds of devices, scripts; half an hour
	$(BIN)/python -m pytest tests/slow $(ARGS)

test-soak: $(VENV)/.dev  ## memory, open files and threads of a run of 20,000 steps
	$(BIN)/python -m pytest -s tests/soak $(ARGS)

test-torch: .venv-torch/.peers  ## run the interoperability tests against torch, transformers, timm and onnxruntime
	XLA_FLAGS= HF_HUB_OFFLINE=1 TIMM=.venv-torch/timm .venv-torch/bin/python -m pytest tests/interop $(ARGS)

test-compile: .venv-compile/.tpu  ## compile the train step for a TPU, without one, and check the program
	.venv-compile/bin/python -m pytest tests/compile $(ARGS)

test-compile-gpu: .venv-compile/.gpu  ## the same for NVIDIA GPUs; the compilers take 6 GB
	.venv-compile/bin/python -m pytest tests/compile $(ARGS)

docs: .venv-docs/.docs  ## build the site of the documentation into site/; a dead link fails
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

notebook: .venv-docs/.docs  ## execute the notebook of the documentation on a short run of the demo
	.venv-docs/bin/python scripts/run_notebook.py $(ARGS)

lint: $(VENV)/.dev docs  ## check style, types and documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/hadolint Dockerfile

clean:  ## remove the virtual environments and the demo's workdir
	rm -rf .venv .venv-py* .venv-torch .venv-compile .venv-docs site runs/demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# --no-compile: only the modules that are imported are compiled, when they are, which is faster.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[demo$(CUDA)]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[demo,dev$(CUDA)]'
	touch $@

# The other environments see the packages of $(VENV), so only what they add is installed.
define derive_venv
$(PYTHON) -m venv $(1)
$(BIN)/python -c 'import sysconfig; path = sysconfig.get_path("purelib"); \
	print(f"import site; site.addsitedir({path!r})")' > $(1)/packages.pth
mv $(1)/packages.pth $(1)/lib/python3*/site-packages
endef

.venv-docs/.docs: $(VENV)/.dev
	$(call derive_venv,.venv-docs)
	.venv-docs/bin/python -m pip install --quiet --no-compile --editable '.[demo,docs]'
	touch $@

# timm requires torchvision, which breaks transformers with the CPU build of torch: both go into a
# separate folder, which only the timm tests use.
.venv-torch/.peers: $(VENV)/.dev
	$(call derive_venv,.venv-torch)
	.venv-torch/bin/python -m pip install --quiet --no-compile torch==2.13.0 transformers onnxruntime --editable '.[demo,dev,mlflow,onnx,wandb]'
	.venv-torch/bin/python -m pip install --quiet --no-compile --no-deps --upgrade --target .venv-torch/timm \
		timm==1.0.31 torchvision==0.28.0
	touch $@

.venv-compile/.tpu: $(VENV)/.dev
	$(call derive_venv,.venv-compile)
	.venv-compile/bin/python -m pip install --quiet --no-compile --editable '.[dev]' 'jax[tpu]'
	touch $@

.venv-compile/.gpu: .venv-compile/.tpu
	.venv-compile/bin/python -m pip install --quiet --no-compile --editable '.[dev,compile]'
	touch $@
