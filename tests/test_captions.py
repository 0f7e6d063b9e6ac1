"""Captions: every kind of source, the same choice whatever its order, every mistake one clear line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.calibration import captions as module
from pipeline.calibration.captions import Caption, choose, normalize
from pipeline.errors import UsageError
from pipeline.recipe import recipe
from pipeline.recipe.sections import Calibration
from tests.coco import ROWS, build, coco, error, load
from tests.conftest import ROOT

KEYS = ("samples", "per_image")


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
        "from pipeline.calibration.captions import load_captions; from pipeline.recipe.sections import Calibration\n"
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
        "import sys; from pipeline.calibration.captions import load_captions\n"
        "from pipeline.recipe.sections import Calibration\n"
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


# --- the recipe ---------------------------------------------------------------------------------------


def test_the_limit_of_an_image_in_a_recipe() -> None:
    def parsed(text: str) -> Calibration:
        made = recipe.parse(
            "model: {source: Qwen/Qwen3-8B}\noutput: out/x\nbackend: llmcompressor\nscheme: fp8_dynamic\n"
            f"kv_cache: none\ncalibration: {text}\n"
        )
        assert recipe.parse(recipe.recipe_yaml(made)) == made  # also where the limit is null
        assert made.calibration is not None
        return made.calibration

    assert parsed("{}").per_image == 1
    assert parsed("{per_image: 5}").per_image == 5
    assert parsed("{per_image: null}").per_image is None
    with pytest.raises(UsageError, match="per_image"):
        parsed("{per_image: 0}")
