"""Processes that do not outlive who started them, and how one ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Get SIGTERM when the process `parent`, which started this one, ends, however it ends. Linux alone has this.

    SIGTERM ends a conversion at the end of its unit, so that nothing is lost.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGTERM)


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has ended for want of memory so far: on the machine, and in this control group."""
    found = 0
    for name, word in (
        ("proc/vmstat", "oom_kill"),
        ("sys/fs/cgroup/memory.events", "oom_kill"),
        ("sys/fs/cgroup/memory/memory.oom_control", "oom_kill"),
    ):
        try:
            lines = (root / name).read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            continue
        found += sum(int(line.split()[1]) for line in lines if line.split()[:1] == [word])
    return found


def signal_name(status: int) -> str:
    """``SIGKILL`` for the return code -9."""
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
