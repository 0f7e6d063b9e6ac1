"""How fast an engine serves a checkpoint: many requests at once, and one alone."""

from __future__ import annotations

import os
import random
import time
from typing import Any

from pipeline.vllm_env.jobs.load import Warnings


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Serve random token ids; text does not matter to speed.

    Args:
        job: ``checkpoint``; ``kv``, the --kv-cache-dtype; ``requests``, how many of ``input`` prompt and ``output``
            answer tokens; ``gpu_memory_utilization``; ``rounds``.

    Returns:
        ``tokens_per_s``: of answers, with all requests at once, a round each; ``stream_tokens_per_s``: with one;
        ``cache_tokens``: that the KV cache holds; ``warnings``.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # as a server runs: scheduling and the GPU side by side
    import vllm

    seen = Warnings()
    seen.attach()
    engine = vllm.LLM(
        model=job["checkpoint"],
        max_model_len=job["input"] + job["output"],
        dtype="bfloat16",
        kv_cache_dtype=job["kv"],
        gpu_memory_utilization=job["gpu_memory_utilization"],
        seed=0,
        enable_prefix_caching=False,
    )
    seen.attach()
    generator = random.Random(0)
    rows = len(engine.get_tokenizer())
    # the text of random answers does not matter, and a tokenizer with fewer ids than the model makes it slow
    answer = vllm.SamplingParams(max_tokens=job["output"], temperature=0, ignore_eos=True, detokenize=False)

    def rate(count: int) -> float:
        prompts = [{"prompt_token_ids": generator.choices(range(rows), k=job["input"])} for _ in range(count)]
        begin = time.perf_counter()
        made = engine.generate(prompts, answer, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in made) / (time.perf_counter() - begin)

    rate(8)
    cache = engine.llm_engine.vllm_config.cache_config
    return {
        "error": None,
        "vllm": vllm.__version__,
        "tokens_per_s": [rate(job["requests"]) for _ in range(job["rounds"])],
        "stream_tokens_per_s": [rate(1) for _ in range(job["rounds"])],
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "warnings": seen.lines,
    }
