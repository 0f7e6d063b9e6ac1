"""config.json, tokenizer and the other small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.source import Checkpoint, SourceError, read_json
from pipeline.formats.methods import SECTION
from pipeline.journal import read_identity
from pipeline.model.selection import Selection
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
    _say_unservable(result, source, report)
    if not path.exists():
        return
    found = _token_ids(path)
    if found is None:
        report.notes.append("tokenizer.json: it is not in the format that is known here; its ids are not checked")
        return
    ids, added = found
    choices = selection.choices if selection is not None else {}
    carried = source.root / "tokenizer.json" if source is not None else None
    as_before = (
        carried is not None
        and carried.exists()
        and (carried.read_bytes() == path.read_bytes() or _says_the_same(path, carried))
    )
    place, whose = (report.notes, "as in the source") if as_before else (report.problems, "it is another model's")
    rows = max((result.tensors[name].shape[0] for name, c in choices.items() if c.role == "embedding"), default=0)
    beyond = {number for number in ids | added if number >= rows}
    if rows and beyond:
        text = f"tokenizer.json: its ids reach {max(beyond)}, the embedding has {rows} rows"
        if source is None and read_identity(result.root) is None and beyond <= added and len(beyond) <= FEW_TOKENS:
            report.notes.append(f"{text}: {len(beyond)} added tokens, as CodeLlama's and Gemma's makers left them")
        else:
            place.append(f"{text}; {whose}")
    for key in ("image_token_id", "image_token_index"):
        value = result.config.get(key)
        if isinstance(value, int) and value >= 0 and value not in ids | added:
            place.append(f"tokenizer.json: it has no id {value}, config.json's {key}; {whose}")


def _say_unservable(result: Checkpoint, source: Checkpoint | None, report: Report) -> None:
    """What a server cannot start without, and exporters forget; a source that lacks it too is its makers' business."""
    missing: list[tuple[str, tuple[str, ...]]] = []
    own = any(any(result.root.glob(pattern)) for pattern in ("*.tiktoken", "*.model", "tokenization_*.py"))
    if not own and not any((result.root / name).exists() for name in TOKENIZERS):
        missing.append(("tokenizer", TOKENIZERS))
    if "vision_config" in result.config and not any((result.root / name).exists() for name in PROCESSORS):
        missing.append(("image processor", PROCESSORS))
    for what, names in missing:
        had = source is not None and any((source.root / name).exists() for name in names)
        where = report.problems if had or (source is None and read_identity(result.root) is None) else report.notes
        where.append(f"{names[0]}: there is no {what}, without which vLLM does not start; copy it from the source")


def _token_ids(path: Path) -> tuple[set[int], set[int]] | None:
    """The ids of a tokenizer.json's vocabulary and of its added tokens; None for another library's format."""
    content = read_json(path)
    try:
        added = {entry["id"] for entry in content.get("added_tokens") or []}
        vocabulary = content["model"]["vocab"]
        return (set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))), added
    except (KeyError, TypeError):
        return None


def check_config(result: Checkpoint, source: Checkpoint, made_here: bool, report: Report) -> str:
    """Hold config.json and the small files against the source's."""
    ours, theirs = (
        {key: value for key, value in config.items() if key != "quantization_config"}
        for config in (result.config, source.config)
    )
    if ours != theirs:
        changed = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        if not made_here and set(changed) <= {"transformers_version", "_name_or_path"}:
            report.notes.append(
                f"config.json differs from the source's in {', '.join(changed)}, which says who wrote it"
            )
        elif _means_the_same(result, source):
            report.notes.append(
                f"config.json is written anew ({', '.join(changed)}); transformers reads it as the source's"
            )
        else:
            report.problems.append(f"config.json differs from the source's in {', '.join(changed)}")
    same = 0
    for name in source.sidecars:
        path = result.root / name
        if name == "config.json":
            continue
        grave = made_here or _is_served(name)
        if not path.exists():
            (report.problems if grave else report.notes).append(f"{name}: the source has it, the checkpoint does not")
        elif path.read_bytes() == (source.root / name).read_bytes():
            same += 1
        elif made_here or not _says_the_same(path, source.root / name):
            (report.problems if grave else report.notes).append(f"{name}: it differs from the source's")
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


def _means_the_same(result: Checkpoint, source: Checkpoint) -> bool:
    """Whether transformers makes the same of both configs: ModelOpt's export saves its own normal form."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns of its own classes here
    made = []
    for checkpoint in (result, source):
        try:
            values = AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=False).to_dict()
        except Exception:  # a config that transformers cannot read means nothing in particular
            return False
        values.pop(SECTION, None)
        made.append(_without(values, {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}))
    same_dtype = dtype_said(result.config) == dtype_said(source.config)  # parts may say it more than once
    return bool(same_dtype and made[0] == made[1])


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return value
