#!/usr/bin/env bash
# Installs into .venv and .venv-vllm and runs everything: lint, types, all tests. With --long, kills as often and
# checkpoints as large as it takes to be sure; other arguments go to pytest. The default `pytest` alone is the short part.
# Two processes run the tests (`-n 0`: one): half of what they do is to wait, for imports, for clusters, for windows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bash scripts/setup_vllm.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
.venv/bin/deptry .
export TESTS_NEED_VLLM=1 OMP_WAIT_POLICY=PASSIVE  # threads that spin while they wait would take the other's core
exec .venv/bin/python -m pytest -m "" --durations=10 -n 2 --dist loadfile --no-loadscope-reorder "$@"
