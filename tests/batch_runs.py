"""What the batch's tests share: a run as a process, twelve small jobs of which four cannot end well, and a plan."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.backends.registry import choose_backend
from pipeline.batch.planning import JobPlan
from pipeline.events import read_events
from pipeline.recipe import recipe as recipes
from pipeline.run.estimate import Work
from tests.conftest import CALIBRATED, QUANTIZE, RECIPE, ROOT, SCHEMES, make_plain_checkpoint, read_shard, write_shard
from tests.processes import command_lines

BEST = {"plain2", "plain3", "plain4", "plain5", "vl", "moe", "tied", "killed"}
WORST = {"bad": "recipe", "short": "source", "huge": "too large", "refused-by-vllm": "verification"}
RECORDS = ("events.jsonl", "layers.json", "recipe.yaml", "serve.yaml", "verify.json", "lock", "journal.jsonl")


@dataclass
class BatchRun:
    """A directory with a recipe for each job, and the batch that runs them.

    Attributes:
        root: of all.
        recipes: the directory of the recipes.
    """

    root: Path
    recipes: Path

    def output(self, name: str) -> Path:
        """Where a job publishes."""
        return self.root / "results" / name

    def start(self, *options: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """The batch as a process, its words in a file."""
        with (self.root / "said.txt").open("a") as said:
            return subprocess.Popen(
                [*QUANTIZE, "batch", str(self.recipes), "--directory", str(self.root / "batch"), *map(str, options)],
                cwd=self.root, stdout=said, stderr=said, text=True, env=env or os.environ,
            )  # fmt: skip

    def said(self) -> str:
        """What the batch has said so far."""
        return (self.root / "said.txt").read_text()

    def report(self) -> dict[str, Any]:
        """The report's facts."""
        found: dict[str, Any] = json.loads((self.root / "batch" / "report.json").read_text())
        return found

    def jobs(self) -> dict[str, dict[str, Any]]:
        """The report's jobs by name."""
        return {job["name"]: job for job in self.report()["jobs"]}

    def result(self, name: str) -> dict[str, bytes]:
        """What a published job holds, but for the records of the run itself and what names its place."""
        output = self.output(name)
        return {
            path.relative_to(output).as_posix(): path.read_bytes()
            for path in sorted(output.rglob("*"))
            if path.is_file() and path.name not in RECORDS
        }

    def runs(self, name: str) -> list[dict[str, Any]]:
        """The beginnings of a job's attempts, as its record tells them."""
        for place in (self.output(name), Path(f"{self.output(name)}.partial")):
            path = place / "quantize" / "events.jsonl"
            if path.exists():
                return [event for event in read_events(path) if event["event"] == "run"]
        return []


def a_plan(output: Path | str = "/o", backend: str = "modelopt", work: Path | None = None, **changes: Any) -> JobPlan:
    """The plan of a small calibrated job that does not exist."""
    runtime = f"runtime: {{work_directory: {work}}}\n" if work is not None else ""
    text = CALIBRATED.format(source="s", output=output, backend=backend, scheme=SCHEMES[backend], captions="embedded",
                             samples=9)  # fmt: skip
    recipe = recipes.parse(text + runtime)
    scheme = choose_backend(recipe)
    work = Work(
        backend=scheme.name, import_seconds=scheme.import_seconds, forward_cost=scheme.forward_cost, device="cpu",
        verify="structure", source_bytes=10**9, stream_bytes=2 * 10**8, layer_bytes=8 * 10**8, layers=10,
        tokens=10_000, batches=10,
    )  # fmt: skip
    plan = JobPlan(
        recipe=recipe, revision=None, to_fetch=0, work=work, output_bytes=6 * 10**8, peak_memory=10**9,
        disk=7 * 10**8, scratch=0, gpu=False, threads=2, already=False,
    )  # fmt: skip
    of_work = {key: changes.pop(key) for key in list(changes) if hasattr(work, key)}
    return replace(plan.with_work(**of_work), **changes)


def twelve(root: Path, captions: Path, small_model: Callable[[str], Path]) -> BatchRun:
    """Twelve recipes: eight good ones, one of which is to be killed; a wrong one, a source that was cut, a result that
    vLLM refuses, and one that no drive can hold."""
    run = BatchRun(root, root / "recipes")
    run.recipes.mkdir(parents=True)

    def recipe(name: str, text: str) -> None:
        (run.recipes / f"{name}.yaml").write_text(text)

    def plain(name: str, source: Path) -> None:
        recipe(name, RECIPE.format(source=source, output=run.output(name)))

    def calibrated(name: str, source: Path, backend: str, more: str = "") -> None:
        text = CALIBRATED.format(
            source=source, output=run.output(name), backend=backend, scheme=SCHEMES[backend], captions=captions,
            samples=60,
        )  # fmt: skip
        recipe(name, text + more)

    for layers in (2, 3, 4, 5):
        plain(f"plain{layers}", make_plain_checkpoint(root / "sources" / f"plain{layers}", layers=layers))
    calibrated("vl", small_model("qwen3_vl"), "llmcompressor")
    calibrated("moe", small_model("qwen3_moe"), "llmcompressor")
    calibrated("tied", small_model("llama_tied"), "modelopt")
    calibrated("killed", small_model("qwen2_5_vl"), "modelopt")
    vllm = f"\nruntime: {{vllm_python: '{ROOT / '.venv-vllm' / 'bin' / 'python'}'}}\n"
    text = RECIPE.format(source=small_model("qwen3"), output=run.output("refused-by-vllm"))
    recipe("refused-by-vllm", text.replace("verify: structure", "verify: load") +
           "serve: {extra: {no-such-argument: 1}}" + vllm)  # fmt: skip
    recipe("bad", RECIPE.format(source="nowhere", output=run.output("bad")).replace("fp8_dynamic", "fp9"))
    short = make_plain_checkpoint(root / "sources" / "short")
    last = max(short.glob("*.safetensors"))
    os.truncate(last, last.stat().st_size - 100)
    plain("short", short)
    # beyond the whole drive, and what the test's cluster says of its nodes' drives
    plain("huge", with_a_hole(root / "sources" / "huge", shutil.disk_usage(root).total + 10**11))
    return run


def with_a_hole(directory: Path, nbytes: int) -> Path:
    """A checkpoint whose last tensor has so many bytes, or a few more; on the drive it is a hole."""
    last, columns = "visual.merger.weight", 64
    make_plain_checkpoint(directory, shards=1, extra={last: (1, columns)})
    path = directory / "model.safetensors"
    header, data = read_shard(path)
    rows = nbytes // (2 * columns) + 1
    begin = header[last]["data_offsets"][0]
    header[last].update(shape=[rows, columns], data_offsets=[begin, begin + 2 * rows * columns])
    write_shard(path, header, data[:begin])
    os.truncate(path, path.stat().st_size + 2 * rows * columns)
    return directory


def kill_once(run: BatchRun, name: str, kill: Callable[[int], None], seconds: float = 240) -> int:
    """Wait until a job has finished a unit and begun its libraries' imports, then `kill` with its process's number."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        runs = run.runs(name)
        journal = Path(f"{run.output(name)}.partial") / "quantize" / "journal.jsonl"
        if runs and journal.exists() and journal.read_bytes().count(b"\n") >= 2:
            kill(int(runs[-1]["pid"]))
            return int(runs[-1]["pid"])
        time.sleep(0.01)
    raise AssertionError(f"{name} never came to its first unit:\n{run.said()}")


def sigkill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def job_processes(root: Path) -> list[str]:
    """The command lines of jobs of this run that still run."""
    return command_lines("pipeline.batch", str(root))


def wait_for(what: Callable[[], bool], seconds: float, why: str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


def check(run: BatchRun) -> None:
    """What must hold of the twelve at the end, wherever they ran."""
    report, jobs = run.report(), run.jobs()
    assert report["exit_status"] == 1 and report["ended"]
    assert {name for name, job in jobs.items() if job["status"] == "published"} == BEST, run.said()
    for name, kind in WORST.items():
        assert jobs[name]["class"] == kind, jobs[name]
        assert jobs[name]["status"] in ("failed", "refused") and not run.output(name).exists()
        assert jobs[name]["reason"] and jobs[name]["remedy"] and jobs[name]["resume"].startswith("quantize ")
        assert len(jobs[name]["attempts"]) <= 1, "never retried"
    assert "no-such-argument" in jobs["refused-by-vllm"]["reason"]
    assert any("no-such-argument" in line for line in jobs["refused-by-vllm"]["last_lines"])
    for name in BEST:
        job = jobs[name]
        assert run.output(name).is_dir() and not Path(f"{run.output(name)}.partial").exists()
        assert job["attempts"] and job["attempts"][-1]["exit_status"] == 0 and job["verdict"]["passed"]
        assert job["seconds"] > 0 and job["forecast_s"] > 0 and job["peak_rss_bytes"] > 0
        for file in job["files"]:
            assert (run.root / "batch" / file["href"]).exists(), file
    page = (run.root / "batch" / "report.html").read_text()
    assert all(name in page for name in [*BEST, *WORST])


if __name__ == "__main__":  # by hand: python -m tests.batch_runs DIRECTORY, to look at the report
    from tests import conftest, families

    root = Path(sys.argv[1]).absolute()
    root.mkdir(parents=True)
    (root / "captions.txt").write_text("\n".join(conftest.SENTENCES) + "\n")
    twelve(root, root / "captions.txt", lambda name: families.save(name, root / "sources" / name))
