"""The codes of findings: the one table that says what each means, and for whose checkpoint it is a problem.

docs/verify-codes.md is this table as a page; a test holds both together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FindingLevel = Literal["problem", "note"]


@dataclass(frozen=True)
class Code:
    """What a code stands for.

    Attributes:
        own: its level in a checkpoint that was produced by this tool; None where it is not looked for.
        third_party: its level in a third-party checkpoint; None where it is not looked for.
        meaning: for a reader of a report.
    """

    own: FindingLevel | None
    third_party: FindingLevel | None
    meaning: str

    def level(self, produced_here: bool) -> FindingLevel | None:
        """The level in a checkpoint that was produced by this tool, or in a third-party one."""
        return self.own if produced_here else self.third_party


def _problem(meaning: str) -> Code:
    return Code("problem", "problem", meaning)


def _note(meaning: str) -> Code:
    return Code("note", "note", meaning)


SECTIONS: dict[str, dict[str, Code]] = {
    "The checkpoint as a whole": {
        "checkpoint-unreadable": _problem("The shards, their headers, the index or config.json cannot be read."),
        "check-unreadable": _problem("A check ended because a file that it needs cannot be read."),
        "check-value-unexpected": _problem("A check ended because a config or a record holds values of another kind."),
        "layers-unknown": _problem("The decoder layers cannot be found, or a layer lacks tensors of its kind."),
        "section-missing": _problem("There are quantized weights, but the config does not describe a quantization."),
        "section-not-object": _problem("The config's quantization_config is something else than an object."),
        "not-quantized": Code("problem", "note", "Nothing is quantized, neither by the config nor by the tensors."),
        "quant-method-unknown": Code("problem", None, "The config names a method that this tool does not write."),
        "layout-unknown": _note("The layout is not known here; only vLLM can tell whether it can be served."),
    },
    "Scales of weights and inputs": {
        "no-fp8-weight": _problem("The config describes quantized weights, but there is none."),
        "weight-without-scale": _problem("A quantized weight has no scale; vLLM would run it unscaled."),
        "input-scale-missing": _problem("The config says that inputs are static, but a weight has no input scale."),
        "input-scale-unexpected": _problem("There is an input scale, but the config says that inputs are dynamic."),
        "scale-without-weight": _problem("A scale stands beside no quantized weight."),
        "scale-shape-wrong": _problem("A scale has another shape than per-tensor, per-channel or block-wise asks for."),
        "scale-not-finite": _problem("A scale is zero, negative, infinite or NaN."),
        "input-scale-out-of-range": _problem("An input scale is beyond all that activations reach."),
        "fused-weight-scales-differ": _note("Fused modules have different weight scales; vLLM rounds them once more."),
        "fused-input-scales-differ": _note("Fused modules have different input scales; vLLM takes the largest."),
    },
    "Scales of the KV cache": {
        "kv-scale-missing": _problem("The config promises an FP8 KV cache, but a layer has no k_scale or v_scale."),
        "kv-scale-one": _problem("k_scale and v_scale are both 1.0, as in a cache that was never calibrated."),
        "kv-scale-not-finite": _problem("A cache scale is zero, negative, infinite or NaN."),
        "kv-scale-shape-wrong": _problem("A cache scale is neither a single value nor one per head."),
        "kv-scale-dtype-wrong": _problem("A cache scale is not in BF16, F16 or F32."),
        "kv-scale-out-of-range": _problem("A cache scale is beyond all that keys and values reach."),
        "kv-scale-name-unknown": _problem("vLLM does not load a cache scale of this name."),
        "kv-scheme-not-fp8": _problem("The config's kv_cache_scheme is not FP8, although vLLM would take it for that."),
        "kv-scheme-unread": Code("problem", None, "The config has a kv_cache_scheme that vLLM does not read as FP8."),
        "kv-scales-unused": Code("problem", "note", "There are cache scales, but the config promises no FP8 cache."),
        "kv-scales-swapped": Code("problem", None, "k_scale and v_scale are each what the run measured for the other."),
        "kv-scale-not-measured": Code("problem", None, "A cache scale is not that of the amax which the run measured."),
        "kv-cache-dtype-not-judged": _note("The config promises a KV cache in a dtype that is not judged here."),
        "kv-observer-memoryless": _note("The cache scales were observed on the last batch alone."),
        "kv-scale-rounded": _note("Cache scales are in another dtype than the model's; vLLM rounds them."),
        "kv-scale-joint": _note("There is one scale for keys and values, which newer vLLMs will not take."),
        "kv-scale-modelopt-name": _note("A cache scale has ModelOpt's own name, which some vLLMs refuse."),
        "attention-scale-missing": _note("There is no q_scale or prob_scale; vLLM uses 1.0."),
        "dtype-not-bfloat16": Code("note", None, "The config says another dtype than BF16, which is to be served."),
    },
    "The quantization section of the config": {
        "groups-do-not-fit": _problem("config_groups do not describe the weights and inputs as they lie in the files."),
        "group-format-unknown": _problem("A group of config_groups has another format than its layout."),
        "section-format-wrong": _problem("The section's format is not its layout's."),
        "quant-algo-wrong": _problem("ModelOpt's quant_algo is not FP8."),
        "transform-unexpected": _problem("The section asks vLLM for a transform or sparsity beside FP8."),
        "hf-quant-config-invalid": _problem("hf_quant_config.json has no object under quantization."),
        "hf-quant-config-differs": _problem("hf_quant_config.json and config.json describe different quantizations."),
    },
    "The ignore list": {
        "ignore-list-invalid": _problem("The list is no list, or an entry is no module's name or pattern."),
        "fp8-weight-ignored": _problem("The config ignores a quantized weight; vLLM would take it for a plain weight."),
        "plain-weight-not-ignored": _problem("The config does not ignore a plain weight; vLLM would cast it to FP8."),
        "ignore-misses-vllm-name": _problem("A pattern matches the checkpoint's name of a module, but not vLLM's."),
        "ignore-entry-idle": _problem("An entry is the name of a module that is not in the checkpoint."),
        "ignore-pattern-idle": Code(
            "problem", "note", "An entry is a pattern, or for ModelOpt a part of a name, and matches no module."
        ),
        "ignore-entry-modelopts": _note("In exact mode: an entry of ModelOpt's own list matches no module."),
        "embedding-quantized": _problem("An embedding is quantized; vLLM would take its values for plain weights."),
        "outside-quantized": _note("Weights outside the language model are quantized."),
    },
    "Tokenizer, config and small files": {
        "server-file-lost": _problem("vLLM does not start without a file that the source has."),
        "server-file-missing": Code("note", "problem", "vLLM does not start without a file; no source was named."),
        "server-file-not-in-source": _note("vLLM does not start without a file that the source does not have either."),
        "file-is-pointer": _problem("A small file is a Git LFS pointer and not the file itself."),
        "tokenizer-format-unknown": _note("tokenizer.json is in a format that is not known here."),
        "tokenizer-ids-beyond": _problem("The tokenizer has ids beyond the rows of the embedding."),
        "tokenizer-ids-beyond-as-in-source": _note("The same, and the source's tokenizer has them as well."),
        "tokenizer-few-ids-beyond": Code(
            "problem", "note", "A few added tokens are beyond the rows of the embedding, as in some well-known models."
        ),
        "token-id-missing": _problem("The tokenizer does not have an id that the config names."),
        "token-id-missing-as-in-source": _note("The same, and the source's tokenizer does not have it either."),
        "config-differs": _problem("config.json differs from the source's beyond its quantization section."),
        "config-rewritten": _note("config.json is written anew; transformers reads it as the source's."),
        "config-writer-differs": _note("config.json differs from the source's only in who wrote it."),
        "file-lost": Code("problem", "note", "A small file of the source is not in the checkpoint."),
        "file-differs": Code("problem", "note", "A small file differs from the source's."),
        "served-file-lost": _problem("A file that decides on a server's answers is not in the checkpoint."),
        "served-file-differs": _problem("A file that decides on a server's answers differs from the source's."),
    },
    "Tensors against the source": {
        "source-of-other-shapes": _problem(
            "The source that was named is another model: most of its tensors are not here, or have other shapes."
        ),
        "tensor-lost": _problem("A tensor of the source is not in the checkpoint."),
        "tensor-changed": _problem("A tensor has another dtype or shape than what the source's is to become."),
        "tensor-unexpected": _problem("A tensor comes from nothing that the source has."),
        "tensor-cast": _note("Copied tensors are in another floating-point dtype than the source's."),
        "linear-not-quantized": _problem("A linear layer that the config describes as quantized was copied."),
    },
    "Contents, byte by byte": {
        "journal-damaged": _problem("The record of the run's hashes is damaged."),
        "recorded-tensor-lost": _problem("The run recorded a tensor that is not in the checkpoint."),
        "hash-differs": _problem("A tensor's bytes are not those that the run wrote."),
        "hash-missing": _problem("The run did not record hashes for all bytes of a tensor."),
        "file-hashes-missing": _problem("The record of the small files' hashes is not in the checkpoint."),
        "file-hash-differs": _problem("A small file is not the one that the run wrote."),
        "value-not-finite": _problem("A tensor holds NaN or infinity."),
        "source-of-other-weights": _problem(
            "Most weights are not those of the source that was named: it is another model of the same shapes."
        ),
        "bytes-differ": _problem("A copied tensor's bytes differ from the source's."),
        "rounded-values-differ": _problem("A cast tensor is not the source's, rounded to its dtype."),
        "requantized-differs": _problem("A weight is not what the source's gives when it is quantized again."),
        "weight-far-from-source": _problem("A dequantized weight is further from the source's than 8 bits explain."),
        "weight-scale-coarse": _problem("A weight scale is much larger than its weight needs; small weights are lost."),
        "source-not-finite": _problem("A weight of the source holds NaN or infinity."),
        "contents-not-compared": _note("Weights are in a layout whose values are not compared with the source here."),
    },
    "Loading in vLLM": {
        "vllm-missing": _note("No vLLM is installed; the structure alone was checked."),
        "vllm-not-run": _problem("vLLM itself could not be run, which says nothing about the checkpoint."),
        "vllm-cannot-load": _problem("vLLM cannot load the checkpoint."),
        "vllm-cannot-start": _problem("vLLM does not start with an FP8 KV cache, which the config does not promise."),
        "vllm-refuses-source": _problem("vLLM refuses the checkpoint and its source alike: the source is the cause."),
        "vllm-cannot-load-source": _note(
            "vLLM does not load the source either, though it is whole by transformers' class; nothing is known."
        ),
        "vllm-no-class": _note("This vLLM has no class for the architecture, so it was not loaded or run."),
        "vllm-no-kernel": _note("This build of vLLM has no kernel for the checkpoint, so it was not loaded or run."),
        "vllm-casts-weight": _problem("vLLM casts plain weights to FP8, with a scale that nothing sets."),
        "vllm-fp8-as-plain": _problem("vLLM takes FP8 values for plain weights."),
        "vllm-parameter-unfilled": _problem("Nothing in the checkpoint fills a parameter of vLLM's."),
        "vllm-parameter-partly-filled": _problem("The checkpoint fills a part of a parameter of vLLM's."),
        "vllm-parameter-filled-twice": _problem("Two tensors fill the same parameter of vLLM's."),
        "vllm-tensor-unused": _problem("vLLM never takes up a tensor."),
        "vllm-tensor-needless": _note("vLLM never takes up a tensor that no linear layer needs, or of the source's."),
        "vllm-cache-dtype-wrong": _problem("vLLM keeps a KV cache in another dtype than the config promises."),
        "vllm-kv-scale-one": _problem("vLLM runs the KV cache of a layer at scale 1.0."),
        "vllm-kv-scale-missing": _problem("vLLM finds no k_scale or no v_scale for a layer."),
        "vllm-kv-scale-joint": _note("vLLM finds one scale for keys and values, which newer ones will not take."),
        "vllm-scale-differs": _problem("vLLM uses another scale than the checkpoint holds."),
        "vllm-query-scale-missing": Code("problem", None, "Queries run at scale 1.0 beside calibrated KV scales."),
        "vllm-scale-warning": Code("problem", "note", "vLLM warns about scales or dtypes, beside an FP8 KV cache."),
        "vllm-warning": _note("vLLM warns of something that it does not warn of for the source."),
        "kv-scales-absent": _note("There are no KV scales; the KV cache is to stay in the model's dtype."),
        "attention-not-judged": _note("vLLM runs this model's attention in a way whose scales are not looked at."),
        "serve-config-unscaled": _problem("The serve config asks for an FP8 KV cache, but there are no KV scales."),
        "serve-config-refused": _problem("vLLM refuses the arguments of the serve config."),
        "serve-config-too-large": Code(
            "problem", "note", "The GPU that the serve config was written for cannot hold one sequence of full length."
        ),
        "serve-config-not-checked": _note("The serve config's arguments could not be checked in vLLM."),
    },
    "Generating in vLLM": {
        "generation-impossible": _note("vLLM's engine cannot run the checkpoint on this machine."),
        "generation-after-problems": _note("Nothing was generated, since there are problems already."),
        "generation-without-source": _note("No source was named, so answers are not compared with the source's."),
        "generation-given-up": _note("vLLM's engine was given up while it generated."),
        "vllm-cannot-run-source": _note("This vLLM has no kernel to run the source, or was given up while it ran it."),
        "engine-fails-on-source": Code("problem", "note", "vLLM's engine fails on the source."),
        "source-only-guesses": _problem("The source's own perplexity is no better than guessing."),
        "engine-fails": _problem("vLLM's engine fails on the checkpoint."),
        "engine-dies": _problem("vLLM's engine dies on the checkpoint, twice, and runs the source."),
        "engine-not-finite": _problem("vLLM's engine answers with log-probabilities that are no numbers."),
        "engine-scale-differs": _problem("vLLM's engine runs with another scale than its loader saw."),
        "perplexity-too-high": _problem("The served perplexity is higher than 8-bit rounding explains."),
        "answer-differs": _problem("The source's own answer to a prompt is much less likely in the checkpoint."),
    },
}  # fmt: skip
CODES: dict[str, Code] = {code: entry for codes in SECTIONS.values() for code, entry in codes.items()}

HEAD = """# Codes of findings

`quantize verify` and the gate of every run report findings. `--json` and `quantize/verify.json` hold each under
`findings`, with its `code`, `level` (`problem` or `note`), `subject` (the tensor, module, file, part of the config,
option or prompt; the first where there are several, empty for the checkpoint as a whole), `text` and `remedy` (null
where there is none). `problems` and `notes` hold the same as sentences. A checkpoint with a problem does not pass. The
level depends on the code, and on whether the checkpoint was produced by this tool (own) or not (third-party); — stands
where it is not looked for.

Codes are stable: a program may rely on them, not on the sentences.
"""


def codes_page() -> str:
    """The table as docs/verify-codes.md has it."""
    lines = [HEAD]
    for title, codes in SECTIONS.items():
        lines += [f"## {title}\n", "| code | own | third-party | meaning |", "|---|---|---|---|"]
        lines += [f"| `{c}` | {e.own or '—'} | {e.third_party or '—'} | {e.meaning} |" for c, e in codes.items()]
        lines.append("")
    return "\n".join(lines)
