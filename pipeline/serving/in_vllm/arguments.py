"""A serving profile against the arguments of the vLLM that is installed."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Parse a profile as ``vllm serve --config`` does; nothing is started.

    Args:
        job: ``profile``, the YAML file; ``checkpoint``, a directory.

    Returns:
        ``problem``: what vLLM's parser says of it, or null; ``vllm``: the version.
    """
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    said = io.StringIO()
    result: dict[str, Any] = {"error": None, "vllm": vllm.__version__, "problem": None}
    try:
        with contextlib.redirect_stderr(said):
            serve = make_arg_parser(FlexibleArgumentParser())
            sys.argv = ["vllm", "serve", job["checkpoint"], "--config", job["profile"]]
            parsed = serve.parse_args(sys.argv[2:])
            validate_parsed_serve_args(parsed)
        parsed.model = job["checkpoint"]
        EngineArgs.from_cli_args(parsed).create_model_config()  # the context's length and the config's overrides
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if "error:" in line]
        result["problem"] = lines[-1].partition("error:")[2].strip() if lines else "vLLM's parser refuses it"
    except (TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "validation error" not in line]
        result["problem"] = lines[0].partition(" [type=")[0] if lines else type(error).__name__
    return result
