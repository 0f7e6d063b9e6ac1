"""The codes of findings: one table, every code of it in use, a page that is current, and levels by origin."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pipeline.model.ignore import IgnoreProblem
from pipeline.verify.codes import CODES, SECTIONS, codes_page
from pipeline.verify.ignore_list import IGNORE_CODES
from pipeline.verify.report import Finding, Report

ROOT = Path(__file__).parent.parent
CHECKS = [*(ROOT / "pipeline" / "verify").glob("*.py"), ROOT / "pipeline" / "run" / "gates.py"]
CHECKS.remove(ROOT / "pipeline" / "verify" / "codes.py")


def strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_code_of_the_table_is_used() -> None:
    used = {text for path in CHECKS for text in strings(ast.parse(path.read_text()))}
    assert [code for code in CODES if code not in used] == []


def codes_named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and word of every code that a finding is made with, or that is chosen for one in a variable `code`."""
    for node in ast.walk(tree):
        where: ast.expr | None = None
        if isinstance(node, ast.Call) and len(node.args) > 2:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            where = node.args[0] if called in ("add", "Finding") else None
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "code":
            where = node.value
        if where is not None:
            yield from ((node.lineno, text) for text in strings(where))


def test_no_code_is_used_that_is_not_in_the_table() -> None:
    named = [(path.name, *each) for path in CHECKS for each in codes_named(ast.parse(path.read_text()))]
    assert len(named) > 100
    assert [place for place in named if place[-1] not in CODES] == []


def test_codes_are_short_words_that_occur_once() -> None:
    assert sum(len(codes) for codes in SECTIONS.values()) == len(CODES)
    for code, entry in CODES.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", code) and len(code) <= 40
        assert entry.meaning.endswith(".") and {entry.own, entry.third_party} & {"problem", "note"}


def test_the_page_is_current() -> None:
    how = (
        "python -c 'from pipeline.verify.codes import codes_page; print(codes_page(), end=\"\")' > docs/verify-codes.md"
    )
    assert (ROOT / "docs" / "verify-codes.md").read_text() == codes_page(), f"run: {how}"


def test_every_kind_of_an_ignore_problem_has_a_code() -> None:
    kinds = get_args(get_type_hints(IgnoreProblem)["kind"])
    assert sorted(kinds) == sorted(IGNORE_CODES) and set(IGNORE_CODES.values()) <= CODES.keys()


@pytest.mark.parametrize("produced_here", [True, False])
def test_the_table_decides_on_the_level(produced_here: bool) -> None:
    report = Report("out", None, produced_here)
    report.add("file-differs", "README.md", "README.md: it differs from the source's")
    report.add("kv-scales-swapped", "a", "a: k_scale and v_scale are swapped")
    report.add("server-file-missing", "tokenizer.json", "there is no tokenizer", "copy it from the source")
    swapped, tokenizer = "a: k_scale and v_scale are swapped", "there is no tokenizer; copy it from the source"
    readme = "README.md: it differs from the source's"
    assert report.problems == ([readme, swapped] if produced_here else [tokenizer])
    assert report.notes == ([tokenizer] if produced_here else [readme])
    assert not report.passed
    with pytest.raises(KeyError):
        report.add("no-such-code", "", "")


def test_json_holds_findings() -> None:
    report = Report("out", None)
    report.add("server-file-missing", "tokenizer.json", "there is no tokenizer", "copy it from the source")
    report.add("vllm-warning", "", "vLLM warns: x")
    made = json.loads(json.dumps(report.as_json()))
    assert made["problems"] == ["there is no tokenizer; copy it from the source"]
    assert made["notes"] == ["vLLM warns: x"]
    assert made["findings"] == [
        {
            "code": "server-file-missing", "level": "problem", "subject": "tokenizer.json",
            "text": "there is no tokenizer", "remedy": "copy it from the source",
        },
        {"code": "vllm-warning", "level": "note", "subject": "", "text": "vLLM warns: x", "remedy": None},
    ]  # fmt: skip


def test_reports_on_one_checkpoint_are_put_together() -> None:
    report, other = Report("out", None, True), Report("out", None, True)
    report.add("vllm-warning", "", "vLLM warns: x")
    other.add("hash-differs", "a", "a: its bytes")
    other.checked.append("b")
    report.merge(other)
    assert report.findings == [
        Finding("vllm-warning", "", "vLLM warns: x"),
        Finding("hash-differs", "a", "a: its bytes"),
    ]
    assert report.checked == ["b"] and report.problems == ["a: its bytes"]
