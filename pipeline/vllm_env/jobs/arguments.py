"""A serving profile against the vLLM that is installed: its arguments, and the KV cache that it takes."""

from __future__ import annotations

import contextlib
import io
import sys
from argparse import Action
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.vllm_env.jobs import origin
from pipeline.vllm_env.jobs.cache import need
from pipeline.vllm_env.jobs.load import sentence

READ = ("kv_cache_dtype", "max_model_len", "gpu_memory_utilization", "tensor_parallel_size")


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Parse a profile as ``vllm serve --config`` does; nothing is started.

    Args:
        job: ``profile``, the YAML file; ``checkpoint``, a directory.

    Returns:
        ``problem``: what vLLM's parser says of it, or what it would leave out in silence, or null; ``parsed``: what it
        reads, or null where it refuses: ``kv_cache_dtype``, ``max_model_len`` (tokens), ``gpu_memory_utilization`` and
        ``tensor_parallel_size``; ``cache``: what one sequence takes, see `cache.need`, or null where this vLLM does not
        tell; ``cache_error``: why not; ``vllm``: the version. What
        vLLM raised over the config has ``raised``, ``architectures`` and ``quant_method``, as `load.check` gives them.
    """
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    said = io.StringIO()
    result: dict[str, Any] = {"error": None, "vllm": vllm.__version__, "problem": None, "parsed": None}
    result |= {"cache": None, "cache_error": None}
    profile, result["problem"] = _read(Path(job["profile"]))
    if profile is None:
        return result
    try:
        with contextlib.redirect_stderr(said):
            serve = make_arg_parser(FlexibleArgumentParser())
            sys.argv = ["vllm", "serve", job["checkpoint"], "--config", job["profile"]]
            parsed = serve.parse_args(sys.argv[2:])
            validate_parsed_serve_args(parsed)
        result["parsed"] = {key: getattr(parsed, key) for key in READ}
        result["problem"] = _dropped(profile, serve._option_string_actions)
        parsed.model = job["checkpoint"]
        EngineArgs.from_cli_args(parsed).create_model_config()  # the context's length and the config's overrides
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if "error:" in line]
        result["problem"] = lines[-1].partition("error:")[2].strip() if lines else "vLLM's parser refuses it"
    except (TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "validation error" not in line]
        result["problem"] = lines[0].partition(" [type=")[0] if lines else type(error).__name__
        result |= {"raised": origin.of(error, "model"), **origin.registered(Path(job["checkpoint"]))}
    if result["problem"] is None:
        try:
            result["cache"] = need(EngineArgs.from_cli_args(parsed))
        except Exception as error:  # another version, another machine than the one it is for: no figure, no finding
            result["cache_error"] = sentence(error)
    return result


def _read(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """A profile's arguments; or None, and what is wrong with the file."""
    import yaml

    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        return None, f"the file is not YAML: {' '.join(str(error).split())}"
    if not isinstance(profile, dict) or not all(isinstance(key, str) for key in profile):
        return None, "the file is no mapping of arguments to values"
    return profile, None


def _dropped(profile: Mapping[str, Any], known: Mapping[str, Action]) -> str | None:
    """The first argument of a profile that vLLM passes over without a word, and why.

    It makes ``--no-NAME`` of a false value where it has that option, and nothing at all where it has not: a misspelt
    name goes unnoticed, and so does false for an argument that takes a value. An empty list, too, becomes nothing.
    """
    for key, value in profile.items():
        option = key.partition(".")[0].replace("_", "-")
        if f"--{option}" not in known:
            return f"{key}: vllm serve has no argument of that name"
        wanted = f"--no-{option}" in known or known[f"--{option}"].nargs != 0
        if value == [] or (value is False and f"--no-{key}" not in known and wanted):
            return f"{key}: vLLM would pass over this in silence; write {option}, with a value"
    return None
