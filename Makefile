# `make` lists the targets. Everything made here lies in .venv and in the Docker Engine.
BIN := .venv/bin
IMAGES := python data orchestrator
SHELL := /bin/bash

# Find or make an engine and have the images in it; the rest of the recipe's shell then knows DOCKER_HOST.
with_engine = host=$$(scripts/engine.sh $(1)) && export "$$host" && $(BIN)/python images/build.py --tag $${SANDBOX_TEST_TAG:-latest} $(IMAGES)

PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off
# Every tenth package, and all from the first error on.
pip_progress = awk '/^Collecting/ { if (++n % 10 == 0) print "setup: " n " packages" } /^Installing/ { print "setup: unpacking" } \
    /^ *(ERROR|error|×)/ { failed = 1 } failed { print } { fflush() }'

.PHONY: help setup engine image run test attack chaos bench lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1 /p' $(MAKEFILE_LIST) | while read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

setup: .venv/stamp ## make the virtual environment .venv, as requirements.lock says

.venv/stamp: requirements.lock pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: Python 3.11 or newer is needed; python3 is $$(python3 --version)" >&2; exit 1; }
	@python3 -c 'import ensurepip' 2>/dev/null || scripts/apt.sh python3-venv
	@python3 -m venv .venv
	@echo "setup: installing the locked packages into .venv, about half a minute"
	@set -o pipefail; $(PIP) --require-hashes -r requirements.lock 2>&1 | $(pip_progress)
	@set -o pipefail; $(PIP) --no-deps --no-build-isolation --editable . 2>&1 | $(pip_progress)
	@touch $@

engine: ## find the Docker Engine, or install and start it (root on Debian or Ubuntu)
	@scripts/engine.sh

image: setup ## build the sandbox image, where it is not up to date
	@$(call with_engine)

run: ## everything: set-up, engine, image, service, an example; serves until Ctrl-C
	@scripts/run.sh

test: setup ## lint, types, unit tests, tests on the real engine
	@case $$(uname) in Linux) command -v bwrap >/dev/null || scripts/apt.sh bubblewrap ;; esac
	@case $$(uname) in Linux) [ -e /usr/lib/python3/dist-packages/IPython ] || scripts/apt.sh python3-ipython || true ;; esac
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest tests/unit
	@{ $(call with_engine,--newer); } || { [ "$$CI" != true ] && export SANDBOX_TEST_ENGINE=none && \
	    printf '%s\n' '' '*** NOT TESTED: the real engine. No Docker Engine or no image, so tests/docker is skipped. ***' '' >&2; } && \
	echo "$(BIN)/pytest tests/docker" && $(BIN)/pytest tests/docker

attack: setup ## every hostile case against a live service, and the controls that show that they can fail
	@$(call with_engine) && $(BIN)/python -m tests.attack.run

chaos: setup ## what breaks and what lasts: engine, service, agents and clock in trouble, crowds, the soak; with figures
	@case $$(uname) in Linux) ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 || scripts/apt.sh libfaketime || true ;; esac
	@SANDBOX_TEST_STEPS=5000 $(BIN)/pytest -q tests/unit/test_faults.py
	@$(call with_engine) && $(BIN)/python -m tests.attack.run --only lifecycle,cross-session,chaos --no-controls $(CHAOS)

bench: setup ## measure speed and memory against the floors of this machine
	@$(call with_engine) && $(BIN)/python bench/bench.py && $(BIN)/python bench/egress.py

compile := $(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links
lock: setup ## renew both locks: versions and hashes for every platform, no addresses
	$(compile) --upgrade --extra dev --extra otel --output-file requirements.lock pyproject.toml
	$(compile) --constraint requirements.lock --extra otel --output-file requirements-service.lock pyproject.toml

clean: ## remove .venv and caches; images and engines stay (scripts/engine.sh --stop)
	rm -rf .run .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
