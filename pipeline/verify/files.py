"""config.json, tokenizer and the other small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint import directory
from pipeline.checkpoint.config import TIE, untied
from pipeline.checkpoint.source import Checkpoint, SourceError, read_json
from pipeline.formats.methods import SECTION
from pipeline.library_messages import quiet
from pipeline.model.selection import Selection, select
from pipeline.verify.kv_cache import dtype_said
from pipeline.verify.report import Report

# added beyond the embedding's rows: CodeLlama 34B has 4 (transformers, issue 26714), Gemma 3 without images has 1
FEW_TOKENS = 8
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def check_tokenizer(result: Checkpoint, selection: Selection | None, source: Checkpoint | None, report: Report) -> None:
    """Whether the tokenizer can be this model's: no id beyond the embedding's rows, and the image's own id.

    What a source had already is its makers' business, and noted.
    """
    path = result.root / "tokenizer.json"
    _check_server_files(result, source, report)
    for name in result.sidecars:
        if directory.is_pointer(result.root / name):
            report.add("file-is-pointer", name, f"{name}: {directory.A_POINTER}", directory.pull(result.root))
    if not path.exists() or directory.is_pointer(path):
        return
    found = _token_ids(path)
    if found is None:
        text = "tokenizer.json: it is not in the format that is known here; its ids are not checked"
        report.add("tokenizer-format-unknown", "tokenizer.json", text)
        return
    ids, added = found
    choices = selection.choices if selection is not None else {}
    original = source.root / "tokenizer.json" if source is not None else None
    as_in_source = (
        original is not None
        and original.exists()
        and (original.read_bytes() == path.read_bytes() or _says_the_same(path, original))
    )
    whose = "as in the source" if as_in_source else "it is another model's"
    rows = max((result.tensors[name].shape[0] for name, c in choices.items() if c.role == "embedding"), default=0)
    beyond = {number for number in ids | added if number >= rows}
    if rows and beyond:
        text = f"tokenizer.json: its ids reach {max(beyond)}, the embedding has {rows} rows"
        if source is None and beyond <= added and len(beyond) <= FEW_TOKENS:
            few = f"{text}: {len(beyond)} added tokens, as CodeLlama's and Gemma's makers left them"
            report.add("tokenizer-few-ids-beyond", "tokenizer.json", few)
        else:
            code = "tokenizer-ids-beyond-as-in-source" if as_in_source else "tokenizer-ids-beyond"
            report.add(code, "tokenizer.json", f"{text}; {whose}")
    for key in ("image_token_id", "image_token_index"):
        value = result.config.get(key)
        if isinstance(value, int) and value >= 0 and value not in ids | added:
            code = "token-id-missing-as-in-source" if as_in_source else "token-id-missing"
            report.add(code, "tokenizer.json", f"tokenizer.json: it has no id {value}, config.json's {key}; {whose}")


def _check_server_files(result: Checkpoint, source: Checkpoint | None, report: Report) -> None:
    """The files that a server cannot start without are there; exporters forget some.

    Where the source lacks one too, that is its makers' business.
    """
    missing: list[tuple[str, tuple[str, ...]]] = []
    own = any(any(result.root.glob(pattern)) for pattern in ("*.tiktoken", "*.model", "tokenization_*.py"))
    if not own and not any((result.root / name).exists() for name in TOKENIZERS):
        missing.append(("tokenizer", TOKENIZERS))
    if "vision_config" in result.config and not any((result.root / name).exists() for name in PROCESSORS):
        missing.append(("image processor", PROCESSORS))
    for what, names in missing:
        remedy = "copy it from the source"
        if source is None:
            code = "server-file-missing"
        elif any((source.root / name).exists() for name in names):
            code = "server-file-lost"
        else:
            code, remedy = "server-file-not-in-source", "the source does not have it either; add it to both"
        report.add(code, names[0], f"{names[0]}: there is no {what}, without which vLLM does not start", remedy)


def _token_ids(path: Path) -> tuple[set[int], set[int]] | None:
    """The ids of a tokenizer.json's vocabulary and of its added tokens; None for another library's format."""
    content = read_json(path)
    try:
        added = {entry["id"] for entry in content.get("added_tokens") or []}
        vocabulary = content["model"]["vocab"]
        return (set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))), added
    except (KeyError, TypeError):
        return None


def check_config(result: Checkpoint, source: Checkpoint, report: Report) -> str:
    """Hold config.json and the small files against the source's."""
    ours, theirs = (
        {key: value for key, value in config.items() if key != "quantization_config"}
        for config in (result.config, source.config)
    )
    own_head = select(source).own_head
    if own_head is not None and own_head in result.tensors and ours == untied(theirs):
        theirs = ours  # which says what the shards hold
    if ours != theirs:
        changed = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        if not report.produced_here and set(changed) <= {"transformers_version", "_name_or_path"}:
            text = f"config.json differs from the source's in {', '.join(changed)}, which says who wrote it"
            report.add("config-writer-differs", "config.json", text)
        elif _means_the_same(result, source, own_head is not None):
            text = f"config.json is written anew ({', '.join(changed)}); transformers reads it as the source's"
            report.add("config-rewritten", "config.json", text)
        else:
            text = f"config.json differs from the source's in {', '.join(changed)}"
            report.add("config-differs", "config.json", text)
    same = 0
    for name in source.sidecars:
        path = result.root / name
        if name == "config.json":
            continue
        if not path.exists():
            code = "served-file-lost" if _is_served(name) else "file-lost"
            report.add(code, name, f"{name}: the source has it, the checkpoint does not")
        elif path.read_bytes() == (source.root / name).read_bytes():
            same += 1
        elif report.produced_here or not _says_the_same(path, source.root / name):  # this tool copies bytes
            code = "served-file-differs" if _is_served(name) else "file-differs"
            report.add(code, name, f"{name}: it differs from the source's")
    return f"config as the source's, {same} of {len(source.sidecars) - 1} small files byte for byte"


def _is_served(name: str) -> bool:
    """Whether a server answers otherwise with another of these files, unlike a licence or a picture."""
    return name == "tokenizer.json" or name.endswith((".model", ".tiktoken"))


def _says_the_same(path: Path, other: Path) -> bool:
    """Whether two JSON files mean the same: exporters write their versions into them, and tokenizers in a new order."""
    if path.suffix != ".json":
        return False
    try:
        ours, theirs = ({**read_json(each)} for each in (path, other))
    except SourceError:
        return False
    if path.name == "tokenizer.json":
        return _vocabulary(ours) == _vocabulary(theirs) and _token_ids(path) == _token_ids(other)
    for each in (ours, theirs):
        for key in ("transformers_version", "_from_model_config", "processor_class", "tokenizer_class"):
            each.pop(key, None)
    return ours == theirs


def _vocabulary(content: dict[str, Any]) -> Any:
    """The model of a tokenizer.json: newer libraries write pairs for merges, and keys that say what was the default."""
    model = content.get("model")
    if not isinstance(model, dict):
        return model
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
    return {**{key: value for key, value in model.items() if value not in (None, False, "")}, "merges": merges}


def _means_the_same(result: Checkpoint, source: Checkpoint, own_head: bool) -> bool:
    """Whether transformers makes the same of both configs: ModelOpt's export saves its own normal form.

    With `own_head` what they say of a tied head is left aside: the shards know better.
    """
    from transformers import AutoConfig

    made = []
    for checkpoint in (result, source):
        try:
            with quiet():
                values = AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=False).to_dict()
        except Exception:  # a config that transformers cannot read means nothing in particular
            return False
        values.pop(SECTION, None)
        aside = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", *({TIE} if own_head else ())}
        made.append(_without(values, aside))
    same_dtype = dtype_said(result.config) == dtype_said(source.config)  # parts may say it more than once
    return bool(same_dtype and made[0] == made[1])


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return value
