#!/usr/bin/env bash
# The whole main job on a small model: install, make the model, plan, convert, verify, and show the result.
# Needs Python 3.11-3.13 and the package registry; no GPU, no model hub.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

step() { printf '\n== %s\n' "$*"; }

step "a small vision-language model in BF16"
[ -f out/demo-model/config.json ] || python scripts/make_demo_model.py out/demo-model 2>/dev/null

step "quantize plan recipes/demo.yaml"
quantize plan recipes/demo.yaml

step "quantize recipes/demo.yaml --fresh"
quantize recipes/demo.yaml --fresh

step "quantize verify out/demo-fp8_dynamic --source out/demo-model"
quantize verify out/demo-fp8_dynamic --source out/demo-model

step "what was published"
ls -l out/demo-fp8_dynamic out/demo-fp8_dynamic/quantize

step "source and result, loaded in transformers"
python scripts/compare_models.py out/demo-fp8_dynamic out/demo-model 2>/dev/null
