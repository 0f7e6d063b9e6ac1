"""Hub ids: a cache laid out by hand, and a small hub on loopback; huggingface_hub itself does the work."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RECIPE, all_tensors, assert_one_clear_line, make_plain_checkpoint
from tests.hub_cache import COMMIT, NAME, lay_out_cache

OTHER = "6" * 40


class Hub:
    """Repositories as directories; serves what huggingface_hub asks for, and remembers it."""

    def __init__(self) -> None:
        self.revisions: dict[str, tuple[str, Path]] = {}  # branch or commit → (commit, directory)
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self.gated = False
        self.before_shards: Callable[[], None] = lambda: None  # what the download of a whole shard waits for
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                if "Content-Length" not in (headers or {}):
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.asked.append((self.command, self.path, self.headers.get("Range", "")))
                path = self.path.split("?")[0]
                if hub.gated:
                    return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
                parts = path.strip("/").split("/")
                if path.startswith("/api/models/"):
                    repository, rest = "/".join(parts[2:4]), parts[4:]
                else:
                    repository, rest = "/".join(parts[:2]), parts[2:]
                if repository != NAME:
                    return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                revision = rest[1] if len(rest) > 1 else "main"
                if revision not in hub.revisions:
                    return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                commit, directory = hub.revisions[revision]
                if path.startswith("/api/models/"):
                    files = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
                    if rest and rest[0] == "tree":
                        listed = [
                            {"type": "file", "path": f, "size": (directory / f).stat().st_size, "oid": "0" * 40}
                            for f in files
                        ]
                        return self.answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
                    info = {"id": NAME, "sha": commit, "siblings": [{"rfilename": f} for f in files], "tags": []}
                    return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
                file = directory / "/".join(rest[2:])
                if not file.is_file():
                    return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                if self.command == "GET" and file.suffix == ".safetensors" and not self.headers.get("Range"):
                    hub.before_shards()
                if not file.is_file():  # by now
                    return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                body = file.read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}
                wanted = self.headers.get("Range")
                if wanted and self.command == "GET":
                    begin, _, end = wanted.removeprefix("bytes=").partition("-")
                    last = min(int(end), len(body) - 1) if end else len(body) - 1
                    part = body[int(begin) : last + 1]
                    headers["Content-Range"] = f"bytes {begin}-{last}/{len(body)}"
                    return self.answer(206, part, headers)
                headers["Content-Length"] = str(len(body))
                return self.answer(200, body, headers)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fetched(self) -> set[str]:
        """Files whose content was asked for."""
        resolved = [path.split("/resolve/")[1] for m, path, _ in self.asked if m == "GET" and "/resolve/" in path]
        return {path.split("/", 1)[1] for path in resolved}


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def online(tmp_path: Path, hub: Hub) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def test_a_cached_model_offline(tmp_path: Path, quantize: Any, write_recipe: Any, offline: dict) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    lay_out_cache(tmp_path / "hf", source)
    done = quantize(write_recipe(NAME), env=offline)
    assert done.returncode == 0, done.stderr
    assert quantize(write_recipe(source), f"output={tmp_path / 'plain'}").returncode == 0
    assert all_tensors(tmp_path / "out") == all_tensors(tmp_path / "plain")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {NAME}\n" in card and "base_model_relation: quantized\n" in card and COMMIT in card
    assert "source: " + NAME in card and str(tmp_path) not in card
    again = quantize(write_recipe(NAME), env=offline)
    assert again.returncode == 0 and "done already" in again.stdout


def test_a_revision_in_the_cache(tmp_path: Path, quantize: Any, write_recipe: Any, offline: dict) -> None:
    first, second = make_plain_checkpoint(tmp_path / "a"), make_plain_checkpoint(tmp_path / "b", layers=3)
    lay_out_cache(tmp_path / "hf", first)
    lay_out_cache(tmp_path / "hf", second, OTHER, "v2")
    done = quantize("plan", write_recipe(NAME), "model.revision=v2", "--json", env=offline)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["language_model"]["layers"] == 3 and told["source"]["revision"] == OTHER
    missing = quantize(write_recipe(NAME), "model.revision=v9", env=offline)
    assert_one_clear_line(missing, 1, "not in the cache", "HF_HUB_OFFLINE")


def test_an_incomplete_cache_offline(tmp_path: Path, quantize: Any, write_recipe: Any, offline: dict) -> None:
    root = lay_out_cache(tmp_path / "hf", make_plain_checkpoint(tmp_path / "source"))
    (root / "snapshots" / COMMIT / "model-00002-of-00002.safetensors").unlink()
    assert_one_clear_line(quantize(write_recipe(NAME), env=offline), 1, "model-00002-of-00002.safetensors", "cache")


def test_a_download_takes_only_what_is_needed(
    tmp_path: Path, quantize: Any, write_recipe: Any, hub: Hub, online: dict
) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "original/params.bin", "onnx/m.onnx"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"not needed")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    hub.revisions = {"main": (COMMIT, source), COMMIT: (COMMIT, source)}
    done = quantize(write_recipe(NAME), env=online)
    assert done.returncode == 0, done.stderr + done.stdout
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    small = {"config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors.index.json"}
    assert hub.fetched() == shards | small
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_plan_fetches_headers_alone(tmp_path: Path, quantize: Any, write_recipe: Any, hub: Hub, online: dict) -> None:
    source = make_plain_checkpoint(tmp_path / "source", vocabulary=60_000, hidden=64)
    hub.revisions = {"main": (COMMIT, source), COMMIT: (COMMIT, source)}
    remote = quantize("plan", write_recipe(NAME), "--json", env=online)
    assert remote.returncode == 0, remote.stderr
    ranged = [wanted for m, path, wanted in hub.asked if m == "GET" and ".safetensors" in path and "index" not in path]
    assert ranged and all(wanted for wanted in ranged), "a whole shard was fetched for a plan"
    local = json.loads(quantize("plan", write_recipe(source), "--json").stdout)
    told = json.loads(remote.stdout)
    assert told["tensors"] == local["tensors"] and told["output"] == local["output"]
    assert told["source"]["tensors"] == local["source"]["tensors"]


def test_a_model_in_a_single_file(tmp_path: Path, quantize: Any, write_recipe: Any, hub: Hub, online: dict) -> None:
    source = make_plain_checkpoint(tmp_path / "source", shards=1)
    hub.revisions = {"main": (COMMIT, source), COMMIT: (COMMIT, source)}
    done = quantize(write_recipe(NAME), env=online)
    assert done.returncode == 0, done.stderr


def test_what_a_hub_may_refuse(tmp_path: Path, quantize: Any, write_recipe: Any, hub: Hub, online: dict) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    hub.revisions = {"main": (COMMIT, source), COMMIT: (COMMIT, source)}
    assert_one_clear_line(quantize(write_recipe("studio/absent"), env=online), 1, "not on the hub", "HF_TOKEN")
    wrong = quantize(write_recipe(NAME), "model.revision=nope", env=online)
    assert_one_clear_line(wrong, 1, "no revision nope")
    hub.gated = True
    assert_one_clear_line(quantize(write_recipe(NAME), env=online), 1, "gated", "HF_TOKEN")


def test_a_hub_model_of_pickles(tmp_path: Path, quantize: Any, write_recipe: Any, hub: Hub, online: dict) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    hub.revisions = {"main": (COMMIT, source), COMMIT: (COMMIT, source)}
    assert_one_clear_line(quantize(write_recipe(NAME), env=online), 1, "pickle", "save_pretrained")
    assert "pytorch_model.bin" not in hub.fetched()


def test_a_revision_needs_a_hub_id(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    assert_one_clear_line(quantize(write_recipe(source), "model.revision=v1"), 2, "model.revision", "directory")


def test_a_hub_that_went_away(tmp_path: Path, quantize: Any, write_recipe: Any, hub: Hub, online: dict) -> None:
    """The small files are cached, the shards are not, and nobody answers."""
    root = lay_out_cache(tmp_path / "hf", make_plain_checkpoint(tmp_path / "source"))
    for shard in (root / "snapshots" / COMMIT).glob("*.safetensors"):
        shard.unlink()
    hub.server.shutdown()
    hub.server.server_close()
    for command in (["plan"], []):
        assert_one_clear_line(quantize(*command, write_recipe(NAME), env=online), 1, NAME)


def test_a_smoke_test_fetches_only_the_shards_of_its_layers(
    tmp_path: Path, quantize: Any, write_recipe: Any, hub: Hub, online: dict
) -> None:
    """Embeddings and the first layers are in the first shards, the head in the last; the middle stays on the hub."""
    source = make_plain_checkpoint(tmp_path / "source", layers=12, shards=4)
    hub.revisions = {"main": (COMMIT, source), COMMIT: (COMMIT, source)}
    done = quantize(write_recipe(NAME), "--smoke", env=online)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoke test passed: 2 of 12 layers" in done.stdout
    whole = {path for method, path, wanted in hub.asked if method == "GET" and not wanted and ".safetensors" in path}
    assert {path.rpartition("/")[2] for path in whole} == {
        "model.safetensors.index.json", "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors",
    }  # fmt: skip


def test_a_batch_downloads_while_it_converts(tmp_path: Path, quantize: Any, hub: Hub, online: dict[str, str]) -> None:
    """One download for two jobs, which waits here until another job is published: that one did not wait for it."""
    source = make_plain_checkpoint(tmp_path / "source", vocabulary=30_000, hidden=64)
    hub.revisions = {"main": (COMMIT, source), COMMIT: (COMMIT, source)}
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name, wanted in (("first", NAME), ("second", NAME), ("here", str(make_plain_checkpoint(tmp_path / "small")))):
        (recipes / f"{name}.yaml").write_text(RECIPE.format(source=wanted, output=tmp_path / "out" / name))
    met = []

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "here").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        met.append((tmp_path / "out" / "here").exists())

    hub.before_shards = wait
    done = quantize("batch", recipes, "--directory", tmp_path / "night", env=online)
    assert done.returncode == 0, done.stdout + done.stderr
    assert met == [True, True], "two shards, each once, after the local job"
    assert "to download" in done.stdout
    assert all_tensors(tmp_path / "out" / "first") == all_tensors(tmp_path / "out" / "second")
    whole = [path for m, path, wanted in hub.asked if m == "GET" and path.endswith(".safetensors") and not wanted]
    assert len(whole) == 2


def test_a_download_that_fails_costs_its_jobs_alone(
    tmp_path: Path, quantize: Any, hub: Hub, online: dict[str, str]
) -> None:
    """The hub answers for the plan, and no more when the shards are asked for."""
    source = make_plain_checkpoint(tmp_path / "source", vocabulary=30_000, hidden=64)
    hub.revisions = {"main": (COMMIT, source), COMMIT: (COMMIT, source)}
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name, wanted in (("lost", NAME), ("here", str(make_plain_checkpoint(tmp_path / "small")))):
        (recipes / f"{name}.yaml").write_text(RECIPE.format(source=wanted, output=tmp_path / "out" / name))

    def lose() -> None:
        for path in source.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    hub.before_shards = lose
    fast = "import pipeline.batch.fetch as f, sys; f.Fetcher.pause = 0.1; from pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", fast, "batch", recipes, "--directory", tmp_path / "night"],
        capture_output=True, text=True, env={**os.environ, **online}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    jobs = {job["name"]: job for job in json.loads((tmp_path / "night" / "report.json").read_text())["jobs"]}
    assert jobs["here"]["status"] == "published"
    assert (jobs["lost"]["status"], jobs["lost"]["class"]) == ("failed", "source") and not jobs["lost"]["attempts"]
    assert NAME in jobs["lost"]["reason"]
