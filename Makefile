# Everything that people and CI run. `make` alone prints the list.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
# Where the tools are. `make BIN=/path/to/venv/bin ...` uses that environment as it is.
BIN := $(VENV)/bin
EXECUTOR ?= ray
GPU ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)
# How many processes run the tests; each file's tests stay in one of them.
JOBS ?= 2
TIMED := $(sort $(wildcard tests/benchmarks/bench_*.py))
STAGES := ingest filter download drift embed centroids cluster forest dedup decontaminate select assemble clean resolve mix

PIP := $(VENV)/bin/python -m pip
WITH_GPU := $(filter-out 0,$(strip $(GPU)))
SETS = $(foreach pair,$(SET),--set '$(pair)')
READY := $(if $(filter file,$(origin BIN)),$(VENV)/.ready$(if $(WITH_GPU),-gpu))

# $(call need,RECIPE OUT): stop with an example unless these variables are given.
example_RECIPE = recipe.yaml
example_OUT = runs/mine
example_KEY = 000120034
example_FOLDER = unmixed
example_MODEL = models/mine
example_BENCH = mme
example_DATA = benchmarks/mme
need = $(foreach name,$(1),$(if $(strip $($(name))),,$(error $(name) is missing. Example: make $@ \
	$(strip $(foreach each,$(1),$(each)=$(or $($(each)),$(example_$(each))))))))

##@ Start here

.PHONY: help
help: ## Print this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z$$()A-Z -]+:.*## / { name = $$1; gsub(/\$$\(STAGES\)/, "$(STAGES)", name); \
	    if (length(name) > 12) printf "  %s\n  %-12s %s\n", name, "", $$2; \
	    else printf "  %-12s %s\n", name, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'Options: SET="stage.key=value ..." (no spaces in a value)  EXECUTOR=local|ray  GPU=1|0'
	@echo '         BIN=/path/to/venv/bin (use that environment instead of $(VENV))'

.PHONY: setup
setup: $(READY) ## Make .venv with the pinned packages (GPU=1: faiss for CUDA; found by itself)

# One resolution under constraints.txt, so that no package can pull another torch in. The build runs
# in the venv itself, whose setuptools is pinned too.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt pip setuptools
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

# Both faiss packages own the same files: take both away, then put the right one back.
$(VENV)/.ready-gpu: $(VENV)/.ready
	$(PIP) uninstall --quiet --yes faiss-cpu faiss-gpu-cu12
	$(PIP) install --quiet --constraint constraints.txt faiss-gpu-cu12
	touch $@

.PHONY: demo
demo: $(READY) ## Make a small world with planted junk and curate it (OUT=warren-demo)
	$(BIN)/warren demo --out '$(or $(OUT),warren-demo)' --executor $(EXECUTOR)

##@ Curate: RECIPE=recipe.yaml OUT=runs/mine

.PHONY: run
run: $(READY) ## Run every stage of a recipe, or go on with a run
	$(call need,RECIPE OUT)
	$(BIN)/warren run '$(RECIPE)' --out '$(OUT)' --executor $(EXECUTOR) $(SETS)

.PHONY: $(STAGES)
$(STAGES): $(READY) ## Run up to this stage; what is finished is reused
	$(call need,RECIPE OUT)
	$(BIN)/warren run '$(RECIPE)' --out '$(OUT)' --to $@ --executor $(EXECUTOR) $(SETS)

##@ Train: RECIPE=recipe.yaml OUT=runs/model

.PHONY: pretrain finetune export
pretrain: $(READY) ## Stage 1: compose the model and train its projector on captions
finetune: $(READY) ## Stage 2: adapters and projector on instruction data (stage 1 first)
export: $(READY) ## All stages, and the trained model as a stock LLaVA directory
pretrain finetune export:
	$(call need,RECIPE OUT)
	$(BIN)/warren train '$(RECIPE)' --out '$(OUT)' --to $@ $(SETS)

.PHONY: preview
preview: $(READY) ## What a stage would train on: labels, shares of tokens, the plan (STAGE=finetune)
	$(call need,RECIPE OUT)
	$(BIN)/warren preview '$(RECIPE)' --out '$(OUT)' $(if $(STAGE),--stage '$(STAGE)') $(SETS)

##@ Ask: OUT=runs/mine

.PHONY: plan
plan: $(READY) ## What a run would reuse, go on with and make (RECIPE=, OUT= to compare with)
	$(call need,RECIPE)
	$(BIN)/warren plan '$(RECIPE)' $(if $(OUT),--out '$(OUT)') $(SETS)

.PHONY: status funnel check
status: $(READY) ## How far a run is; also while it runs and after a crash
funnel: $(READY) ## What each stage kept and dropped, and why
check: $(READY) ## Read everything again and check every invariant
status funnel check:
	$(call need,OUT)
	$(BIN)/warren $@ '$(OUT)'

.PHONY: counts
counts: $(READY) ## Instruction rows per source, beside published counts (STRICT=1: fail if they differ)
	$(call need,OUT)
	$(BIN)/warren counts '$(OUT)' $(if $(filter-out 0,$(STRICT)),--strict)

.PHONY: why
why: $(READY) ## One sample's story (KEY= its key or uid)
	$(call need,OUT KEY)
	$(BIN)/warren why '$(OUT)' '$(KEY)'

.PHONY: unmix
unmix: $(READY) ## Shards back into LLaVA JSON and images (FOLDER=)
	$(call need,OUT FOLDER)
	$(BIN)/warren unmix '$(OUT)' --out '$(FOLDER)'

.PHONY: whatif
whatif: $(READY) ## What other settings would keep, e.g. SET="dedup.similarity_above=0.9"
	$(call need,OUT)
	$(BIN)/warren whatif '$(OUT)' $(SETS)

.PHONY: probe
probe: $(READY) ## What dedup misses: a few rows against all, by brute force
	$(call need,OUT)
	$(BIN)/warren probe '$(OUT)'

##@ Train

.PHONY: chat
chat: $(READY) ## Ask a model about a picture (MODEL= IMAGE= ADAPTER=)
	$(call need,MODEL)
	$(BIN)/warren chat '$(MODEL)' $(if $(IMAGE),--image '$(IMAGE)') \
	  $(if $(ADAPTER),--adapter '$(ADAPTER)')

.PHONY: serve
serve: $(READY) ## The same on a page in the browser (MODEL= ADAPTER= PORT=7860)
	$(call need,MODEL)
	$(BIN)/warren serve '$(MODEL)' --port '$(or $(PORT),7860)' \
	  $(if $(ADAPTER),--adapter '$(ADAPTER)')

##@ Evaluate: MODEL=models/mine BENCH=mme,pope DATA=benchmarks OUT=runs/eval

.PHONY: evaluate
evaluate: $(READY) ## Answer and score benchmarks from files on disk (BENCH=all: the paper's table)
	$(call need,MODEL BENCH DATA)
	$(BIN)/warren eval '$(MODEL)' --bench '$(BENCH)' --data '$(DATA)' \
	  --out '$(or $(OUT),runs/eval)' --set executor=$(EXECUTOR) $(SETS)

##@ Ray

.PHONY: ray-up
ray-up: $(READY) ## Start a Ray cluster on this machine and print its ADDRESS
	$(BIN)/python -m pipelines.cluster up

.PHONY: submit
submit: $(READY) ## Run RECIPE= as a Ray job (OUT=, ADDRESS=http://host:8265; default: ray-up's)
	$(call need,RECIPE OUT)
	$(BIN)/python -m pipelines.cluster submit '$(RECIPE)' --out '$(OUT)' \
	  $(if $(ADDRESS),--address '$(ADDRESS)') $(SETS)

.PHONY: ray-down
ray-down: $(READY) ## End the cluster that ray-up started, and nothing else
	$(BIN)/python -m pipelines.cluster down

##@ Develop

.PHONY: test
test: $(READY) ## Run the tests that CI runs (ARGS="-k name" goes to pytest)
	$(BIN)/python -m pytest -m 'not slow and not gpu' -n $(JOBS) --dist loadfile $(ARGS)

.PHONY: test-slow
test-slow: $(READY) ## Run the long proofs
	$(BIN)/python -m pytest -m 'slow and not gpu' $(ARGS)

.PHONY: lint
lint: $(READY) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(READY) ## Sort imports and format
	$(BIN)/ruff check --fix-only --select I .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(READY) ## Time Warren beside its alternatives: a table in OUT= (BENCH=file ARGS=--quick)
	for file in $(or $(BENCH),$(TIMED)); do $(BIN)/python "$$file" $(if $(OUT),--out '$(OUT)') $(ARGS); done

.PHONY: bench-gpu
bench-gpu: ## The same where torch has CUDA; what needs a missing package is skipped
	nvidia-smi -L
	$(MAKE) bench ARGS='--device cuda $(ARGS)'

.PHONY: demo-models
demo-models: $(READY) ## Train the demo's CLIP, vision tower and language model anew, two hours
	$(BIN)/python -m pipelines.demo.train_model --out pipelines/demo/model
	$(BIN)/python -m pipelines.demo.train_tower --out pipelines/demo/tower
	$(BIN)/python -m pipelines.demo.train_language_model --out pipelines/demo/language_model

.PHONY: wheel
wheel: $(READY) ## Build dist/warren-*.whl
	rm -rf build # else files deleted since the last build would be packed again
	$(BIN)/python -m build --wheel --no-isolation

.PHONY: tidy
tidy: ## Remove caches and build outputs; runs and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find manifests curate train pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +
