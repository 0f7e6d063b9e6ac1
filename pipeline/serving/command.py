"""The command that serves a result, here and where it was downloaded."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def spelled_out(model: str, arguments: Mapping[str, Any]) -> str:
    """The command with a serve config's arguments as words, for a reader who does not have that file; a line each.

    vLLM 0.32 makes these words of a file itself (`FlexibleArgumentParser.load_config_file`): JSON of mappings, a word
    for each item of a list, and of a truth value a flag, or its ``--no-`` form.

    Args:
        model: what is served: a hub id or a directory.
        arguments: as `profile.arguments` made them.
    """
    lines = [shlex.join(["vllm", "serve", model])]
    for name, value in arguments.items():
        if isinstance(value, bool):
            words = [f"--{name}" if value else f"--no-{name}"]
        elif isinstance(value, list):
            words = [f"--{name}", *map(str, value)]
        else:
            words = [f"--{name}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
        lines.append(shlex.join(words))
    return " \\\n  ".join(lines)
