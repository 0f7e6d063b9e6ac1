#!/usr/bin/env bash
# Makes .venv with everything that is tested, or reuses it. Sourced or run by the other scripts; needs Python 3.11-3.13.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=scripts/find_python.sh
. scripts/find_python.sh

stamp=$(cat pyproject.toml constraints.txt pipeline/backends/_fp8.c scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/.stamp 2>/dev/null)" != "$stamp" ] || [ ! -x .venv/bin/quantize ]; then
    echo "setup: installing into .venv (some minutes the first time)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # torch first and by itself: where a CPU build is on offer, pip prefers it
    .venv/bin/python -m pip install --quiet "torch==2.13.0"
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
    # for tests alone: a newer transformers, which loads what the pinned one cannot (see tests/test_equal_llmcompressor.py)
    rm -rf .venv/newer-transformers
    .venv/bin/python -m pip install --quiet --no-deps --target .venv/newer-transformers \
        transformers==5.17.0 tokenizers==0.23.2
    echo "$stamp" >.venv/.stamp
fi
.venv/bin/python - <<'PY'
from pipeline.backends.fp8 import kernel
if kernel() is None:
    print("setup: no C compiler was found; quantizing goes through compressed-tensors instead: same bits, slower")
PY
