"""The third verdict: a checkpoint that this vLLM cannot judge is neither sound nor unsound.

Either vLLM has no class for its architecture, or none that works without custom code or a library that is not there; or
this build, on this machine, has no kernel for its layout. What decides is where an exception came from and what vLLM's
registries hold (`vllm_env/jobs/origin.py`), never what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.verify.report import Finding

NOT_VALIDATED = "not validated (not proven in vLLM)"
# vLLM's modules that choose or run kernels: what they raise is about this build and this machine
KERNELS = (
    "vllm._custom_ops.",
    "vllm.attention.",
    "vllm.model_executor.kernels.",
    "vllm.model_executor.layers.fused_moe.oracle.",
    "vllm.platforms.",
    "vllm.v1.attention.",
)
REGISTRY = "vllm.model_executor.models.registry."
CUSTOM_CODE = "transformers.dynamic_module_utils."
# its functions elsewhere that hold a layout against the machine's capability
CAPABILITY = (
    "vllm.config.vllm._get_quantization_config",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors._check_scheme_supported",
)


def unjudged(record: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> Finding | None:
    """What this vLLM lacks to judge a checkpoint whose load or engine failed; None where the failure is its verdict.

    Args:
        record: of `vllm_env.jobs.load.check` or `generate.run`, with an ``error``.
        baseline: the load of the source, whose class is the same: what vLLM has a class for, it has one for here.
    """
    if record.get("lost") or record.get("cut_off") or not record.get("raised"):
        return None
    error, raised = record["error"], record["raised"]
    what = "not generated" if raised["phase"] == "engine" else NOT_VALIDATED
    if (baseline is None or baseline["error"]) and (lacking := _without_class(record)):
        return Finding("vllm-no-class", "config.json", f"{what}: this vLLM has no class for {lacking}: {error}")
    if raised["phase"] == "weights":
        return None  # vLLM's loader runs no kernel
    if raised["frames"] and raised["frames"][0].startswith(CUSTOM_CODE):
        text = f"{what}: vLLM needs custom code for it (auto_map), which is not run here: {error}"
        return Finding("vllm-no-class", "config.json", text)
    method = record.get("quant_method")
    if method is not None and not method["known"]:
        text = f"{what}: this vLLM knows no quantization method {method['named']!r}: {error}"
        return Finding("vllm-no-kernel", "", text)
    if without_kernel(record):
        where = "this build of vLLM, for CPUs," if record.get("platform") == "cpu" else "this vLLM, on this machine,"
        return Finding("vllm-no-kernel", "", f"{what}: {where} has no kernel for it: {error}")
    if "ImportError" in raised["bases"]:
        return Finding("vllm-no-class", "", f"{what}: a library is not in vLLM's environment: {error}")
    return None


def _without_class(record: Mapping[str, Any]) -> str | None:
    """The architectures that vLLM, or this build of it, has no class for; None where it has one.

    With transformers' own class, which vLLM then may take, the load check has no experience.
    """
    found = record.get("architectures")
    if found is None or not found["named"]:
        return None
    registry = any(frame.startswith(REGISTRY) for frame in record["raised"]["frames"])  # also of a class within another
    return ", ".join(found["named"]) if registry or not found["usable"] else None


def without_kernel(record: Mapping[str, Any]) -> bool:
    """Whether an exception came from where vLLM, or torch, looks for a kernel."""
    raised = record.get("raised") or {}
    if not raised or raised["phase"] == "weights":
        return False  # that is vLLM's loader, which runs no kernel
    frames = raised["frames"]
    if "NotImplementedError" in raised["bases"] or (frames and frames[0].startswith("torch._ops.")):
        return True
    own = next((frame for frame in frames if frame.startswith("vllm.")), "")
    return own.startswith(KERNELS) or own in CAPABILITY
