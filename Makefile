# robustclip: `make` lists what there is.
.DEFAULT_GOAL := help
BIN := .venv/bin
RUN := $(BIN)/python -W ignore::FutureWarning -m robustclip
DEMO := runs/demo

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.venv/ready: pyproject.toml constraints.txt
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing .venv && \
		uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; \
	else \
		python3 -m venv .venv && \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch .venv/ready

demo: .venv/ready ## fine-tune the shapes model with TeCoA and test it on fifteen zero-shot sets, with and without
	@rm -rf $(DEMO)
	$(RUN) test --config zero_shot --results.is_undefended true --evaluation.probes 32 \
		--results.folder $(DEMO) --results.name undefended
	$(RUN) fit --config demo --checkpoint.dirpath $(DEMO)/checkpoints
	$(RUN) test --config demo --ckpt_path $(DEMO)/checkpoints/last.ckpt --evaluation.probes 32 \
		--results.folder $(DEMO) --results.name tecoa --results.baseline $(DEMO)/undefended
	$(RUN) report $(DEMO)/undefended $(DEMO)/tecoa --out $(DEMO)/report.html
	$(RUN) table $(DEMO)/undefended $(DEMO)/tecoa

test: .venv/ready ## run the tests (some 5 minutes on 2 cores)
	$(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/ready ## run the slow tests: kills, resumes and mutated files by the thousand
	$(BIN)/pytest -m slow --numprocesses 2 --dist worksteal

check: .venv/ready ## format, lint, types, import layers and language
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py tests/test_language.py

format: .venv/ready ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv-docs/ready: docs/requirements.txt
	@python3 -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --requirement docs/requirements.txt
	@touch .venv-docs/ready

tour: .venv/ready ## fine-tune the shapes model by all five methods, with one table and one report (minutes)
	$(BIN)/python -W ignore::FutureWarning benchmarks/tour.py

docs: .venv-docs/ready ## build the documentation into build/site, without network; warnings are errors
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

bench: .venv/ready ## time training step and evaluation against the official way and bare loops (minutes)
	$(BIN)/python benchmarks/step.py --out benchmarks/results/step.json
	$(BIN)/python benchmarks/evaluation.py --out benchmarks/results/evaluation.json

.PHONY: help demo test test-slow check format tour docs bench
