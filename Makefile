# make demo and make test are the two commands a newcomer needs; both work on a fresh machine.

TORCH ?= torch==2.13.0
# For the tests on timm's backbones. Their own requirements would replace torch.
MODELS ?= timm==1.0.31 torchvision==0.28.0
PYTHON ?= python3
VENV ?= .venv
DATA ?=
STEPS ?=
MACHINE ?= $(shell hostname)

BIN := $(VENV)/bin
BUILD := "setuptools>=77" wheel ninja pybind11 numpy packaging
JOBS := $(shell nproc 2>/dev/null || echo 2)
INSTALLED := $(VENV)/.installed
# Lanes whose skip is a failure. The CUDA ones need the toolkit's headers, and are required where nvcc is.
REQUIRE ?= cpu,triton-interpret$(if $(shell command -v nvcc),$(CUDA_LANES))
CUDA_LANES := ,cuda-emulated,nvcc

.PHONY: help install demo test lint format bench audit wheel wheel-check clean

help:
	@echo "make demo         install, then train on generated scenes (DATA=folder STEPS=n OUT=folder to override)"
	@echo "make test         install, lint, run every test, build and check the wheel"
	@echo "make lint         ruff and mypy        make format   ruff format"
	@echo "make bench        measure into benchmarks/results/MACHINE=, rewrite the README table"
	@echo "make audit        facts about the GPU code: registers, spills, load widths, instruction mix"
	@echo "make wheel        dist/*.whl           make wheel-check TORCH=torch==2.11.0"

# torch first and by exact version: a bare torch, or a range in an isolated build, would fetch the CUDA packages.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip $(BUILD)
	$(BIN)/pip install -q "$(TORCH)"
	touch $@

$(INSTALLED): $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)
	MAX_JOBS=$(JOBS) $(BIN)/pip install -q --no-build-isolation -e ".[test,lint]"
	$(BIN)/pip install -q "triton==3.7.1" huggingface_hub safetensors pyyaml
	$(BIN)/pip install -q --no-deps $(MODELS)
	touch $@

install: $(INSTALLED)

demo: install
	$(BIN)/python examples/train.py $(if $(DATA),--data $(DATA)) $(if $(STEPS),--steps $(STEPS)) $(if $(OUT),--out $(OUT))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One thread per worker: two workers that each spin two threads on two cores take many times longer.
test: lint
	OMP_NUM_THREADS=1 SEGOPS_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
	$(MAKE) --no-print-directory wheel-check

bench: install
	$(BIN)/python -m pytest -q benchmarks --benchmark-json=build/benchmark.json
	$(BIN)/python benchmarks/report.py --import build/benchmark.json --machine $(MACHINE)
	$(BIN)/python benchmarks/report.py

audit: install
	$(BIN)/python benchmarks/audit.py

wheel: $(VENV)/.torch
	rm -rf dist && MAX_JOBS=$(JOBS) $(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

# The wheel, in an environment that holds nothing but torch, numpy and it.
wheel-check: wheel
	rm -rf build/wheel-check && $(PYTHON) -m venv build/wheel-check
	build/wheel-check/bin/pip install -q numpy "$(TORCH)"
	build/wheel-check/bin/pip install -q --no-deps dist/*.whl
	cd build/wheel-check && bin/python ../../tests/wheel_smoke.py

clean:
	rm -rf build dist *.egg-info segops/*.so
