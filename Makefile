# make serve    the light environment, then the service on http://127.0.0.1:3000
# make test     the full environment, then every test
# make lint     ruff and mypy         make format   ruff's formatter
# make models   retrains every embedded model from its recipe (hours on a CPU)
# make scores   scores teachers, controls and students, and writes docs/results.md (hours on a CPU)
# make clean    removes environments and caches, never runs/ or bundles/

VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 3000
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SPEC := pyproject.toml constraints.txt
MODELS := scenes-vae scenes-clip scenes-reward scenes-labeller scenes-teacher scenes-dmd2 scenes-amd \
	digits-reward digits-teacher digits-dmd2 digits-amd \
	scenes-video-vae scenes-video-decoder scenes-umt5 scenes-motion scenes-video-reward scenes-wan-stills scenes-wan-teacher \
	scenes-wan-dmd2 scenes-wan-amd
ASIDE := scenes-latent-reward  # no bundle needs it

.DELETE_ON_ERROR:
.PHONY: serve setup-serve setup test lint format models $(MODELS) $(ASIDE) scores clean help

help:
	@sed -n 's/^# //p' Makefile

serve: setup-serve
	BENTOML_DO_NOT_TRACK=True exec $(BIN)/bentoml serve --host $(HOST) --port $(PORT)

setup-serve: $(VENV)/.serve
setup: $(VENV)/.all

# A stamp per environment: a second start installs nothing. The full environment holds the light one.
$(VENV)/.serve: $(SPEC) | $(BIN)/python
	@echo "installing what serving needs into $(VENV)"
	$(PIP) --editable '.[serve]'
	@touch $@

$(VENV)/.all: $(SPEC) | $(BIN)/python
	@echo "installing everything into $(VENV); torch alone is some gigabytes"
	$(PIP) --editable '.[all]'
	@touch $(VENV)/.serve $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Leapfrog needs Python 3.11 or newer and found none; give one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

test: setup
	$(BIN)/python -m pytest $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each model needs those before it, so they are made in this order; an interrupted one goes on where it stopped.
models: setup
	set -e; for model in $(MODELS); do $(MAKE) $$model; done

$(MODELS) $(ASIDE): setup
	$(BIN)/python -m distill.run recipes/$@.yaml --resume
	bundle=$$(sed -n 's/^output: //p' recipes/$@.yaml); \
		case $$bundle in bundles/*) $(BIN)/python -m distill.export $$bundle --to onnx;; esac

# Every run behind docs/results.md. Teachers and controls are compiled in runs/bundles, so that models/ stays as it is.
# Pictures are made by the fastest runtime, times are of the service's own: FAST= scores with that one throughout.
CONTROLS := scenes-teacher scenes-dmd2 digits-teacher digits-dmd2 scenes-wan-teacher scenes-wan-dmd2
SCENES := scenes-trained scenes-held-out scenes-three scenes-latency
CLIPS := scenes-wan-trained scenes-wan-held-out scenes-wan-fvd scenes-wan-vbench scenes-wan-latency
FAST ?= --runtime openvino --precision bfloat16
SCORE := $(BIN)/python -m eval.run

scores: setup
	mkdir -p runs/bundles
	set -e; for name in $(CONTROLS); do rm -rf runs/bundles/$$name; cp -r models/$$name runs/bundles/$$name; \
		$(BIN)/python -m distill.export runs/bundles/$$name --to onnx; done
	test -d models/digits-cnn || $(BIN)/python -m eval.digits
	set -e; for suite in $(SCENES) scenes-fid; do \
		case $$suite in *-latency) how=;; *) how="$(FAST)";; esac; \
		for steps in 1 2 4; do $(SCORE) bundles/scenes-sdxl --suite $$suite --steps $$steps $$how \
			--label "AMD, $$steps step$$(test $$steps = 1 || echo s)"; done; \
		$(SCORE) runs/bundles/scenes-dmd2 --suite $$suite --steps 4 $$how --label "DMD2, 4 steps"; \
		for steps in 4 50; do $(SCORE) runs/bundles/scenes-teacher --suite $$suite --steps $$steps $$how \
			--label "teacher, $$steps steps"; done; \
		test $$suite = scenes-latency || $(SCORE) renders --suite $$suite --label renders; done
	set -e; for suite in digits digits-latency; do \
		for steps in 1 2 4; do $(SCORE) bundles/digits-sit --suite $$suite --steps $$steps \
			--label "digits AMD, $$steps step$$(test $$steps = 1 || echo s)"; done; \
		$(SCORE) runs/bundles/digits-dmd2 --suite $$suite --steps 4 --label "digits DMD2, 4 steps"; \
		for steps in 4 50; do $(SCORE) runs/bundles/digits-teacher --suite $$suite --steps $$steps \
			--label "digits teacher, $$steps steps"; done; done
	$(BIN)/python -m eval.env create vbench || echo "VBench has no interpreter here; its column stays empty"
	set -e; for suite in $(CLIPS); do \
		if test $$suite = scenes-wan-vbench && ! $(BIN)/python -m eval.doctor --metric vbench-flickering; then continue; fi; \
		case $$suite in *-latency) how=;; *) how="$(FAST)";; esac; \
		for steps in 2 4; do $(SCORE) bundles/scenes-wan --suite $$suite --steps $$steps $$how --label "wan AMD, $$steps steps"; \
			$(SCORE) runs/bundles/scenes-wan-dmd2 --suite $$suite --steps $$steps $$how --label "wan DMD2, $$steps steps"; done; \
		for steps in 4 50; do $(SCORE) runs/bundles/scenes-wan-teacher --suite $$suite --steps $$steps $$how \
			--label "wan teacher, $$steps steps"; done; \
		test $$suite = scenes-wan-latency || $(SCORE) renders --suite $$suite --label renders; done
	for bundle in bundles/*; do $(BIN)/python -m eval.inscribe $$bundle; done
	$(BIN)/python -m eval.results

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
