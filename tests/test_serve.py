"""The documented command, in the environment that scripts/setup_vllm.sh makes: a server that answers and ends."""

from __future__ import annotations

import base64
import io
import json
import os
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
from tests.conftest import ROOT, SCHEMES
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
def served(words: list[str], directory: Path) -> Iterator[int]:
    """A server of one's own, on a free port; it is stopped as a user does, with Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = directory / "serve.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*words, "--host", "127.0.0.1", "--port", str(port)],
            cwd=directory, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
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
