#!/usr/bin/env bash
# Writes what is generated from the code: the shipped recipes, their schema, docs/recipe.md. Tests hold each of them current.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
"$python" - <<'PY'
from pathlib import Path

from pipeline.recipe.shipped import shipped

for name, recipe in shipped().items():
    Path(f"recipes/{name}.yaml").write_text(recipe.text(), encoding="utf-8")
PY
page() { "${@:2}" >"$1.new" && mv "$1.new" "$1"; }  # a failure leaves the page as it was
page recipes/recipe.schema.json "$python" -m pipeline schema
page docs/recipe.md "$python" -m pipeline.recipe.reference
page docs/doctor-codes.md "$python" -c 'from pipeline.doctor.finding import codes_page; print(codes_page(), end="")'
page docs/verify-codes.md "$python" -c 'from pipeline.verify.codes import codes_page; print(codes_page(), end="")'
