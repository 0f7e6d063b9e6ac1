"""The generation check: a real engine completes texts and speaks of an image, and scores what another engine said.

What two checkpoints make of a prompt can only be compared over the same tokens, so the source's engine runs first and
its completions are scored here with the result's: a prompt followed by them, and the log-probability of each token.
"""

from __future__ import annotations

import resource
import time
from typing import Any

from pipeline.vllm_env.jobs.load import CACHE_SCALES, Warnings, _attention_layers, _value

QUESTION = "Describe the image."
SIDE = 112  # of the image in pixels: two merged patches of Qwen's towers each way, and enough for others' resizing


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Generate and score.

    Args:
        job: ``checkpoint``, a directory; ``kv``, the --kv-cache-dtype; ``prompts``, texts to complete; ``tokens``, how
            many; ``texts``, whole texts to score; ``image``, whether to ask about an image, too; ``completions``,
            token lists of another engine, one a prompt (the image's last), to score; ``dtype``, ``max_model_len`` and
            ``cache_bytes``.

    Returns:
        ``completions``: of each prompt the token ids, their log-probabilities and the text. ``scored``: of each given
        completion the log-probabilities. ``nll`` and ``counted``: the sum over all tokens of ``texts`` (with the
        tokenizer's end of text) but the first of each, in nats, and their number; ``vocabulary``: the tokens that each
        is chosen of. ``attention`` and ``warnings`` as `load.check` gives them.
    """
    import torch._dynamo
    import vllm
    from vllm.platforms import current_platform

    from pipeline.vllm_env.jobs import cpu

    begin = time.monotonic()
    seen = Warnings()
    seen.attach()
    cpu.fill_in()
    # enforce_eager leaves small functions compiled (the count of a token's rank): seconds of a C++ compiler a start
    torch._dynamo.config.disable = True
    engine = vllm.LLM(
        model=job["checkpoint"],
        enforce_eager=True,
        max_model_len=job["max_model_len"],
        max_num_seqs=8,
        max_num_batched_tokens=job["max_model_len"],
        dtype=job.get("dtype", "auto"),
        kv_cache_dtype=job["kv"],
        kv_cache_memory_bytes=job["cache_bytes"],
        seed=0,
        enable_prefix_caching=False,  # what is read back comes from the cache, as quantized
        **_share(),
        **({"limit_mm_per_prompt": {"image": 1, "video": 0}, "skip_mm_profiling": True} if job["image"] else {}),
    )
    seen.attach()
    started = time.monotonic()
    tokenizer = engine.get_tokenizer()
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": tokenizer(text).input_ids} for text in job["prompts"]]
    if job["image"]:
        prompts.append(_image_prompt(engine, tokenizer))
    greedy = vllm.SamplingParams(max_tokens=job["tokens"], temperature=0, logprobs=1, ignore_eos=True)
    completions = []
    for output in engine.generate(prompts, greedy, use_tqdm=False):
        made = output.outputs[0]
        assert made.logprobs is not None
        values = [step[token].logprob for step, token in zip(made.logprobs, made.token_ids, strict=True)]
        completions.append({"tokens": list(made.token_ids), "logprobs": values, "text": made.text})
    scored = []
    if job.get("completions"):
        asked = [
            {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *tokens]}
            for prompt, tokens in zip(prompts, job["completions"], strict=True)
        ]
        for given, values in zip(job["completions"], _score(engine, asked), strict=True):
            scored.append(values[len(values) - len(given) :])
    nll, counted = 0.0, 0
    if job["texts"]:
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        rows = [{"prompt_token_ids": [*tokenizer(text).input_ids, *end]} for text in job["texts"]]
        for values in _score(engine, rows):
            nll -= sum(values)
            counted += len(values)
    return {
        "error": None,
        "vllm": vllm.__version__,
        "platform": current_platform.device_type,
        "completions": completions,
        "scored": scored,
        "nll": nll,
        "counted": counted,
        "vocabulary": engine.llm_engine.model_config.get_vocab_size(),
        "attention": engine.apply_model(_attention)[0],
        "warnings": seen.lines,
        "seconds": {
            "imports": job["imports"],
            "start": started - begin,
            "generate": time.monotonic() - started,
        },
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _share() -> dict[str, Any]:
    """On a GPU, no more than is free: vLLM looks at the share before it starts, although the cache has its size."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return {}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": round(0.9 * free / total, 3)}


def _score(engine: Any, prompts: list[dict[str, Any]]) -> list[list[float]]:
    """The log-probability of every token of each prompt but its first."""
    import vllm

    only = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    found = []
    for output in engine.generate(prompts, only, use_tqdm=False):
        assert output.prompt_token_ids is not None and output.prompt_logprobs is not None
        pairs = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[1:]
        found.append([step[token].logprob for token, step in pairs])
    return found


def _image_prompt(engine: Any, tokenizer: Any) -> dict[str, Any]:
    """A drawn image and a question, in the model's own chat format where it has one."""
    import numpy
    from PIL import Image

    place = engine.apply_model(_placeholder)[0]
    rows, columns = numpy.mgrid[0:SIDE, 0:SIDE]
    disc = (rows - SIDE / 2) ** 2 + (columns - SIDE / 2) ** 2 < (SIDE / 3) ** 2
    pixels = numpy.stack([numpy.where(disc, 220, 2 * rows), numpy.where(disc, 40, 2 * columns), 90 + 0 * rows], -1)
    text = f"{place}{QUESTION}"
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    image = Image.fromarray(pixels.astype("uint8"))
    return {"prompt_token_ids": tokenizer(text).input_ids, "multi_modal_data": {"image": image}}


def _placeholder(model: Any) -> str:
    return type(model).get_placeholder_str("image", 1) or ""


def _attention(model: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "cache": str(getattr(layer, "kv_cache_dtype", "auto")),
            **{scale: _value(layer, scale) for scale in CACHE_SCALES},
        }
        for name, layer in _attention_layers(model)
    ]
