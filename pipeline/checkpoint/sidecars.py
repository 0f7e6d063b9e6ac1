"""Everything beside the weights: small files byte for byte, config.json with its new section, the index."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.checkpoint.result import FILES
from pipeline.checkpoint.source import Checkpoint, SourceError, read_json
from pipeline.checkpoint.writer import write_file

SECTION = "quantization_config"


def carry_files(checkpoint: Checkpoint, target: Path) -> None:
    """Copy tokenizer, processor, chat template and all other small files as they are, config.json excepted.

    Their hashes are recorded in `FILES`.
    """
    copied = [name for name in checkpoint.sidecars if name != "config.json"]
    for name in copied:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.root / name, target / name)
    record_files(target, {}, copied)


def changed_files(root: Path) -> dict[str, str]:
    """What became of the small files that a run recorded, in words by name; empty where they are as they were.

    Raises:
        SourceError: the record itself is damaged.
    """
    found = {}
    for name, digest in read_json(root / FILES).items():
        file = root / name
        if not file.is_file():
            found[name] = "recorded by the run, absent here"
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            found[name] = "it is not the file that the run wrote (SHA-256 differs)"
    return found


def record_files(target: Path, before: dict[str, str], names: Iterable[str]) -> None:
    """Add the SHA-256 of the files `names` in `target` to those recorded `before`, and write `FILES`."""
    recorded = {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in names}
    write_file(target / FILES, (json.dumps({**before, **recorded}, indent=2) + "\n").encode())


def config_with(text: str, section: dict[str, Any]) -> str:
    """A config.json with the quantization section put before its last brace; every other byte stays.

    Args:
        text: of the source's config.json, an object without such a section (or with an empty one, which is
            replaced; the file is then written anew).
        section: the value of ``quantization_config``.
    """
    config = json.loads(text)
    if config.get(SECTION):
        raise SourceError(f"config.json: it has a {SECTION} already")
    if SECTION in config:
        return json.dumps({**config, SECTION: section}, indent=2, ensure_ascii=False) + "\n"
    head = text.rstrip()
    assert head.endswith("}")
    tail = text[len(head) :]
    head = head[:-1].rstrip()
    value = json.dumps(section, indent=2, ensure_ascii=False).replace("\n", "\n  ")
    result = f'{head}{"," if config else ""}\n  "{SECTION}": {value}\n}}{tail}'
    changed = json.loads(result)
    assert changed.pop(SECTION) == json.loads(json.dumps(section)) and changed == config
    return result
