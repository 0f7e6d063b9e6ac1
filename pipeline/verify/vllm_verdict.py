"""What vLLM's load check and its engine's answers mean, in plain words.

vLLM is silent about most mistakes: what no tensor fills runs as memory left it, what no pattern ignores is cast to
FP8, and a cache without scales runs at 1.0. The same record of the BF16 source tells whose mistake it is, and does not
excuse it: a source that lacks its head makes a result that lacks its head. What is vLLM's own habit has codes of its
own (vllm-tensor-needless, vllm-warning) or stands in `HABITS`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.checkpoint.source import FLOAT_DTYPES, Checkpoint, SourceError
from pipeline.checkpoint.values import scalar
from pipeline.formats.methods import promised_cache
from pipeline.journal import read_identity
from pipeline.model.selection import select
from pipeline.verify.report import Finding, Report
from pipeline.verify.unjudged import NOT_VALIDATED, unjudged

ABOUT_SCALES = re.compile(r"scal(e|ing)|dtype|calibrat", re.IGNORECASE)
ROUNDING = 2.0**-8  # of a scale that becomes BF16
# Parameters that vLLM's class for an architecture fills past the loaders that the load check watches
HABITS = {"GptOssForCausalLM": re.compile(r"\.sinks$|\.experts\.")}
REPAIR = (
    "fix its environment and run the same command again, or choose verify: structure, which proves nothing about "
    "serving"
)
MAX_RATIO = 1.1  # of perplexities in one engine; 8 bits cost a percent, a wrong scale much more
MAX_DROP = 1.0  # nats a token, over the source's own greedy answer
GUESSING = 0.999  # of the vocabulary's size: the perplexity of equal probabilities, but for rounding
MEND = "mend the source, and convert it again"


def judge_load(
    result: Checkpoint,
    loads: Mapping[str, dict[str, Any]],
    baseline: dict[str, Any] | None,
    report: Report,
    clean: bool = True,
    lacking: Callable[[], list[str] | None] = lambda: None,
) -> bool:
    """Judge what the load check saw.

    Args:
        result: the quantized checkpoint.
        loads: by --kv-cache-dtype, what `vllm_env.jobs.load.check` returned.
        baseline: the same of the source; None where there is none.
        report: findings go here.
        clean: no earlier check found a problem.
        lacking: asks transformers' class what the source lacks, where vLLM refuses both; see `completeness.by_class`.

    Returns:
        Whether vLLM loaded it, so that something is validated if no problem was found.
    """
    promised, sound = promised_cache(result), dict(loads)
    for kv, load in loads.items():
        if not load["error"]:
            continue
        if load.get("lost"):
            report.add("vllm-not-run", "", f"vLLM could not be run: {load['error']}", REPAIR)
        elif (cannot := unjudged(load, baseline)) is not None:
            report.take(cannot)
        elif baseline is not None and baseline["error"] and not baseline.get("lost"):  # vLLM's own word on it
            _add_refused_alike(load, baseline, lacking, report)
        elif kv != "auto" and promised is None:
            text = f"vLLM does not start with --kv-cache-dtype {kv}: {load['error']}"
            report.add("vllm-cannot-start", f"--kv-cache-dtype {kv}", text)
            del sound[kv]
            continue
        else:
            text = f"vLLM cannot load it with --kv-cache-dtype {kv}: {load['error']}"
            report.add("vllm-cannot-load", f"--kv-cache-dtype {kv}", text)
        return False
    before = baseline if baseline is not None and not baseline["error"] else None
    found = {
        kv: list(_findings(result, load, before, "fp8" if kv == "fp8" else promised)) for kv, load in sound.items()
    }
    for kv, findings in found.items():
        for finding in findings:
            if not all(finding in others for others in found.values()):
                finding = replace(finding, text=f"with --kv-cache-dtype {kv}: {finding.text}")
            if finding not in report.findings:
                report.take(finding)
    attention = next(iter(sound.values()))["attention"]
    if promised is None and "fp8" not in loads:
        report.add(
            "kv-scales-absent",
            "",
            f"no KV scales: with --kv-cache-dtype fp8 the attention of {len(attention)} layers would run at KV scale "
            "1.0",
            "serve it with --kv-cache-dtype auto",
        )
    elif not attention:
        text = "vLLM runs this model's attention in a way whose scales are not looked at here"
        report.add("attention-not-judged", "", text)
    _add_loaded(sound, clean and "fp8" in sound and bool(attention), report)
    return True


def _add_refused_alike(
    load: Mapping[str, Any], baseline: Mapping[str, Any], lacking: Callable[[], list[str] | None], report: Report
) -> None:
    """vLLM refuses source and result: the source is the cause, unless it is whole, and only not as vLLM's class has it.

    LLaVA and Gemma 3 as transformers 5 saves them are such: transformers loads them, vLLM finds no place for a tensor.
    """
    raised = load.get("raised") or {"phase": "", "frames": []}
    class_ = any(frame.startswith("vllm.model_executor.models.") for frame in raised["frames"])
    lost = lacking() if class_ or raised["phase"] == "weights" else None  # not the config, nor a processor
    if lost == []:
        text = (
            f"{NOT_VALIDATED}: this vLLM does not load the source either, which is whole by "
            f"transformers' own class: {baseline['error']}"
        )
        report.add("vllm-cannot-load-source", "", text)
        return
    why = f" ({lost[0]})" if lost else ""
    text = f"vLLM cannot load it, and refuses the source alike, which is the cause{why}: {baseline['error']}"
    report.add("vllm-refuses-source", "", text, MEND)


def _add_loaded(loads: Mapping[str, dict[str, Any]], scaled: bool, report: Report) -> None:
    """Add to what is in order: how much vLLM took up, and with which scales its attention runs."""
    first = loads.get("fp8") or next(iter(loads.values()))
    methods = Counter(first["linears"].values())
    report.checked.append(
        f"vLLM {first['vllm']} ({first['platform']}) loads it with --kv-cache-dtype {' and '.join(loads)}: "
        f"{first['tensors'] - len(first['unconsumed'])} of {first['tensors']} tensors taken up; modules by method: "
        + ", ".join(f"{count} {method}" for method, count in methods.most_common())
    )
    if scaled and not report.problems:
        warned = {line for load in loads.values() for line in load["warnings"] if ABOUT_SCALES.search(line)}
        given = [key for key in ("k", "v", "q", "prob") if all(a["from"][f"{key}_scale"] for a in first["attention"])]
        report.checked.append(
            f"vLLM runs the attention of {len(first['attention'])} layers with an FP8 cache and the checkpoint's "
            f"scales ({', '.join(given)}); warnings about scales or dtypes: {len(warned) or 'none'}"
        )


def _findings(
    result: Checkpoint, load: dict[str, Any], before: dict[str, Any] | None, cache: str | None
) -> Iterator[Finding]:
    """What one load shows; `cache` is the dtype that its KV cache should have, None for the model's own."""
    yield from _names(result, load, before)
    if cache is not None:
        yield from _cache(result, load, cache)
    usual = set(before["warnings"]) if before else set()
    alike: dict[str, list[str]] = {}
    for line in load["warnings"]:
        if line not in usual and (before is not None or ABOUT_SCALES.search(line)):
            alike.setdefault(re.sub(r"\S*\d\S*", "", line), []).append(line)
    for lines in alike.values():
        about_scales = cache is not None and not _is_exact(result) and ABOUT_SCALES.search(lines[0])
        text = f"vLLM warns: {lines[0][:300]}" + (f" ({len(lines)} such lines)" if len(lines) > 1 else "")
        if "q scaling factor" in lines[0]:
            text += " (what it uses in truth is 1.0)"
        yield Finding("vllm-scale-warning" if about_scales else "vllm-warning", "", text)


def _is_exact(result: Checkpoint) -> bool:
    """Whether it was produced by this tool in ModelOpt's exact layout, which makes vLLM warn, and is asked for."""
    identity = read_identity(result.root) or {}
    return bool((identity.get("backend_options") or {}).get("exact"))


def _names(result: Checkpoint, load: dict[str, Any], before: dict[str, Any] | None) -> Iterator[Finding]:
    """Tensors that go nowhere or to the wrong place, parameters that nothing fills."""
    cast = [entry for entry in load["crossed"] if not entry["stored"].startswith("F8")]
    plain = [entry for entry in load["crossed"] if entry["stored"].startswith("F8")]
    if cast:
        yield Finding(
            "vllm-casts-weight",
            cast[0]["tensor"],
            f"{cast[0]['tensor']}: {cast[0]['stored']} weights that vLLM casts to FP8 with a scale that nothing sets, "
            f"{_in_all(cast)}: the config's ignore list does not cover vLLM's {_module(cast[0]['parameter'])}",
        )
    if plain:
        yield Finding(
            "vllm-fp8-as-plain",
            plain[0]["tensor"],
            f"{plain[0]['tensor']}: FP8 values that vLLM takes for {plain[0]['kept']} weights, {_in_all(plain)}: the "
            "config does not say that they are quantized",
        )
    told = {_module(entry["parameter"]) for entry in load["crossed"]}
    habits = [HABITS[name] for name in result.config.get("architectures") or [] if name in HABITS]
    seen = before or {"unfilled": [], "partly": {}, "twice": {}, "unconsumed": []}
    for cause in (None, before) if before else (None,):

        def asked(name: str, alike: bool, cause: dict[str, Any] | None = cause) -> bool:
            habit = alike and any(pattern.search(name) for pattern in habits)
            return alike == (cause is not None) and not habit and _module(name) not in told

        unfilled = [name for name in load["unfilled"] if asked(name, name in seen["unfilled"])]
        if unfilled:
            text = (
                f"{unfilled[0]}: nothing in the checkpoint fills this parameter of vLLM's, {_in_all(unfilled)}; it "
                "would run with what memory held"
            )
            yield _caused(Finding("vllm-parameter-unfilled", unfilled[0], text), cause)
        partly = {name: part for name, part in load["partly"].items() if asked(name, seen["partly"].get(name) == part)}
        if partly:
            name, (filled, size) = next(iter(partly.items()))
            text = f"{name}: the checkpoint fills {filled:,} of {size:,} values, {_in_all(partly)}"
            yield _caused(Finding("vllm-parameter-partly-filled", name, text), cause)
        twice = {name: tensors for name, tensors in load["twice"].items() if asked(name, name in seen["twice"])}
        if twice:
            name, tensors = next(iter(twice.items()))
            text = f"{name}: {' and '.join(tensors[:2])} both fill this parameter of vLLM's, {_in_all(twice)}"
            yield _caused(Finding("vllm-parameter-filled-twice", name, text), cause)
        crossed = {_module(entry["tensor"]) for entry in load["crossed"]}
        unused = [name for name in load["unconsumed"] if (name in seen["unconsumed"]) == (cause is not None)]
        unused = [name for name in unused if _module(name) not in crossed]
        # what it leaves of both is its habit: Gemma 4's layers that share keys and values, LLaVA's last vision layers
        needless = unused if cause is not None else _needless(result, unused) if before is None else []
        if needless:
            what = "that no linear layer needs" if cause is None else "as in the source"
            text = f"{needless[0]}: vLLM never takes it up, {_in_all(needless)} {what}"
            yield Finding("vllm-tensor-needless", needless[0], text)
        unused = [name for name in unused if name not in needless]
        if unused:
            text = f"{unused[0]}: vLLM never takes this tensor up, {_in_all(unused)}"
            yield Finding("vllm-tensor-unused", unused[0], text)


def _caused(finding: Finding, source: dict[str, Any] | None) -> Finding:
    """A finding, with its cause where the source's record shows the same."""
    if source is None:
        return finding
    return replace(finding, text=f"{finding.text}; the source shows the same and is the cause", remedy=MEND)


def _needless(result: Checkpoint, names: Sequence[str]) -> list[str]:
    """Those that vLLM may leave by design, such as a pooling head or rotary frequencies; no weights, no scales."""
    try:
        choices = select(result).choices
    except SourceError:  # packed weights, or what structure complains of already
        choices = {}
    grave = ("linear", "experts", "embedding", "head")
    return [
        name
        for name in names
        if name in choices
        and choices[name].role not in grave
        and not name.endswith("_scale")
        and not (name.endswith(".weight") and choices[name].role != "outside")
    ] + [name for name in names if name.endswith(".g_idx")]  # GPTQ's order of columns, which only desc_act needs


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _in_all(things: Any) -> str:
    return f"{len(things)} in all"


def _cache(result: Checkpoint, load: dict[str, Any], cache: str) -> Iterator[Finding]:
    """The scales that each attention will use, against what the checkpoint says."""
    layers = load["attention"]
    other = [layer for layer in layers if not layer["cache"].startswith(cache)]
    if other:
        held = "BF16" if other[0]["cache"] == "auto" else other[0]["cache"]
        text = f"{_attention(other)} will keep a cache in {held}, not in {cache.upper()} as it should"
        yield Finding("vllm-cache-dtype-wrong", other[0]["name"], text)
    narrow = [layer for layer in layers if layer["cache"].startswith("fp8")]
    ones = [layer for layer in narrow if _is_one(layer["k_scale"]) and _is_one(layer["v_scale"])]
    if ones:
        yield Finding("vllm-kv-scale-one", ones[0]["name"], f"{_attention(ones)} will run at KV scale 1.0")
    joint = [layer for layer in narrow if str(layer["from"]["k_scale"]).endswith(".kv_scale")]
    if joint:
        text = f"{_attention(joint)} has one kv_scale for keys and values, which newer vLLMs will not take"
        yield Finding("vllm-kv-scale-joint", joint[0]["name"], text)
    for key, word in (("k", "keys"), ("v", "values")):
        absent = [layer for layer in narrow if not layer["from"][f"{key}_scale"] and layer not in (*ones, *joint)]
        if absent:
            used = absent[0][f"{key}_scale"]
            other_s = f"{used:.4g}, the other's," if isinstance(used, float) else "the other's"
            instead = f"run its {word} at scale 1.0" if _is_one(used) else f"use {other_s} for its {word}"
            text = f"{_attention(absent)} has no {key}_scale: vLLM will {instead}"
            yield Finding("vllm-kv-scale-missing", absent[0]["name"], text)
    for key in ("k", "v", "q", "prob"):
        for layer in narrow:
            name, used = layer["from"][f"{key}_scale"], layer[f"{key}_scale"]
            if name is None or not isinstance(used, float) or result.tensors[name].dtype not in FLOAT_DTYPES:
                continue
            if math.prod(result.tensors[name].shape) != 1:
                continue
            stored = scalar(result, result.tensors[name])
            if not abs(used - stored) <= ROUNDING * abs(stored):
                text = f"{name}: it says {stored:.6g}, vLLM will use {used:.6g}"
                yield Finding("vllm-scale-differs", name, text)
    without = [layer for layer in narrow if not layer["from"]["q_scale"]]
    if without and not _is_exact(result):
        text = f"{_attention(without)} will run queries at scale 1.0: no q_scale"
        yield Finding("vllm-query-scale-missing", without[0]["name"], text)


def _is_one(scale: Any) -> bool:
    """Whether a scale, or each of one a head, is 1.0."""
    return all(value == 1.0 for value in scale) if isinstance(scale, list) else scale == 1.0


def _attention(layers: Sequence[Mapping[str, Any]]) -> str:
    if len(layers) == 1:
        return f"attention of 1 layer ({layers[0]['name']})"
    return f"attention of {len(layers)} layers (first {layers[0]['name']})"


# --- generation --------------------------------------------------------------------------------------


def judge_generation(
    runs: Mapping[str, dict[str, Any]], before: dict[str, Any], prompts: Sequence[str], report: Report
) -> dict[str, Any]:
    """Judge what the engine made of the same prompts and texts.

    Args:
        runs: by --kv-cache-dtype, what `vllm_env.jobs.generate.run` returned, with the source's completions scored.
        before: the source's own run.
        prompts: what was completed, in words, for the report.
        report: findings go here.

    Returns:
        The figures, as plain data.
    """
    figures: dict[str, Any] = {}
    base = before["nll"] / before["counted"]
    tokens = before.get("vocabulary")
    if tokens and _exp(base) >= GUESSING * tokens:
        text = (
            f"the source's own perplexity is {_exp(base):.2f}, of {tokens} tokens: it is no better than guessing, and "
            "its answers show nothing"
        )
        report.add("source-only-guesses", "", text, MEND)
    for kv, run in runs.items():
        ratio = _exp(run["nll"] / run["counted"] - base)
        drops, same, total = [], 0, 0
        for own, theirs, scored in zip(run["completions"], before["completions"], run["scored"], strict=True):
            drops.append((sum(theirs["logprobs"]) - sum(scored)) / len(scored))
            same += sum(a == b for a, b in zip(own["tokens"], theirs["tokens"], strict=True))
            total += len(scored)
        figures[kv] = {
            "perplexity": _exp(run["nll"] / run["counted"]),
            "perplexity_of_source": _exp(base),
            "perplexity_ratio": ratio,
            "tokens_scored": run["counted"],
            "greedy_tokens_equal": [same, total],
            "logprob_drop": dict(zip(prompts, drops, strict=True)),
            "answers": [entry["text"] for entry in run["completions"]],
            "answers_of_source": [entry["text"] for entry in before["completions"]],
        }
        if math.isnan(ratio) or any(math.isnan(drop) for drop in drops):
            text = f"with --kv-cache-dtype {kv} the engine's log-probabilities are NaN"
            report.add("engine-not-finite", f"--kv-cache-dtype {kv}", text)
            continue
        if ratio > MAX_RATIO:
            report.add(
                "perplexity-too-high",
                f"--kv-cache-dtype {kv}",
                f"with --kv-cache-dtype {kv} the served perplexity is {ratio:.3f} times the source's "
                f"({_exp(run['nll'] / run['counted']):.2f} against {_exp(base):.2f}); at most {MAX_RATIO} "
                "passes as 8-bit rounding",
            )
        for prompt, drop in zip(prompts, drops, strict=True):
            if drop > MAX_DROP:
                report.add(
                    "answer-differs",
                    prompt,
                    f"with --kv-cache-dtype {kv} the answer to {prompt} is another: the source's own is {drop:.2f} "
                    "nats a token less likely",
                )
        report.checked.append(
            f"generated with --kv-cache-dtype {kv}: perplexity {ratio:.4f} times the source's over {run['counted']} "
            f"tokens, {same} of {total} greedy tokens the same ({', '.join(prompts)})"
        )
    return figures


def _exp(nats: float) -> float:
    """A perplexity, which a ruined checkpoint may put beyond all floating-point numbers."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
