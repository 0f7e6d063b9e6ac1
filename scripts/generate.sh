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
"$python" -m pipeline schema >recipes/recipe.schema.json
"$python" -m pipeline.recipe.reference >docs/recipe.md
"$python" -c 'from pipeline.doctor.finding import codes_page; print(codes_page(), end="")' >docs/doctor-codes.md
"$python" -c 'from pipeline.verify.codes import codes_page; print(codes_page(), end="")' >docs/verify-codes.md
