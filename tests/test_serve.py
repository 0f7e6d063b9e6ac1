"""The documented command, in the environment that scripts/setup_vllm.sh makes: a server that answers and ends."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import convert
from pipeline.vllm_env.environment import VllmEnvironment
from tests.conftest import ROOT, SCHEMES, has_fp8_kernels
from tests.processes import command_lines

pytestmark = pytest.mark.vllm
START = 600.0  # seconds; it compiles, and the cores are shared


def ask(port: int, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=START) as answer:
        text = answer.read()
    return json.loads(text) if text else None


@contextmanager
def served(words: list[str], directory: Path, env: dict[str, str] | None = None) -> Iterator[int]:
    """A server of one's own, on a free port; it is stopped as a user does, with Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = directory / "serve.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*words, "--host", "127.0.0.1", "--port", str(port)],
            cwd=directory, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**(env or os.environ), "VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        yield port
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def picture() -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (96, 64), (200, 30, 30)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
def test_the_documented_command_serves_text_and_a_picture(
    kv_cache: str, demo_model: Path, vllm: VllmEnvironment, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kv_cache == "fp8":
        request.getfixturevalue("fp8_kernels")
    recipe = {
        "model": {"source": str(demo_model)}, "output": str(tmp_path / "out"), "backend": "llmcompressor",
        "scheme": SCHEMES["llmcompressor"], "kv_cache": kv_cache, "verify": "structure",
        "calibration": {"captions": "embedded", "samples": 32},
        "serve": {"max_model_len": 256, "limit_mm_per_prompt": {"image": 1}, "extra": {"max-num-batched-tokens": 256}},
    }  # fmt: skip
    convert(recipe, quiet=True)
    config = tmp_path / "out/quantize/serve.yaml"
    comment = config.read_text().splitlines()[0]
    assert comment == "#   vllm serve out --config out/quantize/serve.yaml"
    command = [str(vllm.python.with_name("vllm")), *comment.split()[2:]]
    with served(command, tmp_path) as port:
        (model,) = ask(port, "/v1/models")["data"]
        assert (model["id"], model["max_model_len"]) == ("out", 256)
        pictured = [{"type": "image_url", "image_url": {"url": picture()}}, {"type": "text", "text": "What is it?"}]
        for content in ("A small red boat", pictured):
            body = {"model": "out", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
            answer = ask(port, "/v1/chat/completions", body)
            assert answer["usage"]["completion_tokens"] > 0 and answer["choices"][0]["message"]["content"]
        body = {"model": "out", "prompt": "A small red boat waits", "max_tokens": 4, "temperature": 0}
        assert "at the" in ask(port, "/v1/completions", body)["choices"][0]["text"]  # the demo's model has learned it
    assert not command_lines("vllm", str(port)), "a server is left behind"


def test_the_quick_start_as_it_is_typed(demo_model: Path, vllm: VllmEnvironment, tmp_path: Path) -> None:
    """README.md's own lines, but for the KV cache where no kernel runs it in FP8.

    The hub's cache holds a small model by the name that they ask for.
    """
    kv_cache = "fp8" if has_fp8_kernels(vllm) else "none"
    text = (ROOT / "README.md").read_text()
    install, typed, question = [part.split("```")[1].strip() for part in _sections(text)]
    snapshot = tmp_path / "hub/models--Qwen--Qwen3-VL-8B-Instruct/snapshots" / ("5" * 40)
    shutil.copytree(demo_model, snapshot)
    (refs := snapshot.parents[1] / "refs").mkdir()
    (refs / "main").write_text(snapshot.name)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    (setting,) = [line for line in install.splitlines() if line.startswith("export PATH=")]
    script = f"cd {ROOT} && {setting} && cd {tmp_path} && set -ex\n"
    *lines, serve = typed.replace("kv_cache: fp8", f"kv_cache: {kv_cache}").splitlines()
    done = subprocess.run(
        ["bash", "-c", script + "\n".join(lines)], env=env, capture_output=True, text=True, check=False, timeout=START
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with served(["bash", "-c", f'{script}exec {serve} "$@"', "serve"], tmp_path, env) as port:
        asked = question.replace("localhost:8000", f"127.0.0.1:{port}")
        answer = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True, timeout=START)
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"], answer.stdout


def _sections(text: str) -> list[str]:
    """The parts of README.md that begin with a block of commands: how to install, convert and ask."""
    quick = text.partition("## Quick start")[2]
    return [text.partition("## Install")[2], quick, quick.partition("from another terminal")[2]]


def test_the_command_knows_its_version(vllm: VllmEnvironment) -> None:
    done = subprocess.run([vllm.python.with_name("vllm"), "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and vllm.version in done.stdout, done.stderr


def test_the_lines_that_the_demo_ends_with(demo_model: Path, tmp_path: Path) -> None:
    """As they stand, but for the model and the directory; the last one is the command of the test above."""
    text = (ROOT / "scripts" / "demo.sh").read_text()
    lines = text.partition("<<'LINES'\n")[2].partition("\nLINES")[0].splitlines()
    assert len(lines) == 5 and lines[4] == "vllm serve out/mine --config out/mine/quantize/serve.yaml"
    script = "\n".join(
        [lines[0].replace("$PWD", str(ROOT)), f"MODEL='{demo_model}'", *lines[2:4], "which quantize vllm"]
    )
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = tmp_path / "out/mine"
    assert f"serve it: vllm serve {made} --config {made}/quantize/serve.yaml" in done.stdout
    assert (made / "quantize/serve.yaml").exists()
