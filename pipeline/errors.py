"""The ways a command ends, each with its exit status.

0 done; 1 failed, nothing published; 2 the recipe or the command line is wrong; 75 (EX_TEMPFAIL)
interrupted after a clean save, run again to go on.
"""

import errno


class PipelineError(Exception):
    """Something in the world stands in the way: the source, the disk, the result. Its text is for the user."""

    exit_status = 1


class UsageError(PipelineError):
    """The recipe or the command line asks for what cannot be. The text may hold several lines, one an error."""

    exit_status = 2


class Interrupted(PipelineError):
    """A signal asked for an end; everything finished is saved."""

    exit_status = 75


def explain_os_error(error: OSError, doing: str) -> str:
    """One line that says what failed, where, and what to do about it.

    Args:
        error: as the system raised it.
        doing: what was under way, e.g. ``"writing /nvme/out.partial"``.
    """
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full while {doing}{where}; free some space and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission while {doing}{where}: {error.strerror}; choose a directory you may write to"
    if error.errno == errno.EIO:
        return f"the device failed while {doing}{where}: {error.strerror}; check the drive, then run again"
    return f"{doing} failed{where}: {error.strerror or error}"
