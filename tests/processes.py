"""What runs on this machine, for tests that look for leftovers."""

from __future__ import annotations

from pathlib import Path


def command_lines(*containing: str) -> list[str]:
    """The command lines of all processes that contain every one of these texts."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if all(text in line for text in containing):
            found.append(line)
    return found
