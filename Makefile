# Two commands on a fresh machine: `make demo` and `make test`. Nothing but Python 3.11+ and make is needed.
PYTHON ?= python3
BIN := .venv/bin
export PREFECT_HOME ?= $(CURDIR)/.prefect
export PREFECT_LOGGING_LEVEL ?= WARNING

.PHONY: install browser demo test torture cluster-test bench lint lock

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/python -m natgrad_flows.demo demo

# The report is tested in a real browser. Debian and Ubuntu get one here; elsewhere install Chrome or Chromium.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	$$as_root apt-get update -qq && $$as_root apt-get install -y -qq chromium >/dev/null || \
	echo "no browser could be installed: the tests of the report will say so" >&2

test: lint browser
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -p no:benchmark

# Two hundred processes killed at random moments, and what was lost, doubled or differs after each: a few minutes.
torture: install
	$(BIN)/python tests/torture.py --kills 200 --races 20 --seed 0

# What takes minutes: hosts as network namespaces (as root), links that are cut, servers that restart, PostgreSQL.
cluster-test: install
	@as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	{ command -v ip && ls /usr/lib/postgresql/*/bin/initdb; } >/dev/null 2>&1 || \
	{ $$as_root apt-get update -qq && $$as_root apt-get install -y -qq iproute2 postgresql >/dev/null; }
	$(BIN)/python -m pytest --timeout 900 -p no:benchmark tests/cluster

bench: install
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.watching
	$(BIN)/python -m benchmarks.scale --steps 1e3

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

# The lock holds what needs torch, and what torch needs, but not torch: uv would bring gigabytes of CUDA with it. DeepSpeed needs ninja
# and py-cpuinfo to compile kernels, which its checkpoints do not, BackPACK (of curvlinops) torchvision for its examples, and Bergson names torchvision, torchaudio and bitsandbytes, which it never imports.
lock: install
	printf "%s; sys_platform == 'none'\n" torch torchvision torchaudio bitsandbytes ninja py-cpuinfo | $(BIN)/uv pip compile --quiet --overrides /dev/stdin --python-version 3.11 --universal --no-emit-index-url --no-emit-package torch --no-header --generate-hashes \
		--extra dev --extra writers pyproject.toml --output-file requirements.lock
