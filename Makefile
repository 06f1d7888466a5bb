# `make` alone tells the targets. DEMO_ARGS, PYTEST_ARGS, CARGO_ARGS and BENCH_ARGS are passed on.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

BIN := .venv/bin
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python

.PHONY: help venv demo demo-search test test-python test-rust test-faults test-oldest fuzz-python lint format docs wheel doctor bench-planner bench-long bench-serving soak bench-toy bench-accuracy bench-million bench-real bench-summaries \
	bench-method pictures figures \
	tune test-gpu bench-gpu bench-gpu-serving gpu-report fuzz miri clean

# Without an advertisement of its makers.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
FUZZ_SECONDS ?= 600
TOKENS ?= 256K
MINUTES ?= 30
FUZZ_EXECUTIONS ?= 1000000
# The interpreter of gpu-report, which needs no .venv.
PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)

help: ## tell the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## make .venv, or bring it up to date
	@scripts/bootstrap.sh

demo: venv ## serve a model with dense and with sparse prefill, and compare
	$(BIN)/python -m benchmarks.demo $(DEMO_ARGS)

demo-search: venv ## search a pattern file for the toy, and compare it with single patterns
	$(BIN)/python -m benchmarks.search $(DEMO_ARGS)

test: test-rust test-python ## all tests

test-faults: venv ## what goes wrong around a server, and what happens then, as a table
	$(BIN)/python -m pytest -m fault tests $(PYTEST_ARGS)

test-oldest: venv ## unit tests with the oldest SGLang that is supported, in .venv-oldest
	@scripts/oldest.sh $(PYTEST_ARGS)

test-rust: venv ## tests of the Rust crates
	cargo test --release --workspace $(CARGO_ARGS)

test-python: venv ## tests of the Python package, real servers among them
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: venv ## check style, types and warnings; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_layers.py
	$(MKDOCS) --quiet
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

format: venv ## format Python and Rust, apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cargo fmt --all

docs: venv ## the documentation as a site in out/site
	$(MKDOCS)

wheel: venv ## build a wheel into dist/
	$(BIN)/maturin build --release --out dist

doctor: venv ## tell whether the installation works
	$(BIN)/mminference doctor

bench-planner: venv ## time planning against numpy and memcpy
	$(BIN)/python -m benchmarks.planner --check $(BENCH_ARGS)

bench-method: venv ## what selection keeps of planted attention, and what it computes for it
	$(BIN)/python -m benchmarks.method --check $(BENCH_ARGS)

bench-long: venv ## one chunk behind 32K to 1M tokens on this CPU, sparse and dense
	$(BIN)/python -m benchmarks.long $(BENCH_ARGS)

bench-toy: venv ## answers of the toy model, dense and sparse, 2K to 16K tokens
	$(BIN)/python -m benchmarks.toy.accuracy $(BENCH_ARGS)

bench-accuracy: venv ## answers about clips, pictures and texts, dense, sparse and by simpler patterns, 4K to 32K tokens
	$(BIN)/python -m benchmarks.accuracy $(BENCH_ARGS)

bench-million: venv ## one video of TOKENS tokens (256K unless told) through a server: time, density and memory by chunk
	$(BIN)/python -m benchmarks.million --tokens $(TOKENS) $(BENCH_ARGS)

bench-serving: venv ## load on servers of the toy model, dense and sparse in turns, by SGLang's load generator
	$(BIN)/python -m benchmarks.serving $(BENCH_ARGS)

soak: venv ## mixed traffic with aborts on one server for MINUTES; fails where memory grows or the log has errors
	$(BIN)/python -m benchmarks.serving.soak --minutes $(MINUTES) $(BENCH_ARGS)

bench-real: venv ## likelihood of real documents under a real language model, dense and sparse, on this CPU
	$(BIN)/python -m benchmarks.real$(if $(WORDS),.words) $(BENCH_ARGS)

pictures: venv ## draw the pictures of docs/patterns-in-pictures.md
	$(BIN)/python -m benchmarks.pictures $(BENCH_ARGS)

figures: venv ## write the tables and plots that are made of benchmarks/results
	$(BIN)/python -m benchmarks.figures $(BENCH_ARGS)

test-gpu: venv ## tests of the kernels on this machine's GPU, compute-sanitizer among them
	$(BIN)/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

bench-gpu: venv ## time one layer's sparse prefill on this GPU against dense cuDNN attention
	$(BIN)/python -m benchmarks.gpu.layer $(BENCH_ARGS)

bench-gpu-serving: venv ## time to first token of long videos on this GPU, dense and sparse
	$(BIN)/python -m benchmarks.gpu.serving $(BENCH_ARGS)

gpu-report: ## measure all that is owed on a GPU, with time limits, by PYTHON; DRY=1 shows on a CPU that it works
	$(PYTHON) -m benchmarks.gpu.first_hour $(if $(DRY),--dry-run --output out/gpu-report) $(BENCH_ARGS)

tune: venv ## measure the kernels' launch table on this GPU and write it down
	$(BIN)/python -m benchmarks.gpu.tune $(BENCH_ARGS)

bench-summaries: venv ## what tile summaries would bring
	$(BIN)/python -m benchmarks.method.summaries $(BENCH_ARGS)

fuzz: fuzz-python ## arbitrary requests against the planner, FUZZ_SECONDS long, behind fuzz-python
	@cargo fuzz --version > /dev/null 2>&1 || { echo "needs cargo-fuzz: cargo install cargo-fuzz" >&2; exit 1; }
	cargo fuzz run --fuzz-dir rust/core/fuzz -s none layout -- \
		-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=20 -rss_limit_mb=4096

fuzz-python: venv ## hostile pattern files, settings and media, FUZZ_EXECUTIONS of each
	FUZZ_EXECUTIONS=$(FUZZ_EXECUTIONS) $(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

miri: ## the core's tests under Miri
	@cargo +nightly miri --version > /dev/null 2>&1 || { echo "needs Miri: rustup +nightly component add miri" >&2; exit 1; }
	MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test -p mminference-core

clean: ## remove what builds and tests left; keeps .venv
	rm -rf target rust/core/fuzz/target rust/core/fuzz/corpus rust/core/fuzz/artifacts dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
