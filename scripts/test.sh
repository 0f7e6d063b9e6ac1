#!/usr/bin/env bash
# Installs into .venv and .venv-vllm and runs everything: lint, types, all tests. With --long, kills as often and
# checkpoints as large as it takes to be sure; other arguments go to pytest. The default `pytest` alone is the short part.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bash scripts/setup_vllm.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
.venv/bin/deptry .
TESTS_NEED_VLLM=1 exec .venv/bin/python -m pytest -m "" --durations=10 "$@"
