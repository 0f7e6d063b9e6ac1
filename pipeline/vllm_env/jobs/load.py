"""The load check: vLLM's own model and its own weight loader, and a record of what went where. No GEMM runs.

Headers-only: the model stands on the meta device, large tensors are passed as shapes, and only what is small (scales)
is read; so a checkpoint of any size needs seconds and the memory of the imports. What vLLM then would use as KV scales
is computed by its own code, on real values.
"""

from __future__ import annotations

import logging
import os
import resource
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.source import INDEX, Tensor, parse_index, read_header

SMALL = 4096  # values; scales are
CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "prob_scale")
ZERO_POINTS = ("k_zero_point", "v_zero_point", "q_zero_point")  # compressed-tensors' own; symmetric schemes have none
SCALE_ENDS = tuple(f".{name}" for name in (*CACHE_SCALES, "kv_scale"))
FP8 = ("F8_E4M3", "F8_E5M2")


class Warnings(logging.Handler):
    """Keeps what vLLM logs as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line once."""
        line = record.getMessage()
        if line not in self.lines:
            self.lines.append(line)

    def attach(self) -> None:
        """Listen to vLLM; again after anything that configures its logging anew."""
        logger = logging.getLogger("vllm")
        if self not in logger.handlers:
            logger.addHandler(self)


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Load one checkpoint.

    Args:
        job: ``checkpoint``, a directory; ``kv``, the --kv-cache-dtype; ``dtype``; ``max_model_len``.

    Returns:
        Plain data: ``error`` (vLLM's own, or null), ``unconsumed`` tensors, ``unfilled`` and ``partly`` filled
        parameters, ``twice`` (parameters that more was loaded into than they hold, with the tensors), ``crossed`` (FP8
        codes in a plain parameter or the reverse, with dtypes), ``linears`` (module to quantization method),
        ``attention`` (of each layer: dtype of its cache, the scales it will use and the tensors they came from),
        ``cache_names`` (tensors that vLLM's own mapping takes for cache scales, with the names that it gives them),
        ``warnings``, versions, seconds and memory; ``raised`` (see `origin.of`) beside an error, and what vLLM knows of
        the config: ``architectures`` and ``quant_method``, see `origin.registered`.
    """
    import vllm
    from vllm.platforms import current_platform

    from pipeline.vllm_env.jobs import cpu, origin

    begin = time.monotonic()
    cpu.fill_in()
    seen = Warnings()
    seen.attach()
    tensors = _tensors(Path(job["checkpoint"]))
    result: dict[str, Any] = {
        "vllm": vllm.__version__,
        "platform": current_platform.device_type,
        "tensors": len(tensors),
        "error": None,
    }
    try:
        result |= _load(job, tensors, seen)
    except Exception as error:  # vLLM raises what it likes; what it says is the finding
        result |= {"error": sentence(error), "raised": origin.of(error, "model")}
    if result["error"]:
        result |= origin.registered(Path(job["checkpoint"]))
    result["warnings"] = seen.lines
    result["seconds"] = {"imports": job["imports"], "check": time.monotonic() - begin}
    result["rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def _load(job: dict[str, Any], tensors: dict[str, tuple[Path, Tensor]], seen: Warnings) -> dict[str, Any]:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    from pipeline.vllm_env.jobs import origin

    config = EngineArgs(
        model=job["checkpoint"],
        enforce_eager=True,
        max_model_len=job["max_model_len"],
        max_num_seqs=2,
        max_num_batched_tokens=job["max_model_len"],
        dtype=job.get("dtype", "auto"),
        kv_cache_dtype=job["kv"],
        kv_cache_memory_bytes=64 << 20,
    ).create_engine_config()
    seen.attach()
    with set_current_vllm_config(config):
        alone()
        with default_dtype(config.model_config.dtype), torch.device("meta"):
            model = initialize(config)
        attention = _attention_layers(model)
        _real_cache_scales(attention, config.model_config.dtype)
        names = _cache_names(config.quant_config, tensors)
        record = _Record(model)
        error, raised = None, None
        try:
            model.load_weights(record.feed(tensors, names))
        except Exception as found:
            error = sentence(found) + (f" (at {record.current})" if record.current else "")
            raised = origin.of(found, "weights")
        sources = {
            name: {scale: record.sources.get(f"{name}.{scale}", [None])[0] for scale in CACHE_SCALES}
            for name, _ in attention
        }
        if error is None and (after := _finish(attention)) is not None:
            error, raised = sentence(after), origin.of(after, "weights")
        return {
            "error": error,
            **({"raised": raised} if raised else {}),
            "cache_names": names,
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "quantization": config.model_config.quantization,
            **record.findings(tensors),
            "linears": _methods(model),
            "attention": [
                {
                    "name": name,
                    "cache": str(getattr(layer, "kv_cache_dtype", "auto")),
                    **{scale: _value(layer, scale) for scale in CACHE_SCALES},
                    "from": sources[name],
                }
                for name, layer in attention
            ],
        }


class _Record:
    """Which tensor went into which parameter, and how much of each parameter was filled."""

    def __init__(self, model: Any) -> None:
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.filled: Counter[str] = Counter()
        self.hits: dict[str, list[str]] = defaultdict(list)  # tensor → parameters
        self.sources: dict[str, list[str]] = defaultdict(list)  # parameter → tensors
        self.current = ""
        self.padding = _padding(model)
        for name, parameter in self.parameters.items():
            loader = getattr(parameter, "weight_loader", None) or default_weight_loader
            wrapped = self._wrap(name, loader)
            try:
                parameter.weight_loader = wrapped
            except AttributeError:  # vLLM's own parameters have a property of that name
                parameter._weight_loader = wrapped

    def _wrap(self, name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        def load(*args: Any, **named: Any) -> Any:
            weight = named["loaded_weight"] if "loaded_weight" in named else args[1]
            self.filled[name] += weight.numel()
            self.hits[self.current].append(name)
            self.sources[name].append(self.current)
            if weight.is_meta and not self.parameters[name].is_meta:  # some classes name a device (Qwen3.5's norms)
                weight = weight.new_zeros(weight.shape, device=self.parameters[name].device)
                if "loaded_weight" in named:
                    named["loaded_weight"] = weight
                else:
                    args = (args[0], weight, *args[2:])
            return loader(*args, **named)

        return load

    def feed(self, tensors: dict[str, tuple[Path, Tensor]], scales: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
        """What vLLM's loader iterates over: tensors as shapes, `scales` of the cache as they are."""
        import torch

        for name, (path, tensor) in tensors.items():
            self.current = name
            count = 1
            for length in tensor.shape:
                count *= length
            if count > SMALL:
                yield name, torch.empty(tensor.shape, dtype=_dtype(tensor.dtype), device="meta")
                continue
            value = _read(path, tensor)
            yield name, value if name in scales or name.endswith(SCALE_ENDS) else value.to("meta")
        self.current = ""

    def findings(self, tensors: dict[str, tuple[Path, Tensor]]) -> dict[str, Any]:
        """See `check`."""
        sizes = {name: p.numel() - self.padding.get(name, 0) for name, p in self.parameters.items()}
        plain = [name for name in self.parameters if not name.endswith((*CACHE_SCALES, *ZERO_POINTS))]
        crossed = []
        for name, parameters in self.hits.items():
            if not name:
                continue
            stored = tensors[name][1].dtype
            for parameter in dict.fromkeys(parameters):
                kept = str(self.parameters[parameter].dtype).removeprefix("torch.")
                weight = parameter.endswith("weight")
                if (stored in FP8) != kept.startswith("float8") and (weight or stored in FP8):
                    crossed.append({"tensor": name, "stored": stored, "parameter": parameter, "kept": kept})
        return {
            "unconsumed": sorted(name for name in tensors if not self.hits.get(name)),
            "unfilled": sorted(name for name in plain if not self.filled[name] and sizes[name]),
            "partly": {
                name: [self.filled[name], sizes[name]]
                for name in plain
                if 0 < self.filled[name] < sizes[name] and not self._one_scale(name)
            },
            "twice": {
                name: sorted(set(self.sources[name]))
                for name in plain
                if name.endswith(("weight", "bias"))  # parts of what is fused share places for scales and shapes
                and self.filled[name] > self.parameters[name].numel()
                and len(set(self.sources[name])) > 1
            },
            "crossed": crossed,
        }

    def _one_scale(self, name: str) -> bool:
        """Weights fused in the checkpoint have one scale; vLLM leaves the other parts' places as they are."""
        if not name.endswith(("weight_scale", "input_scale")):
            return False
        return len(set(self.sources[name.rpartition(".")[0] + ".weight"])) == 1


def _padding(model: Any) -> dict[str, int]:
    """By parameter, the values of vocabulary rows that vLLM adds for alignment and no checkpoint fills."""
    found = {}
    for name, module in model.named_modules():
        rows, padded = getattr(module, "org_vocab_size", None), getattr(module, "num_embeddings_padded", None)
        weight = getattr(module, "weight", None)
        if rows is not None and padded is not None and weight is not None and weight.ndim == 2:
            found[f"{name}.weight"] = (weight.shape[0] - rows) * weight.shape[1] if weight.shape[0] == padded else 0
    return found


def _tensors(root: Path) -> dict[str, tuple[Path, Tensor]]:
    """Every tensor that vLLM would be given: of the shards in the index, or of all where there is none."""
    from safetensors import safe_open

    index = root / INDEX
    names = list(parse_index(index)) if index.exists() else sorted(path.name for path in root.glob("*.safetensors"))
    for name in names:
        with safe_open(root / name, "pt"):  # the library's own word on the header
            pass
    return {tensor.name: (root / name, tensor) for name in names for tensor in read_header(root / name)[1].values()}


def _read(path: Path, tensor: Tensor) -> Any:
    import torch

    with path.open("rb") as file:
        file.seek(tensor.offset)
        raw = bytearray(file.read(tensor.nbytes))
    kind = _dtype(tensor.dtype)
    return torch.frombuffer(raw, dtype=kind).reshape(tensor.shape) if raw else torch.empty(tensor.shape, dtype=kind)


def _dtype(name: str) -> Any:
    import torch

    return {
        "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
        "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool, "F8_E8M0": torch.float8_e8m0fnu,
        "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    }[name]  # fmt: skip


# --- vLLM, 0.24 to 0.32 ------------------------------------------------------------------------------


def alone() -> None:
    """A process group of one."""
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    meeting = f"file://{tempfile.mkdtemp()}/{os.getpid()}"
    init_distributed_environment(1, 0, meeting, 0, backend="gloo")
    ensure_model_parallel_initialized(1, 1)


def default_dtype(dtype: Any) -> Any:
    """A context in which torch makes tensors of this dtype."""
    from vllm.utils.torch_utils import set_default_torch_dtype

    return set_default_torch_dtype(dtype)


def initialize(config: Any) -> Any:
    """vLLM's model for a config, without weights."""
    from vllm.model_executor.model_loader.utils import initialize_model

    return initialize_model(config)


def _attention_layers(model: Any) -> list[tuple[str, Any]]:
    """The layers with a KV cache. Vision attention has none."""
    try:
        from vllm.model_executor.layers.attention import Attention
    except ImportError:
        from vllm.attention.layer import Attention
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]


def _real_cache_scales(attention: list[tuple[str, Any]], dtype: Any) -> None:
    """Cache scales in memory instead of on the meta device, made by vLLM's own method once more."""
    import torch

    with default_dtype(dtype), torch.device("cpu"):
        for _, layer in attention:
            for name in CACHE_SCALES:
                setattr(layer, f"_{name}", torch.tensor(1.0, dtype=torch.float32))
            for name in ("_k_scale_cpu", "_v_scale_cpu"):
                if hasattr(layer, name):
                    setattr(layer, name, torch.tensor(1.0, dtype=torch.float32))
            if getattr(layer, "quant_method", None) is not None and hasattr(layer, "k_scale"):
                layer.quant_method.create_weights(layer)


def _cache_names(quantization: Any, names: Iterable[str]) -> dict[str, str]:
    """Those of `names` that vLLM takes for scales of a KV cache, with the names that its own mapping gives them."""
    method = getattr(quantization, "get_cache_scale_mapper", None)  # AutoFP8's and Quark's names are their methods'
    if method is not None:
        translate = method().map_name
    else:
        from vllm.model_executor.model_loader.weight_utils import maybe_remap_kv_scale_name

        before = getattr(quantization, "get_cache_scale", None)  # before 0.32

        def translate(name: str) -> str | None:
            found: str | None = (before(name) if before else None) or maybe_remap_kv_scale_name(name, _AnyAttention())
            return found

    found = {name: translate(name) for name in names if "scale" in name.rpartition(".")[2]}
    ends = tuple(f"attn.{scale}" for scale in CACHE_SCALES)
    return {name: new for name, new in found.items() if new is not None and new.endswith(ends)}


class _AnyAttention(dict[str, Any]):
    """Stands for a model's parameters, with those of an attention layer wherever a name may lead."""

    def __contains__(self, name: object) -> bool:
        return ".attn." in str(name)


def _finish(attention: list[tuple[str, Any]]) -> Exception | None:
    """What vLLM does to the cache scales after loading; what it raises, or None."""
    try:
        for _, layer in attention:
            if getattr(layer, "quant_method", None) is not None and hasattr(layer, "k_scale"):
                layer.quant_method.process_weights_after_loading(layer)
    except Exception as error:
        return error
    return None


def _value(layer: Any, scale: str) -> Any:
    value = getattr(layer, f"_{scale}", None)
    if value is None:
        return None
    values = value.float().reshape(-1).tolist()
    return values[0] if len(values) == 1 else values


def _methods(model: Any) -> dict[str, str]:
    found = {}
    attention = {name for name, _ in _attention_layers(model)}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and name not in attention:
            scheme = getattr(module, "scheme", None)
            found[name] = type(method).__name__ + (f":{type(scheme).__name__}" if scheme is not None else "")
    return found


def sentence(error: BaseException) -> str:
    """What an exception says, on one line; where it says nothing, the line that raised it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if lines:
        return f"{type(error).__name__}: {' '.join(lines)[:500]}"
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    return type(error).__name__ + "".join(f" at {Path(f.filename).name}:{f.lineno}, {f.line}" for f in frame)
