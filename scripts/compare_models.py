#!/usr/bin/env python3
"""Load a checkpoint and its source in transformers and compare what they say next.

    python scripts/compare_models.py CHECKPOINT SOURCE ["a prompt" ...]

Prints, over all positions of the prompts, the Kullback-Leibler divergence KL(source || checkpoint) in nats
and how often both choose the same next token, and a greedy continuation of each. transformers runs FP8
weights dequantized, so this shows the weights, not a server's kernels.
"""

from __future__ import annotations

import argparse
import logging
import sys

PROMPTS = ("A small red boat waits at the", "Two children fly a kite over", "An old bicycle leans against a")


def load(path: str):
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path, dtype=torch.bfloat16)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("source")
    parser.add_argument("prompts", nargs="*", default=list(PROMPTS))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.source)
    source, checkpoint = load(options.source), load(options.checkpoint)
    divergence = agree = positions = 0
    with torch.no_grad():
        for prompt in options.prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            p, q = (torch.log_softmax(m(input_ids=ids).logits.float(), -1)[0] for m in (source, checkpoint))
            if not bool(q.isfinite().all()):
                sys.exit("the checkpoint's logits are not finite")
            divergence += float((p.exp() * (p - q)).sum())
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            positions += p.shape[0]
        print(f"KL(source || checkpoint) {divergence / positions:.2e} nats, same next token {agree / positions:.0%}")
        ids = tokenizer(options.prompts[0], return_tensors="pt").input_ids
        for name, model in (("source", source), ("checkpoint", checkpoint)):
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            print(f"{name}: {tokenizer.decode(out[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
