"""What a batch converts, and until when: recipes, directories, manifests and the window."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from pipeline.batch import command, manifest
from pipeline.errors import UsageError
from tests.conftest import RECIPE


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """Two recipes and a manifest beside them."""
    place = tmp_path / "several"
    place.mkdir()
    for name in ("a", "b"):
        (place / f"{name}.yaml").write_text(RECIPE.format(source="s", output=f"out/{name}"))
    return place


def test_recipes_and_directories(recipes: Path) -> None:
    name, jobs = manifest.collect([str(recipes), "verify=structure"])
    assert name == "several" and [job.name for job in jobs] == ["a", "b"]
    assert all(job.overrides == ("verify=structure",) for job in jobs)
    name, jobs = manifest.collect([str(recipes / "a.yaml"), str(recipes / "b.yaml"), str(recipes / "a.yaml")])
    assert name == "a-and-2-more" and [job.name for job in jobs] == ["a", "b", "a~2"]
    assert jobs[0].command == ["quantize", str(recipes / "a.yaml")]


def test_jobs_of_one_recipe_are_named_after_their_outputs(recipes: Path) -> None:
    path = recipes / "three.yaml"
    path.write_text(
        "jobs:\n"
        "  - {recipe: a.yaml, set: {output: /nvme/out/small}}\n"
        "  - {recipe: a.yaml, set: {output: /nvme/out/large/, calibration.samples: 64}}\n"
        "  - {recipe: a.yaml, set: {output: /other/small}}\n"
        "  - recipe: b.yaml\n"
    )
    assert [job.name for job in manifest.collect([str(path)])[1]] == ["small", "large", "small~2", "b"]


def test_a_manifest(recipes: Path) -> None:
    path = recipes / "fifty.yaml"
    path.write_text(
        "jobs:\n"
        "  - recipe: a.yaml\n"
        "    set: {calibration.samples: 64, ignore: [x, 're:y$'], kv_cache: none, model: {revision: '1.0'}}\n"
        "  - {recipe: a.yaml, name: other, set: {output: out/other}}\n"
        "matrix:\n"
        "  sources: [Qwen/Qwen3-VL-4B-Instruct, /models/mine/]\n"
        "  recipes: [a.yaml, b.yaml]\n"
        "  output: /nvme/{source}-{recipe}\n"
        "  set: {shard_size: 1GB}\n"
        "set: {verify: load}\n"
    )
    name, jobs = manifest.collect([str(path), "verify=generate"])
    assert name == "fifty" and [job.name for job in jobs] == [
        "a", "other", "Qwen3-VL-4B-Instruct-a", "Qwen3-VL-4B-Instruct-b", "mine-a", "mine-b",
    ]  # fmt: skip
    assert jobs[0].overrides == (
        "verify=load", "calibration.samples=64", 'ignore=["x", "re:y$"]', "kv_cache=none", 'model.revision="1.0"',
        "verify=generate",
    )  # fmt: skip
    assert jobs[5].overrides == (
        "verify=load", "shard_size=1GB", "model.source=/models/mine/", "output=/nvme/mine-b", "verify=generate",
    )  # fmt: skip
    _, beside = manifest.collect([str(recipes)])
    assert [job.name for job in beside] == ["a", "b"], "a manifest in a directory is no recipe"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("jobs:\n  - {recipe: a.yaml, outputs: x}\n", ["m.yaml:2:", "jobs[0].outputs"]),
        ("jobs: []\nmatrix: {sources: [x], recipes: []}\n", ["m.yaml:2:", "matrix.recipes", "matrix.output"]),
        ("matrix: {sources: [x, y], recipes: [a.yaml], output: /o}\n", ["must hold {source}"]),
        ("matrix: {sources: [x], recipes: [a.yaml, b.yaml], output: '/o/{source}'}\n", ["must hold {recipe}"]),
        ("jobs: 3\n", ["m.yaml:1:", "jobs"]),
        ("jobs: []\n", ["no recipe here"]),
    ],
)
def test_wrong_manifests(text: str, words: list[str], recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipes)
    Path("m.yaml").write_text(text)
    with pytest.raises(UsageError) as raised:
        manifest.collect(["m.yaml"])
    for word in words:
        assert word in str(raised.value)


def test_what_is_not_there(recipes: Path) -> None:
    for words, said in ((["nowhere.yaml"], "no such recipe"), (["verify=load"], "name recipes"), ([], "name recipes")):
        with pytest.raises(UsageError, match=said):
            manifest.collect(words)


def test_windows() -> None:
    now = datetime(2026, 11, 21, 22, 0).timestamp()

    def end(**options: str) -> float | None:
        return command.end_of_window(command.Options(**options), now)  # type: ignore[arg-type]

    assert end() is None
    assert end(until="07:00") == datetime(2026, 11, 22, 7, 0).timestamp()
    assert end(until="22:01") == now + 60 and end(until="22:00") == now + 24 * 3600
    assert end(until="2026-11-23T07:30") == datetime(2026, 11, 23, 7, 30).timestamp()
    assert end(budget="9h") == now + 9 * 3600 and end(budget="1h30m") == now + 5400 and end(budget="45s") == now + 45
    for wrong in (
        {"until": "25:00"}, {"until": "soon"}, {"until": "2020-01-01T00:00"}, {"budget": "9"}, {"budget": "h"},
        {"budget": "9h", "until": "07:00"},
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"--until|--budget"):
            end(**wrong)
