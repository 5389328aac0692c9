# make reproduce   set-up, then every experiment, figure and claim of the preset that fits this machine
# make test        set-up, then the whole test suite
# make soak        random operations for SOAK_S seconds (300), with a new seed that is printed (SEED=N repeats one)
# make lint        style of the code and of the rules
# make clean       removes what the pipeline and the tests made; .venv and results/published stay
#
# PYTHON=python3.12 picks another interpreter, VENV=path another place for the environment, RUN=cpu a preset by name.

PYTHON ?= python3
VENV ?= .venv
CORES ?= 1

override VENV := $(abspath $(VENV))
export PATH := $(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(VENV)/bin/python -m pip -qq --no-input

# A stamp names the content that was installed, so set-up runs once per content, not once per file time.
digest = $(shell { cat $(1); echo $(2); } | sha256sum | cut -c1-16)
LOCKED := $(VENV)/.locked-$(call digest,envs/requirements.txt)
PROJECT := $(VENV)/.project-$(call digest,pyproject.toml,$(CURDIR))
ASYNC_IO := $(VENV)/.async_io-$(call digest,envs/requirements.txt)
# DeepSpeed's build imports these, so they are there before it.
BUILD_NEEDS := ^(torch|setuptools|numpy|psutil|py-cpuinfo|packaging)==

.PHONY: help setup reproduce test soak lint clean
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(LOCKED) $(PROJECT) $(ASYNC_IO)

$(LOCKED): envs/requirements.txt
	@envs/check_host.sh $(PYTHON)
	@echo "set-up: installing envs/requirements.txt into $(VENV) (minutes, once)"
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) install $$(grep -E '$(BUILD_NEEDS)' envs/requirements.txt)
	@DS_BUILD_OPS=0 $(PIP) install --no-build-isolation -r envs/requirements.txt
	@rm -f $(VENV)/.locked-* && touch $@

$(PROJECT): $(LOCKED) pyproject.toml
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/.project-* && touch $@

# A rival's part; without it set-up is whole, and the experiment that needs it says what is missing. Each job takes about
# 2 GB of memory, so that one for each core would be too many for a laptop.
$(ASYNC_IO): | $(PROJECT)
	@if echo '#include <libaio.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1; then \
		echo "set-up: building DeepSpeed's async_io (minutes, the first time)"; \
		MAX_JOBS=$${MAX_JOBS:-2} python -m workflow.scripts.streaming_systems.deepspeed_peers || exit 0; \
		rm -f $(VENV)/.async_io-* && touch $@; \
	fi

reproduce: setup
	snakemake --cores $(CORES) all $(if $(RUN),--config run=$(RUN))
	@for table in results/*/claims.md; do echo "$$table: $$(sed -n 3p $$table); figures: paper_figures/"; \
		sed -n '/--forcerun/p' $$table; done

test: setup
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal

SOAK_S ?= 300
soak: setup
	OMP_NUM_THREADS=1 python -m pytest -m long --long $(SOAK_S) $(if $(SEED),--seed $(SEED))

lint: setup
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow/rules
	snakemake --lint

clean:
	rm -rf paper_figures .snakemake .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find results -mindepth 1 -maxdepth 1 ! -name published -exec rm -rf {} + 2>/dev/null || true
	find djinn_core workflow tests -name __pycache__ -prune -exec rm -rf {} +
