# Everything runs in .venv; `make quickstart` needs nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart bridge sweep ui test lint format clean

quickstart: .venv/installed
	$(BIN)/python jobs/compare.py digits

bridge: .venv/installed
	$(BIN)/python jobs/train_bridge.py double-well-3

sweep: .venv/installed
	$(BIN)/python sweeps/tune_cp_weight.py

ui: .venv/installed
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port 5000

# Files in their order, by which the long ones of tests/cluster do not come last.
test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases benchmarks/gpu_step.py benchmarks/gpu benchmarks/bridges.py benchmarks/bridge_step.py jobs sweeps
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
