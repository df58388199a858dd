# Everything happens in this clone: its own environment in .venv, made by the first target that needs it.
# `make help` lists the targets and the settings.

PYTHON       ?=
TORCH_INDEX  ?=
MODEL        ?=
HTTP_PORT    ?= 8000
GRPC_PORT    ?= 8001
METRICS_PORT ?= 8002
GATEWAY_PORT ?= 9000
TEST_WORKERS ?= 2
ARGS         ?=

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup model serve demo test soak browser lint bench clean clean-all

help: ## List the targets and the settings
	@echo 'Usage: make TARGET [SETTING=value ...]'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'Settings'
	@echo '  PYTHON=path            the Python 3.11 or 3.12 to build .venv with (default: the first that works on PATH)'
	@echo '  TORCH_INDEX=url        an extra package index that has the torch build to use, such as the CPU-only ones'
	@echo '  MODEL=directory        serve: a Hugging Face model directory (default: SmolLM2-135M-Instruct)'
	@echo '  HTTP_PORT=$(HTTP_PORT) GRPC_PORT=$(GRPC_PORT) METRICS_PORT=$(METRICS_PORT) GATEWAY_PORT=$(GATEWAY_PORT)   where the server listens (demo: HTTP_PORT alone)'
	@echo '  TEST_WORKERS=$(TEST_WORKERS)         test: processes that share the test files'
	@echo '  ARGS="..."             serve, demo, test, bench: further arguments of the command'

setup: ## Make or update .venv (at once when nothing changed)
	@python=$$(sh tools/find_python.sh '$(PYTHON)') && "$$python" -I tools/bootstrap.py --torch-index '$(TORCH_INDEX)'

model: setup ## Fetch and convert the default model, once per user (760 MB in ~/.cache/charonia)
	@$(BIN)/python -m charonia.entrypoints.default_model

serve: $(if $(MODEL),setup,model) ## Serve a model in the real Triton server; Ctrl-C stops it
	@exec $(BIN)/charonia serve $(MODEL) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) \
	    --metrics-port $(METRICS_PORT) --gateway-port $(GATEWAY_PORT) $(ARGS)

demo: model ## Stream a chat answer to the terminal, starting the server when none runs
	@exec $(BIN)/charonia demo --http-port $(HTTP_PORT) $(ARGS)

test: model ## Run the tests (ARGS="-k scheduler" for some of them)
	@$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile $(ARGS)

browser: setup ## Fetch a headless Chromium for the tests of the chat page (190 MB in ~/.cache/charonia)
	@$(BIN)/python tools/fetch_browser.py

soak: model ## Ten minutes of load, abuse and an engine kill (ARGS="--minutes 2")
	@$(BIN)/python tests/soak.py $(ARGS)

lint: setup ## Check style, types and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: model ## Compare with transformers on this machine's CPU
	@$(BIN)/python benchmarks/bench_cpu.py $(ARGS)

clean: ## Remove .venv and every cache of this clone
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build
	find engine kernels client tests tools benchmarks model_repository -name __pycache__ -type d -prune \
	    -exec rm -rf {} + 2>/dev/null || true

clean-all: clean ## The same, and the converted default model and the fetched browser
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}"/charonia/models/SmolLM2-135M-Instruct-*
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}"/charonia/browser
