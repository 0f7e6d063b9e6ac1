"""The hub's cache of one repository, laid out by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

COMMIT = "5" * 40
NAME = "studio/tiny-llama"


def lay_out_cache(home: Path, source: Path, commit: str = COMMIT, branch: str = "main") -> Path:
    """The hub's cache as its documentation describes it: blobs, a snapshot of links, a ref."""
    root = home / "hub" / f"models--{NAME.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    for path in (p for p in source.rglob("*") if p.is_file()):
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        link = root / "snapshots" / commit / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return root
