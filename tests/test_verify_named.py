"""What a verification is asked about: names that lead nowhere, hub ids, plain checkpoints, sources of other models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import Checkpoint, open_checkpoint
from pipeline.verify.report import Finding, Report
from pipeline.verify.scale_findings import once
from pipeline.verify.structure import check_structure
from tests.conftest import CALIBRATED, SCHEMES, SENTENCES, assert_one_clear_line, damaged, make_plain_checkpoint
from tests.damage import flip_a_bit, rewrite
from tests.hub_cache import COMMIT, NAME, lay_out_cache

STRUCTURE = ("--level", "structure")
Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A source and its result, without data."""
    from pipeline.recipe import recipe
    from pipeline.report.console import Console
    from pipeline.run import runner
    from tests.conftest import RECIPE

    root = tmp_path_factory.mktemp("pair")
    source = make_plain_checkpoint(root / "source")
    runner.run(recipe.parse(RECIPE.format(source=source, output=root / "out")), Console(quiet=True))
    return source, root / "out"


# --- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", ("no such directory in", "the working directory")),
        ("/nowhere/at/all", ("no such directory",)),
        ("nowhere", ("no directory in", "no hub id (org/name)")),
        ("models/qwen", ("no such directory", "models/ is what directories are called", "models/qwen@main")),
        ("studio/absent", ("no directory in", "not in the cache")),
        ("studio/absent@v2", ("no directory in", "not in the cache")),
        ("config.json", ("it is a file", "name the directory that it is in")),
    ],
)
def test_a_name_that_leads_nowhere_is_no_failed_verification(
    name: str, words: tuple[str, ...], pair: Made, tmp_path: Path, quantize: Any
) -> None:
    (tmp_path / "config.json").write_text("{}")
    options: dict[str, Any] = {"cwd": tmp_path, "env": {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}}
    done = quantize("verify", name, *STRUCTURE, **options)
    assert_one_clear_line(done, 2, *words)
    assert "verification" not in done.stdout
    told = json.loads(quantize("verify", name, *STRUCTURE, "--json", **options).stdout)
    assert told["error"]["exit_status"] == 2 and "passed" not in told
    if name != "config.json":
        assert quantize("verify", pair[1], *STRUCTURE, "--source", name, **options).returncode == 2


def test_a_directory_without_a_checkpoint_fails(tmp_path: Path, quantize: Any) -> None:
    done = quantize("verify", tmp_path, *STRUCTURE)
    assert done.returncode == 1 and "PROBLEM" in done.stdout


def test_a_hub_id_is_verified_with_the_records_of_its_run(pair: Made, tmp_path: Path, quantize: Any) -> None:
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    lay_out_cache(tmp_path / "hf", pair[1], branch="v1")
    done = quantize("verify", f"{NAME}@v1", *STRUCTURE, "--source", pair[0], "--json", env=offline)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["passed"] and told["quantized"], done.stdout + done.stderr
    assert told["checkpoint"] == f"{NAME}@{COMMIT}"
    assert any("SHA-256 as recorded by the run" in line for line in told["checked"])
    assert_one_clear_line(quantize("verify", f"{NAME}@v9", *STRUCTURE, env=offline), 2, "not in the cache")


# --- what is not quantized ---------------------------------------------------------------------------


def test_the_verdict_says_that_nothing_is_quantized(pair: Made, quantize: Any) -> None:
    text = "(not quantized: the weights are BF16, and config.json has no quantization_config"
    last = quantize("verify", pair[0], *STRUCTURE, "--source", pair[0]).stdout.splitlines()[-1]
    assert last.startswith(f"verification: passed {text}; structure"), last
    last = quantize("verify", pair[0], *STRUCTURE).stdout.splitlines()[-1]  # which has no tokenizer, either
    assert last == f"verification: FAILED, 1 problem(s) {text})", last
    told = json.loads(quantize("verify", pair[0], *STRUCTURE, "--source", pair[0], "--json").stdout)
    assert told["passed"] and told["quantized"] is False
    assert "not-quantized" in {finding["code"] for finding in told["findings"]}
    assert "not quantized" not in quantize("verify", pair[1], *STRUCTURE).stdout


# --- a source of another model -----------------------------------------------------------------------


def check(out: Path, source: Path) -> Report:
    return check_structure(out, open_checkpoint(source), contents=True)


def test_another_model_is_one_sentence(pair: Made, tmp_path: Path, quantize: Any) -> None:
    other = make_plain_checkpoint(tmp_path / "other", layers=5, hidden=96, vocabulary=200, config={"vocab_size": 200})
    (other / "generation_config.json").write_text("{}")
    done = quantize("verify", pair[1], *STRUCTURE, "--source", other)
    problems = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM")]
    assert done.returncode == 1 and len(problems) == 1, done.stdout
    assert f"--source {other} is another model" in problems[0] and "name the checkpoint that" in problems[0]
    assert "of 5 layers, 96 wide" in problems[0] and "of 2 layers, 64 wide" in problems[0]
    assert "of its 48 tensors" in problems[0]
    assert "model.embed_tokens.weight ([200, 96] there, [128, 64] here)" in problems[0]
    assert check(pair[1], other).findings[0].code == "source-of-other-shapes"


def other_weights(name: str, part: bytearray) -> None:
    for n in range(1, len(part), 2):
        part[n] ^= 0x80  # the sign of a BF16 number


def tuned(*kinds: str) -> Callable[[str, bytearray], None]:
    """Only the weights of these kinds were trained further."""

    def change(name: str, part: bytearray) -> None:
        if any(kind in name for kind in kinds):
            other_weights(name, part)

    return change


@pytest.mark.parametrize("change", [other_weights, tuned("_proj.")], ids=["every weight", "the linear layers alone"])
def test_another_model_of_the_same_shapes_is_one_sentence(change: Any, pair: Made, tmp_path: Path) -> None:
    report = check(pair[1], damaged(pair[0], tmp_path / "tuned", change))
    (finding,) = (f for f in report.findings if report.level_of(f) == "problem")
    assert finding.code == "source-of-other-weights" and report.findings[0] is finding
    assert "14 of 14 that are quantized are not what it gives" in finding.text
    assert ("stay as they are hold other numbers" in finding.text) == (change is other_weights)


def test_another_model_with_more_layers_of_the_same_width(pair: Made, tmp_path: Path) -> None:
    """Most of its tensors have their place here; none has the same contents, and the last layer is not listed."""
    longer = damaged(make_plain_checkpoint(tmp_path / "a", layers=3), tmp_path / "longer", other_weights)
    report = check(pair[1], longer)
    assert [finding.code for finding in report.findings if report.level_of(finding) == "problem"] == [
        "source-of-other-weights"
    ]


def test_a_source_of_which_few_tensors_differ_is_listed(pair: Made, tmp_path: Path) -> None:
    report = check(pair[1], damaged(pair[0], tmp_path / "few", tuned("layers.1.mlp", "model.norm")))
    codes = sorted(finding.code for finding in report.findings if report.level_of(finding) == "problem")
    assert codes == ["bytes-differ"] + 3 * ["requantized-differs"]


def test_vllm_is_not_asked_to_compare_with_another_model(
    pair: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.verify import verify

    asked: list[Checkpoint | None] = []

    def record(directory: Path, source: Checkpoint | None, *rest: Any, **more: Any) -> Report:
        asked.append(source)
        return Report(str(directory), None)

    monkeypatch.setattr(verify, "check_in_vllm", record)
    other = make_plain_checkpoint(tmp_path / "other", hidden=96)
    for source in (other, pair[0]):
        verify.verify(pair[1], open_checkpoint(source), contents=True)
    assert [source and source.root for source in asked] == [None, pair[0]]


# --- scales ------------------------------------------------------------------------------------------


def exchange(one: str, other: str) -> Callable[[Path], None]:
    def change(tensors: Any) -> None:
        (entry, raw), (second, data) = tensors[one], tensors[other]
        tensors[one], tensors[other] = (entry, data), (second, raw)

    return lambda out: rewrite(out, change)


@pytest.fixture(scope="module", params=list(SCHEMES))
def calibrated(request: Any, small_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A source and its result with KV scales, of either backend."""
    from pipeline.recipe import recipe
    from pipeline.report.console import Console
    from pipeline.run import runner

    root, source = tmp_path_factory.mktemp(request.param), small_model("qwen2_5_vl")
    (root / "c.txt").write_text("\n".join(SENTENCES[:20]))
    text = CALIBRATED.format(source=source, output=root / "out", backend=request.param, scheme=SCHEMES[request.param],
                             captions=root / "c.txt", samples=20)  # fmt: skip
    runner.run(recipe.parse(text), Console(quiet=True))
    return source, root / "out"


A0, A1 = "model.layers.0.self_attn", "model.layers.1.self_attn"
SWAPPED = [
    ((f"{A0}.k_scale", f"{A0}.v_scale"), ["kv-scales-swapped"]),
    ((f"{A0}.k_scale", f"{A1}.k_scale"), 2 * ["kv-scale-not-measured"]),
    ((f"{A0}.q_proj.weight_scale", f"{A0}.o_proj.weight_scale"), 2 * ["requantized-differs"]),
    (("model.layers.0.mlp.gate_proj.weight_scale", "model.layers.1.mlp.gate_proj.weight_scale"),
     2 * ["requantized-differs"]),
]  # fmt: skip


@pytest.mark.parametrize(("names", "codes"), SWAPPED, ids=["k and v", "layers", "q and o", "gates"])
def test_a_swapped_scale_is_said_once(
    names: tuple[str, str], codes: list[str], calibrated: Made, tmp_path: Path
) -> None:
    source, out = calibrated
    target = Path(shutil.copytree(out, tmp_path / "swapped"))
    exchange(*names)(target)
    report = check(target, source)
    problems = [finding for finding in report.findings if report.level_of(finding) == "problem"]
    assert [finding.code for finding in problems] == codes, report.problems
    assert all("not those that the run wrote" in finding.text for finding in problems)
    alone = check_structure(target, contents=True)
    assert len(alone.problems) == len(codes)


def test_other_findings_stay_beside_a_swapped_scale(calibrated: Made, tmp_path: Path) -> None:
    source, out = calibrated
    target = Path(shutil.copytree(out, tmp_path / "swapped"))
    exchange(f"{A0}.k_scale", f"{A0}.v_scale")(target)
    flip_a_bit(f"{A1}.k_proj.weight")(target)
    flip_a_bit("lm_head.weight")(target)
    subjects = {finding.subject for finding in check(target, source).findings}
    assert {A0, f"{A1}.k_proj.weight", "lm_head.weight"} <= subjects


def test_what_disputes_a_scale_is_kept_where_it_disputes_more() -> None:
    swapped = Finding("kv-scales-swapped", "a", "a: swapped", covers=("a.k_scale", "a.v_scale"))
    hashes = [Finding("hash-differs", name, f"{name}: other bytes") for name in ("a.k_scale", "a.v_scale", "b.weight")]
    weight = Finding("requantized-differs", "b.weight", "b.weight: not what")
    coarse = Finding("weight-scale-coarse", "b.weight_scale", "b.weight_scale: holds more")
    kept = once([swapped, *hashes, weight, coarse])
    assert [finding.code for finding in kept] == ["kv-scales-swapped", "hash-differs", "requantized-differs"]
    assert kept[0].text == "a: swapped; a.k_scale: other bytes, nor are those of 1 more of them"
    assert once([coarse, *hashes]) == [coarse, *hashes]
