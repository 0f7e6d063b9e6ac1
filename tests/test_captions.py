"""Captions: every kind of source, the same choice whatever its order, every mistake one clear line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_data.__main__ import main as builder
from pipeline.calibration import captions as module
from pipeline.calibration.captions import Caption, CaptionSet, choose, load_captions, normalize
from pipeline.errors import UsageError
from pipeline.recipe import recipe
from pipeline.recipe.recipe import Calibration
from tests.conftest import ROOT, SHARED
from tests.test_recipe import GOOD

KEYS = ("samples", "per_image")
ROWS = [{"image_id": image, "id": 5 * image + n, "caption": f"Caption {n} of image {image}."}
        for image in range(20) for n in range(5)]  # fmt: skip
COCO_INFO = {"description": "COCO 2017 Dataset", "contributor": "COCO Consortium"}


def coco(path: Path, rows: list[dict[str, Any]] = ROWS, info: dict[str, str] = COCO_INFO) -> Path:
    path.write_text(json.dumps({"info": info, "licenses": [], "images": [], "annotations": rows}))
    return path


def load(captions: Path | str, samples: int = 10, **more: Any) -> CaptionSet:
    return load_captions(Calibration(captions=str(captions), samples=samples, **more))


def error(captions: Path | str, samples: int = 1, **more: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load(captions, samples, **more)
    assert caught.value.exit_status == 2
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    return text


def build(*arguments: object) -> Result:
    return CliRunner().invoke(builder, [str(argument) for argument in arguments])


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `datasets` caches within the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- choosing ---------------------------------------------------------------------------------------


def test_the_choice_is_the_lowest_ranks_of_seed_and_text(tmp_path: Path) -> None:
    chosen = load(coco(tmp_path / "c.json"), 12, per_image=None, seed=5)
    ranked = sorted((row["caption"] for row in ROWS), key=lambda text: sha256(f"5\0{text}".encode()).digest())
    assert chosen.texts == tuple(ranked[:12])
    assert (chosen.read, chosen.empty, chosen.duplicates, chosen.over_per_image) == (100, 0, 0, 0)
    assert chosen.files == (("c.json", sha256((tmp_path / "c.json").read_bytes()).hexdigest()),)
    assert chosen.origin == str(tmp_path / "c.json")


@pytest.mark.parametrize("per_image", [1, 2, None])
def test_a_shuffled_source_gives_the_same_texts(tmp_path: Path, per_image: int | None) -> None:
    rows = [*ROWS, *({**row, "image_id": row["image_id"] + 7} for row in ROWS[::3])]  # texts of two images
    first = load(coco(tmp_path / "a.json", rows), 15, per_image=per_image)
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        again = load(coco(tmp_path / f"{seed}.json", rows), 15, per_image=per_image)
        assert (again.texts, again.duplicates, again.over_per_image) == (
            first.texts, first.duplicates, first.over_per_image)  # fmt: skip


def test_at_most_so_many_captions_of_an_image(tmp_path: Path) -> None:
    path = coco(tmp_path / "c.json")
    for per_image in (1, 2, 5):
        chosen = load(path, 20 * per_image, per_image=per_image)
        assert set(Counter(text.split()[-1] for text in chosen.texts).values()) == {per_image}
        assert chosen.over_per_image == 100 - 20 * per_image
    alone = [sha256(f"0\0{row['caption']}".encode()).digest() for row in ROWS if row["image_id"] == 3]
    kept = next(text for text in load(path, 20).texts if text.endswith("image 3."))
    assert sha256(f"0\0{kept}".encode()).digest() == min(alone)


def test_fewer_samples_are_the_first_of_more(tmp_path: Path) -> None:
    path = coco(tmp_path / "c.json")
    assert load(path, 20).texts[:7] == load(path, 7).texts


def test_the_seed_changes_the_choice(tmp_path: Path) -> None:
    path = coco(tmp_path / "c.json")
    assert len({frozenset(load(path, 5, seed=seed).texts) for seed in range(6)}) == 6


def test_a_text_of_two_images_counts_once_for_the_smallest_id() -> None:
    rows = [Caption("b", "x"), Caption(9, "x"), Caption(None, "x"), Caption(10, "x"), Caption("a", "x")]
    for seed in range(8):
        random.Random(seed).shuffle(rows)
        chosen = choose(rows, 0, None, 1, "here", KEYS)
        assert (chosen.captions, chosen.duplicates) == ((Caption(9, "x"),), 4)
    assert choose([Caption("b", "x"), Caption(None, "x")], 0, None, 1, "", KEYS).captions == (Caption("b", "x"),)


def test_captions_without_an_image_have_no_limit(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("one\ntwo\nthree\n")
    assert sorted(load(path, 3, per_image=1).texts) == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("  a \t b\r\n\u00a0c\u3000d ", "a b c d"),
        ("cafe\u0301", "caf\u00e9"),
        ("a\x00b\x07 \x1b c", "ab c"),
        ("a\ud800b", "ab"),
        ("e\x00\u0301", "\u00e9"),
        ("\x00 \u2003", ""),
        ("क्\u200dष", "क्\u200dष"),
    ],
)
def test_normalization(raw: str, wanted: str) -> None:
    assert normalize(raw) == wanted


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
def test_normalization_is_final(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode()
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in once)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 3), st.sampled_from("ab")), st.text("ab ", max_size=4))),
    st.one_of(st.none(), st.integers(1, 3)),
    st.randoms(use_true_random=False),
)
def test_every_caption_is_accounted_for_in_any_order(
    pairs: list[tuple[Any, str]], per_image: int | None, generator: random.Random
) -> None:
    rows = [Caption("?", "never empty"), *(Caption(*pair) for pair in pairs)]
    first = choose(rows, 1, None, per_image, "here", KEYS)
    assert len(first.captions) + first.empty + first.duplicates + first.over_per_image == first.read == len(rows)
    generator.shuffle(rows)
    assert choose(rows, 1, None, per_image, "here", KEYS) == first


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    rows = [*ROWS[:10], {"image_id": 1, "caption": " \n\x00"}, {"image_id": 8, "caption": " Caption 0  of image 0.\n"}]
    chosen = load(coco(tmp_path / "c.json", rows), 2)
    assert (chosen.read, chosen.empty, chosen.duplicates, chosen.over_per_image) == (12, 1, 1, 8)


# --- files --------------------------------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    lines = ['{"caption": "one", "image_id": 1}', '{"text": "two", "file_name": "a.jpg"}', '{"sentence": "three"}',
             '"four"', "", '{"captions": ["five", "six"], "cocoid": 2}', '{"caption": null}',
             '{"sentences": [{"raw": "seven", "tokens": []}], "imgid": 3.0}']  # fmt: skip
    path.write_text("\n".join(lines))
    chosen = load(path, 7, per_image=None)
    assert sorted(chosen.texts) == sorted(["one", "two", "three", "four", "five", "six", "seven"])
    assert (chosen.read, chosen.empty) == (8, 1)
    assert load(path, 6).over_per_image == 1  # five or six


def test_the_captions_of_a_row_without_an_id_are_one_image(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"captions": ["a", "b", "c"]}\n{"captions": ["d", "e"], "image_id": null}\n{"captions": ["f"]}\n')
    chosen = load(path, 3)
    assert chosen.over_per_image == 3
    path.write_text('{"captions": ["f"]}\n{"captions": ["e", "d"], "image_id": ""}\n{"captions": ["b", "c", "a"]}\n')
    assert load(path, 3).texts == chosen.texts


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_with_any_line_end_and_a_byte_order_mark(tmp_path: Path, end: str) -> None:
    path = tmp_path / "c.TXT"
    path.write_bytes(("\ufeff" + end.join(["one\u2028still one", "", "two", "three"]) + end).encode())
    chosen = load(path, 3)
    assert sorted(chosen.texts) == ["one still one", "three", "two"]
    assert (chosen.read, chosen.empty) == (4, 1)


def test_a_long_line_is_a_caption(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("word " * 200_000)
    assert len(load(path, 1).texts[0]) == 999_999


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.json", b"", ["c.json: the file is empty"]),
        ("c.txt", b" \n\t\n", ["c.txt: the file is empty"]),
        ("c.txt", b"\x00\n\x01\n", ["no captions in it", "2 read", "2 empty"]),
        ("c.json", b'{"annotations": []}', ["no captions in it"]),
        ("c.json", b'{"annotations": [{"image_id": 1, "caption": " "}]}', ["no captions in it", "1 empty"]),
        ("c.json", b'{"annotations": ', ["this is not JSON", "line 1 column"]),
        ("c.json", b"[" * 100_000, ["this is not JSON"]),
        ("c.json", b'{"annotations": ' + b"9" * 5000 + b"}", ["this is not JSON"]),
        ("c.json", b'[{"caption": "x"}]', ["found a list of 1", "annotations: [{image_id, caption}", ".jsonl"]),
        ("c.json", b'{"images": [], "splits": 3}', ["an object with images, splits", "annotations: ["]),
        ("c.json", b"{}", ["an empty object"]),
        ("c.json", b'{"annotations": {"caption": "x"}}', ["an object with annotations", "COCO"]),
        ("c.json", b'{"annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 1, "bbox": []}]}',
         ["annotations[1] is an object with image_id, bbox", "captions_*.json"]),
        ("c.json", b'{"annotations": [{"image_id": 1, "caption": 7}]}', ["annotations[0]"]),
        ("c.json", b'{"annotations": [{"image_id": true, "caption": "x"}]}', ["annotations[0]"]),
        ("c.json", b'{"annotations": [{"caption": "x"}]}', ["annotations[0] is an object with caption;"]),
        ("c.json", b'{"annotations": ["x"]}', ['annotations[0] is "x"']),
        ("c.json", b'"text"', ['found "text"']),
        ("c.jsonl", b'{"caption": "x"}\n\n{"caption": \n', ["c.jsonl:3: this is not JSON"]),
        ("c.jsonl", b'"x"\n{"title": "x"}\n', ["c.jsonl:2: found an object with title", "caption, captions, text"]),
        ("c.jsonl", b'"x"\n[1, 2]\n', ["c.jsonl:2: found a list of 2"]),
        ("c.jsonl", b'{"caption": 3}\n', ["c.jsonl:1: caption is 3", "expected is text"]),
        ("c.jsonl", b'{"caption": "x", "image_id": [1]}\n', ["c.jsonl:1: image_id is a list of 1"]),
        ("c.jsonl", b'{"caption": "x", "image_id": 1.5}\n', ["c.jsonl:1: image_id is 1.5"]),
        ("c.txt", b"one\ntwo\ncaf\xe9\n", ["c.txt:3: byte 11", "not UTF-8"]),
        ("c.json", "{}".encode("utf-16"), ["c.json:1: byte 0", "not UTF-8"]),
        ("c.csv", b"caption\nx\n", ["c.csv", ".json (COCO annotations), .jsonl, .txt"]),
        ("annotations.zip", b"PK", ["annotations.zip", "unpack it"]),
    ],
)  # fmt: skip
def test_files_that_hold_no_captions(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    found = error(tmp_path / name)
    for word in words:
        assert word in found, found
    assert str(tmp_path / name) in found


def test_names_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "absent.json", "absent.jsonl", "data/absent.txt", "./absent", "~/absent"):
        assert "no such file" in error(name)
    assert "allowed: coco2017, embedded" in error("coco")
    (tmp_path / "empty").mkdir()
    assert "the directory is empty" in error("empty")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "captions come as" in error(tmp_path / "pipe.txt")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert error(coco(tmp_path / "c.json")) == f"{tmp_path / 'c.json'}: cannot be read: Permission denied"


def test_fewer_captions_than_asked_for(tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[0], {"image_id": 3, "caption": ""}]
    found = error(coco(tmp_path / "c.json", rows), 21)
    for word in ("20 captions to choose from", "calibration.samples asks for 21", "102 read", "1 empty", "1 repeats",
                 "80 beyond calibration.per_image", "lower calibration.samples to 20",
                 "or raise calibration.per_image"):  # fmt: skip
        assert word in found, found
    found = error(tmp_path / "c.json", 4096, per_image=None)
    assert "lower calibration.samples to 100" in found and "raise" not in found


# --- directories and data sets ------------------------------------------------------------------------


@pytest.mark.usefixtures("hub_cache")
def test_directories_of_the_datasets_library(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    wanted = load(coco(tmp_path / "c.json"), 20)
    rows = random.Random(4).sample(ROWS, len(ROWS))
    whole = Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "saved")
    DatasetDict(validation=Dataset.from_list(rows[:3]), train=whole).save_to_disk(tmp_path / "splits")
    DatasetDict(test=whole, validation=Dataset.from_list(rows[:3])).save_to_disk(tmp_path / "others")
    (tmp_path / "parquet").mkdir()
    whole.to_parquet(tmp_path / "parquet" / "part.parquet")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.json").write_text(json.dumps(rows))
    prints = set()
    names = {"saved": "saved", "splits": "splits:train", "others": "others:test", "parquet": "parquet:train",
             "json": "json:train"}  # fmt: skip
    for directory, name in names.items():
        chosen = load(tmp_path / directory, 20)
        assert chosen.texts == wanted.texts, directory
        assert (chosen.read, chosen.over_per_image) == (100, 80)
        ((found, fingerprint),) = chosen.files
        assert found == name
        prints.add(fingerprint)
    assert len(prints) == 1 and len(prints.pop()) == 64  # of the content, not of the files


@pytest.mark.usefixtures("hub_cache")
def test_columns_as_data_sets_have_them(tmp_path: Path) -> None:
    from datasets import Dataset

    lists = [{"cocoid": n, "captions": [f"a {n}", f"b {n}"], "other": 1} for n in range(3)]
    sentences = [{"filename": f"{n}.jpg", "sentences": [{"raw": f"a {n}", "sentid": 1}]} for n in range(3)]
    nested = [{"imgid": n, "sentences": {"raw": f"a {n}", "tokens": ["a"]}} for n in range(3)]
    for number, rows in enumerate((lists, sentences, nested)):
        Dataset.from_list(rows).save_to_disk(tmp_path / str(number))
        chosen = load(tmp_path / str(number), 3)
        assert {text.split()[1] for text in chosen.texts} == {"0", "1", "2"}
        assert chosen.over_per_image == (3 if number == 0 else 0)


@pytest.mark.usefixtures("hub_cache")
def test_data_sets_that_do_not_fit(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"title": "x", "label": 1}]).save_to_disk(tmp_path / "columns")
    found = error(tmp_path / "columns")
    assert "found the columns title, label" in found and "caption, captions, text" in found
    Dataset.from_list([{"caption": "x"}, {"caption": "y"}]).map(lambda row: {"text": 3}).remove_columns(
        "caption").save_to_disk(tmp_path / "numbers")  # fmt: skip
    assert "row 0: text is 3" in error(tmp_path / "numbers")
    (tmp_path / "none").mkdir()
    Dataset.from_list([{"caption": "x"}]).select([]).to_parquet(tmp_path / "none" / "part.parquet")
    assert "no data" in error(tmp_path / "none")
    Dataset.from_list([{"captions": []}, {"captions": ["x"]}]).select([0]).save_to_disk(tmp_path / "lists")
    assert "no captions in it" in error(tmp_path / "lists")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.xyz").write_bytes(b"")
    found = error(tmp_path / "pictures")
    assert "datasets cannot load it" in found and "name a .json" in found
    coco(tmp_path / "pictures" / "captions_train2017.json")
    assert "for COCO annotations name the .json file itself" in error(tmp_path / "pictures")
    for shard in (tmp_path / "columns").glob("*.arrow"):
        shard.write_bytes(b"damaged")
    assert "datasets cannot load it" in error(tmp_path / "columns")


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    code = (
        "from pipeline.calibration.captions import load_captions; from pipeline.recipe import Calibration\n"
        "from pipeline.errors import UsageError\n"
        "try: load_captions(Calibration(captions='org/name'))\n"
        "except UsageError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    (line,) = done.stdout.splitlines()
    assert line.startswith("org/name: datasets cannot load it (") and "HF_HUB_OFFLINE" in line


def test_files_are_read_without_heavy_imports() -> None:
    code = (
        "import sys; from pipeline.calibration.captions import load_captions; from pipeline.recipe import Calibration\n"
        "assert len(load_captions(Calibration(captions='embedded', samples=7)).texts) == 7\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


# --- the two names ------------------------------------------------------------------------------------


def test_embedded_captions() -> None:
    lines = module.EMBEDDED.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 320
    assert all(normalize(line) == line for line in lines)
    assert len({line.casefold() for line in lines}) == 320
    lengths = [len(line.split()) for line in lines]
    assert min(lengths) >= 6 and max(lengths) <= 45 and sum(length > 30 for length in lengths) < 10
    chosen = load("embedded", 320)
    assert sorted(chosen.texts) == sorted(lines)
    assert chosen.files[0][0] == "embedded.txt"
    found = error("embedded", 4096)
    assert "320 captions to choose from" in found and "lower calibration.samples to 320" in found


def test_coco2017_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = coco(tmp_path / "one.json", ROWS[:50]), coco(tmp_path / "two.json", ROWS[50:])
    wanted = load(coco(tmp_path / "all.json"), 20)
    texts = set()
    for files in ((one, two), (two, one)):
        monkeypatch.setenv("COCO_CAPTIONS", os.pathsep.join(map(str, files)))
        chosen = load("coco2017", 20)
        assert chosen.texts == wanted.texts
        assert chosen.origin == "coco2017"
        texts.add(chosen.files)
    assert [name for name, _ in texts.pop()] == ["one.json", "two.json"] and not texts
    monkeypatch.setenv("COCO_CAPTIONS", str(tmp_path / "absent.json"))
    assert error("coco2017").startswith("COCO_CAPTIONS: ")
    monkeypatch.setenv("COCO_CAPTIONS", "coco2017")
    assert "unset it" in error("coco2017")


def test_coco2017_as_built_or_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COCO_CAPTIONS", raising=False)
    monkeypatch.setattr(module, "COCO2017", tmp_path / "coco2017")
    found = error("coco2017")
    for word in ("python -m calib_data annotations/captions_train2017.json", module.COCO_ARCHIVE, "COCO_CAPTIONS"):
        assert word in found
    source = coco(tmp_path / "c.json")
    assert build(source).exit_code == 0  # the builder's default is that directory
    assert load("coco2017", 20).texts == load(source, 20).texts


# --- the builder --------------------------------------------------------------------------------------


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


# --- the recipe ---------------------------------------------------------------------------------------


def test_the_limit_of_an_image_in_a_recipe() -> None:
    def parsed(text: str) -> Calibration:
        made = recipe.parse(GOOD + f"calibration: {text}\n")
        assert recipe.parse(recipe.recipe_yaml(made)) == made  # also where the limit is null
        assert made.calibration is not None
        return made.calibration

    assert parsed("{}").per_image == 1
    assert parsed("{per_image: 5}").per_image == 5
    assert parsed("{per_image: null}").per_image is None
    with pytest.raises(UsageError, match="per_image"):
        parsed("{per_image: 0}")


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
