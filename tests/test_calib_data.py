"""`python -m calib_data`: a set of captions, built from COCO's own files or others; and of COCO itself."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from pipeline.calibration.captions import normalize
from tests.coco import ROWS, build, coco, error, load
from tests.conftest import ROOT, SHARED


def built_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_built_set(tmp_path: Path) -> None:
    source = coco(tmp_path / "c.json", [*ROWS, ROWS[3], {"image_id": 2, "caption": "caf\u0065\u0301 \ud83d\ude00"}])
    done = build(source, "-o", tmp_path / "set", "--seed", 3)
    assert done.exit_code == 0, done.output
    assert set(built_files(tmp_path / "set")) == {"captions.jsonl", "manifest.json"}
    lines = (tmp_path / "set" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    ranks = [sha256(f"3\0{row['caption']}".encode()).digest() for row in rows]
    assert ranks == sorted(ranks) and len(rows) == 101
    assert any(line == '{"image_id": 2, "caption": "café 😀"}' for line in lines)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["sources"] == [{"name": "c.json", "sha256": sha256(source.read_bytes()).hexdigest()}]
    written = (tmp_path / "set" / "captions.jsonl").read_bytes()
    assert manifest["captions"] == {"name": "captions.jsonl", "sha256": sha256(written).hexdigest(), "count": 101}
    assert (manifest["seed"], manifest["samples"], manifest["per_image"], manifest["read"]) == (3, None, None, 102)
    assert manifest["dropped"] == {"empty": 0, "duplicates": 1, "over_per_image": 0, "not_sampled": 0}
    assert manifest["licence"] == "CC BY 4.0"
    assert "COCO Consortium" in manifest["attribution"] and "https://cocodataset.org" in manifest["attribution"]
    assert "SHA-256" in manifest["sampling"] and "NFC" in manifest["normalization"]
    assert str(tmp_path) not in json.dumps(manifest)
    for seed in (0, 3):
        assert load(tmp_path / "set", 20, seed=seed).texts == load(source, 20, seed=seed).texts


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = coco(tmp_path / "one.json", ROWS[:50]), coco(tmp_path / "two.json", ROWS[50:])
    for number, files in enumerate(((one, two), (two, one))):
        assert build(*files, "-o", tmp_path / str(number), "--samples", 30, "--per-image", 2).exit_code == 0
    assert built_files(tmp_path / "0") == built_files(tmp_path / "1")
    assert build(one, two, "-o", tmp_path / "2", "--samples", 30, "--per-image", 2, "--seed", 1).exit_code == 0
    first, other = built_files(tmp_path / "0"), built_files(tmp_path / "2")
    assert first["captions.jsonl"] != other["captions.jsonl"]


def test_a_small_set_is_what_a_recipe_would_choose(tmp_path: Path) -> None:
    source = coco(tmp_path / "c.json")
    assert build(source, "-o", tmp_path / "small", "--samples", 9).exit_code == 0
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert (manifest["captions"]["count"], manifest["per_image"]) == (9, 1)
    assert manifest["dropped"] == {"empty": 0, "duplicates": 0, "over_per_image": 80, "not_sampled": 11}
    assert load(tmp_path / "small", 9).texts == load(source, 9).texts
    assert build(source, "-o", tmp_path / "more", "--per-image", "all", "--samples", 9).exit_code == 0
    assert load(tmp_path / "more", 9, per_image=None).texts == load(source, 9, per_image=None).texts


def test_a_set_is_only_replaced_by_force(tmp_path: Path) -> None:
    source, target = coco(tmp_path / "c.json"), tmp_path / "set"
    assert build(source, "-o", target).exit_code == 0
    before = built_files(target)
    done = build(source, "-o", target, "--seed", 1)
    assert done.exit_code == 2 and "--force" in done.output and len(done.output.splitlines()) == 1
    assert built_files(target) == before
    (target / "note").write_text("mine")
    assert build(source, "-o", target, "--seed", 1, "--force").exit_code == 0
    after = built_files(target)
    assert after["captions.jsonl"] != before["captions.jsonl"] and after["note"] == b"mine"
    assert build(target, "-o", target, "--samples", 3, "--force").exit_code == 0  # from itself
    assert load(target, 3).texts == load(source, 3).texts
    assert build(source, "-o", source).exit_code == 2


def test_licences(tmp_path: Path) -> None:
    plain = tmp_path / "c.jsonl"
    plain.write_text('"one"\n"two"\n')
    annotations = coco(tmp_path / "c.json")
    similar = coco(tmp_path / "similar.json", info={"description": "Captions of our own in COCO's format"})

    def terms(*arguments: object) -> tuple[str | None, str | None, str]:
        done = build(*arguments, "-o", tmp_path / "set", "--force")
        assert done.exit_code == 0, done.output
        manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
        return manifest["licence"], manifest["attribution"], done.output

    for files in ([plain], [plain, annotations], [similar]):
        licence, attribution, output = terms(*files)
        assert licence is None and attribution is None and "note: " in output
    licence, attribution, output = terms(plain, "--licence", "CC0-1.0", "--attribution", "Us")
    assert (licence, attribution) == ("CC0-1.0", "Us") and "note: " not in output
    assert terms(tmp_path / "set")[:2] == ("CC0-1.0", "Us")  # a set hands on what it knows
    assert terms("embedded")[0] == "Apache-2.0"
    assert terms("embedded", annotations)[0] == "CC BY 4.0; Apache-2.0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument"),
        (["absent.json"], "error: absent.json: no such file"),
        (["{source}", "--samples", "21", "--per-image", "1"], "lower --samples to 20, or raise --per-image"),
        (["{source}", "--per-image", "0"], "neither a number"),
        (["{source}", "--per-image", "many"], "neither a number"),
        (["{source}", "--samples", "0"], "range"),
        (["{source}", "--seed", "-1"], "range"),
    ],
)
def test_wrong_commands(tmp_path: Path, arguments: list[str], words: str) -> None:
    source = coco(tmp_path / "c.json")
    done = build(*(argument.format(source=source) for argument in arguments), "-o", tmp_path / "set")
    assert done.exit_code == 2 and words in done.output, done.output
    assert "Traceback" not in done.output and not (tmp_path / "set").exists()


def test_the_builder_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "calib_data", "embedded", "-o", str(tmp_path / "a" / "set")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "320 of 320 captions" in done.stdout, done.stderr
    command[-1] = "/dev/null/set"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: building /dev/null/set failed"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_damage_to_a_built_set(tmp_path: Path) -> None:
    target = tmp_path / "set"
    assert build(coco(tmp_path / "c.json"), "-o", target).exit_code == 0
    lines, manifest = target / "captions.jsonl", target / "manifest.json"
    whole, said = lines.read_bytes(), manifest.read_bytes()

    def damaged(path: Path, content: bytes | None) -> str:
        path.write_bytes(content) if content is not None else path.unlink()
        found = error(target)
        lines.write_bytes(whole)
        manifest.write_bytes(said)
        assert "build it again" in found, found
        return found

    for content in (whole.replace(b"Caption 0", b"Caption O", 1), whole[:-9], whole + b"\n", b""):
        assert "SHA-256 is not the one in manifest.json" in damaged(lines, content)
    assert "there is no captions.jsonl" in damaged(lines, None)
    assert "there is no manifest.json" in damaged(manifest, None)
    for content in (b"{}", b"[]", b'{"captions": 3}', b"\xff"):
        assert "not the manifest" in damaged(manifest, content)
    assert "SHA-256" in damaged(manifest, said.replace(b'"sha256": "', b'"sha256": "0'))
    manifest.write_bytes(said[:-9])
    assert "manifest.json: this is not JSON" in error(target)


# --- COCO itself --------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Callable[[], Path]:
    def find() -> Path:
        path = SHARED / "data/coco/captions_val2017.json"
        if not path.is_file():
            pytest.skip(f"{path} is not here: COCO's annotations are not part of the repository")
        return path

    return find


def test_a_set_of_coco_itself(tmp_path: Path, real: Callable[[], Path]) -> None:
    source = real()
    chosen = load(source, 4096)
    assert (chosen.read, len(set(chosen.texts))) == (25_014, 4096)
    assert load(source, 5000).texts[:4096] == chosen.texts
    annotations = json.loads(source.read_text())
    random.Random(1).shuffle(annotations["annotations"])
    shuffled = tmp_path / "captions_val2017.json"
    shuffled.write_text(json.dumps(annotations))
    assert load(shuffled, 4096).texts == chosen.texts
    for number, file in enumerate((source, shuffled)):
        assert build(file, "-o", tmp_path / str(number)).exit_code == 0
    assert (tmp_path / "0/captions.jsonl").read_bytes() == (tmp_path / "1/captions.jsonl").read_bytes()
    again = load(tmp_path / "0", 4096)
    assert again.texts == chosen.texts and again.read == 25_014 - chosen.duplicates
    assert json.loads((tmp_path / "0/manifest.json").read_text())["licence"] == "CC BY 4.0"


def test_no_embedded_caption_is_coco_s(real: Callable[[], Path]) -> None:
    def plain(text: str) -> str:
        return "".join(c for c in normalize(text).casefold() if c.isalnum() or c == " ").strip()

    theirs = {plain(row["caption"]) for row in json.loads(real().read_text())["annotations"]}
    assert not theirs & {plain(text) for text in load("embedded", 320).texts}
