"""The command that serves a result."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.checkpoint.result import PROFILE
from pipeline.vllm_env.environment import VllmEnvironment


def serve_command(output: Path, environment: VllmEnvironment | None) -> tuple[str, ...]:
    """The command that serves a result, word by word.

    Args:
        output: the published directory.
        environment: vLLM's, whose command is named by its path where no ``vllm`` is on the PATH; None: there is none.
    """
    command = "vllm"
    if environment is not None and shutil.which(command) is None:
        beside = environment.python.with_name(command)
        command = str(beside) if beside.exists() else command
    return command, "serve", str(output), "--config", str(output / PROFILE)
