"""The plans of a batch's jobs, and the estimates that are made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.batch.manifest import Job
from pipeline.batch.planning import JobPlan, Refusal, plan_all
from pipeline.recipe import recipe
from pipeline.run.estimate import Estimator, rule
from tests.batch_runs import a_plan
from tests.conftest import CALIBRATED, RECIPE, make_plain_checkpoint


def test_estimates_learn() -> None:
    """After one job, another of its kind, of any size, is estimated by what the machine has shown."""
    known, work = Estimator(), a_plan().work
    first = known.seconds(work)
    assert first == pytest.approx(sum(rule(work).values())) and not known.informed
    slow = {part: 3 * seconds for part, seconds in rule(work).items()}
    known.learn(work, slow)
    assert known.informed and known.seconds(work) == pytest.approx(3 * first)
    large = replace(work, stream_bytes=10**10, layer_bytes=4 * 10**10, tokens=50_000)
    assert known.seconds(large) == pytest.approx(3 * sum(rule(large).values()))
    other = a_plan(backend="llmcompressor").work  # of another backend: at least that
    assert known.seconds(other) == pytest.approx(3 * sum(rule(other).values()))
    free = a_plan(backend="llmcompressor", layers=0, tokens=0, layer_bytes=0, batches=0).work
    assert known.seconds(free) < first, "data-free jobs import nothing, whatever calibrated ones took"
    assert known.seconds(replace(work, done=0.5)) < 3 * first
    assert known.errors() is None
    known.judge(110, 100)
    known.judge(80, 100)
    assert known.errors() == {"jobs": 2, "median_error": pytest.approx(0.15), "worst_error": pytest.approx(0.2)}


def test_plans(tmp_path: Path, captions: Path, small_model: Callable[[str], Path]) -> None:
    """Plans and refusals, each for its job; paths are absolute, and two jobs never share an output."""
    plain = make_plain_checkpoint(tmp_path / "plain")
    texts = {
        "good": RECIPE.format(source=plain, output=tmp_path / "o1"),
        "calibrated": CALIBRATED.format(source=small_model("qwen3_vl"), output=tmp_path / "o2", backend="modelopt",
                                        scheme="fp8", captions=captions, samples=9),
        "same": RECIPE.format(source=plain, output=tmp_path / "o1"),
        "within": RECIPE.format(source=plain, output=tmp_path / "o2" / "deeper"),
        "nothing": RECIPE.format(source=tmp_path / "nothing", output=tmp_path / "o3"),
        "wrong": "model: 3\n",
    }  # fmt: skip
    jobs = []
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        jobs.append(Job(name, tmp_path / f"{name}.yaml", ()))
    jobs.append(Job("absent", tmp_path / "absent.yaml", ()))
    found = plan_all(jobs, tmp_path)
    kinds = {name: fact.kind for name, fact in found.items() if isinstance(fact, Refusal)}
    assert kinds == {"same": "recipe", "within": "recipe", "nothing": "source", "wrong": "recipe", "absent": "recipe"}
    same = found["same"]
    assert isinstance(same, Refusal) and "output of good in this batch" in same.reason
    good, calibrated = found["good"], found["calibrated"]
    assert isinstance(good, JobPlan) and isinstance(calibrated, JobPlan)
    assert good.work.layers == 0 and good.work.tokens == 0 and not good.gpu
    assert 0 < good.work.stream_bytes < good.work.source_bytes
    assert calibrated.work.layers == 3 and calibrated.work.tokens > 0 and calibrated.gpu
    assert 0 < calibrated.work.read_bytes < calibrated.work.source_bytes, "headers are no work"
    assert (
        good.output.is_absolute()
        and good.source == str(plain)
        and recipe.parse(recipe.recipe_yaml(good.recipe)) == good.recipe
    )
