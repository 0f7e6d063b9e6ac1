#!/usr/bin/env bash
# The whole main job on a small model: install, make the model, plan, smoke test, calibrate and convert, prove the result
# in vLLM, show it.
# Needs Python 3.11-3.13 and the package registry; no GPU, no model hub.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bash scripts/setup_vllm.sh
export PATH="$PWD/.venv/bin:$PATH"

step() { printf '\n== %s\n' "$*"; }

step "a small vision-language model in BF16"
[ -f out/demo-model/config.json ] || python scripts/make_demo_model.py out/demo-model 2>/dev/null

step "quantize plan recipes/demo.yaml"
quantize plan recipes/demo.yaml

step "quantize recipes/demo.yaml --smoke                       (the first layers, and an estimate)"
quantize recipes/demo.yaml --smoke

step "quantize recipes/demo.yaml --fresh                       (ModelOpt FP8 with FP8 KV scales; ends in vLLM's engine)"
quantize recipes/demo.yaml --fresh

step "quantize verify out/demo-fp8-kv_fp8 --source out/demo-model"
quantize verify out/demo-fp8-kv_fp8 --source out/demo-model

step "the same checkpoint without its KV scales: what vLLM would make of it"
rm -rf out/demo-damaged && cp -r out/demo-fp8-kv_fp8 out/demo-damaged
rm -r out/demo-damaged/quantize   # as if someone else had made it
python - <<'PY'
import json
from pathlib import Path
from safetensors.torch import load_file, save_file

root = Path("out/demo-damaged")
index = json.loads((root / "model.safetensors.index.json").read_text())
for path in root.glob("*.safetensors"):
    kept = {name: t for name, t in load_file(path).items() if not name.endswith(("k_scale", "v_scale"))}
    save_file(kept, path, metadata={"format": "pt"})
index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.endswith(("k_scale", "v_scale"))}
(root / "model.safetensors.index.json").write_text(json.dumps(index))
PY
if quantize verify out/demo-damaged >out/demo-damaged.txt; then
    echo "the damage was not seen" >&2
    exit 1
fi
grep PROBLEM out/demo-damaged.txt

step "what was published"
ls -l out/demo-fp8-kv_fp8 out/demo-fp8-kv_fp8/quantize

step "KV scales in the checkpoint, as vLLM will read them"
python - <<'PY'
from pathlib import Path
from safetensors import safe_open

for path in sorted(Path("out/demo-fp8-kv_fp8").glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            if name.endswith(("k_scale", "v_scale", "q_scale", "prob_scale")) and ".layers.0." in name:
                print(f"{name:58} {file.get_tensor(name).item():.6f}")
PY

step "quantize/serve.yaml, for vllm serve --config"
cat out/demo-fp8-kv_fp8/quantize/serve.yaml

step "source and result, side by side in transformers"
python scripts/compare_models.py out/demo-fp8-kv_fp8 out/demo-model 2>/dev/null

step "the same model with backend=llmcompressor scheme=fp8_dynamic, KV scales calibrated as well"
quantize recipes/demo.yaml --fresh backend=llmcompressor scheme=fp8_dynamic output=out/demo-fp8_dynamic-kv_fp8 verify=load
python scripts/compare_models.py out/demo-fp8_dynamic-kv_fp8 out/demo-model 2>/dev/null

step "your own model: these lines, from this directory, with another MODEL"
cat <<'LINES'
export PATH="$PWD/.venv/bin:$PWD/.venv-vllm/bin:$PATH"
MODEL=out/demo-model   # a directory, or an id on the hub
quantize recipes qwen3_vl_8b-fp8_dynamic -o my.yaml
quantize my.yaml "model.source=$MODEL" output=out/mine
vllm serve out/mine --config out/mine/quantize/serve.yaml
LINES
