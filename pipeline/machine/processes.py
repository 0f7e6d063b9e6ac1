"""Processes that do not outlive who started them, how one ended, and what the kernel grants this one."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys

from pipeline.machine.system import System, control_groups

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


def oom_kills(system: System | None = None) -> int:
    """How often the kernel has ended a process for want of memory so far: here, or in a control group around this one.

    A container may hide the machine's count, a kernel may count in one of the files only; a kill can count more than
    once. So only that the number grew means anything.
    """
    system = System.here() if system is None else system
    texts = [system.text("proc/vmstat")]
    for group in control_groups(system, "memory"):
        texts += [system.text(group, name) for name in ("memory.events", "memory.oom_control")]
    return sum(int(count) for text in texts for count in re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE))


def open_files(system: System | None = None) -> tuple[int, int] | None:
    """How many files this process may have open: the soft and the hard limit; None where the system does not say."""
    text = (System.here() if system is None else system).text("proc/self/limits")
    match = re.search(r"^Max open files\s+(\d+)\s+(\d+)", text, re.MULTILINE)
    return (int(match[1]), int(match[2])) if match else None


def signal_name(status: int) -> str:
    """``SIGKILL`` for the return code -9."""
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
