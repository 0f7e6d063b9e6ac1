"""The ways a command ends, each with its exit status.

0 done; 1 failed, nothing published; 2 the recipe or the command line is wrong; 75 (EX_TEMPFAIL)
interrupted after a clean save, run again to go on.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar


class PipelineError(Exception):
    """Something in the world stands in the way: the source, the disk, the result. Its text is for the user.

    What is wrong and what to do about it are kept apart, so that no program needs to take a sentence to pieces.
    ``str(error)`` is both, as the command line prints them: ``message; remedy``.

    `kind` is the code of an error, for programs that must decide what to do next, such as a batch run. Codes are
    stable:

    ============= ====================================================================================
    failed        nothing more precise is known
    recipe        the recipe or the command line asks for what cannot be (exit status 2)
    source        the checkpoint cannot be used as it is
    disk          there is too little space now
    too large     the drive or the memory of this machine can never hold it
    out of memory memory of the host or of the GPU ran out
    verification  the result is complete and fails verification
    crashed       a GPU failed
    busy          another process works on the same output
    interrupted   a signal asked for an end; everything finished is saved (exit status 75)
    ============= ====================================================================================

    Attributes:
        message: what is wrong, a sentence, or several lines.
        remedy: what to do; None where the message has no advice, or has it in its middle.
        lines: what was added later; see `add_line`.
    """

    exit_status = 1
    kind = "failed"
    _joint = "; "  # between message and remedy

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(*((message,) if remedy is None else (message, remedy)))
        self.message, self.remedy = message, remedy
        self.lines: tuple[str, ...] = ()

    def add_line(self, line: str) -> None:
        """Put a line below the text, e.g. what became of the files that the work left."""
        self.lines += (line,)

    def __str__(self) -> str:
        text = self.message if self.remedy is None else f"{self.message}{self._joint}{self.remedy}"
        return "\n".join((text, *self.lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by state: subclasses have arguments of their own, which `args` does not hold."""
        return _without_init, (type(self), self.args), self.__dict__


def _without_init(kind: type[PipelineError], args: tuple[Any, ...]) -> PipelineError:
    return kind.__new__(kind, *args)


class UsageError(PipelineError):
    """The recipe or the command line asks for what cannot be. The text may hold several lines, one an error."""

    exit_status = 2
    kind = "recipe"


class OtherRun(UsageError):
    """What stands at the output, or is begun there, belongs to a run of another identity.

    The message has a line for each difference; the remedy stands on a line of its own.

    Attributes:
        fields: of the identity that differ.
        begun: it is unfinished work, not a published result.
        differences: the same as plain data, see `pipeline.identity.Difference.as_json`.
    """

    _joint = "\n"

    def __init__(
        self,
        message: str,
        fields: frozenset[str],
        begun: bool,
        remedy: str | None = None,
        differences: tuple[dict[str, Any], ...] = (),
    ) -> None:
        super().__init__(message, remedy)
        self.fields, self.begun, self.differences = fields, begun, differences


class Interrupted(PipelineError):
    """A signal asked for an end; everything finished is saved."""

    exit_status = 75
    kind = "interrupted"


class DiskFull(PipelineError):
    """There is too little space now; more may come."""

    kind = "disk"


class TooLarge(PipelineError):
    """This machine can never hold it: the drive or the memory as a whole is smaller."""

    kind = "too large"


class OutOfMemory(PipelineError):
    """Memory of the host or of the GPU ran out."""

    kind = "out of memory"


class VerificationFailed(PipelineError):
    """The result is complete, and does not pass; it is not published.

    Attributes:
        report: what the gates found (`pipeline.verify.report.Report`); None where only its record was read.
    """

    kind = "verification"

    def __init__(self, message: str, remedy: str | None = None, report: Any = None) -> None:
        super().__init__(message, remedy)
        self.report = report


class DeviceFault(PipelineError):
    """A GPU failed; another attempt may well not."""

    kind = "crashed"


class Busy(PipelineError):
    """Another process works on the same output."""

    kind = "busy"


OUT_OF_MEMORY = (  # as torch, CUDA and its libraries say it in a RuntimeError
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_device_fault(error: BaseException) -> bool:
    """Whether CUDA itself failed (an illegal access, a lost device), not what ran on it."""
    return (
        isinstance(error, RuntimeError)
        and not is_out_of_memory(error)
        and any(word in str(error) for word in ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS"))
    )


def from_os_error(error: OSError, doing: str) -> PipelineError:
    """What the system raised, as a PipelineError: what failed, where, and what to do about it.

    Args:
        error: as the system raised it.
        doing: what was under way, e.g. ``"writing /nvme/out.partial"``.
    """
    where = f" ({error.filename})" if error.filename else ""
    why = f"{doing}{where}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"the disk is full while {doing}{where}", remedy="free some space and run the same command again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PipelineError(f"no permission while {why}", remedy="choose a directory you may write to")
    if error.errno == errno.EIO:
        return PipelineError(f"the device failed while {why}", remedy="check the drive, then run again")
    kind = OutOfMemory if error.errno == errno.ENOMEM else PipelineError
    return kind(f"{doing} failed{where}: {error.strerror or error}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a GPU, however a library says so."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in OUT_OF_MEMORY)


T = TypeVar("T")


def seen_from(path: Path) -> str:
    """Where a relative path was looked for, to follow it in a message; empty for an absolute one."""
    return "" if path.is_absolute() else f" in {Path.cwd()}, the working directory"


def attempt(doing: str, call: Callable[[], T]) -> T:
    """Do a part of a run; what the system raises becomes a PipelineError.

    Args:
        doing: what is under way, for the message, e.g. ``"writing /nvme/out.partial"``.
        call: does it.

    Raises:
        PipelineError: for an OSError, see `from_os_error`.
        OutOfMemory: memory of the host or of a GPU ran out.
    """
    try:
        return call()
    except OSError as error:
        raise from_os_error(error, doing) from None
    except (MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"memory ran out while {doing} ({first_line(error)})",
            remedy="free some, or lower calibration.batch_tokens, runtime.threads or runtime.device_memory",
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
