"""The text that amax is collected on: captions of many kinds of source, the same choice on every machine.

A choice depends on the captions and the seed alone, never on the order in which a source holds them: each distinct
caption has a rank, a hash of seed and text, and the lowest ranks are taken. `calib_data` builds its sets with the
same functions. `datasets` is imported where a source needs it, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.checkpoint.hub import HUB_ID
from pipeline.errors import UsageError, seen_from
from pipeline.recipe.sections import Calibration

CALIB_DATA = Path(__file__).resolve().parents[2] / "calib_data"  # by place: the package need not be importable
EMBEDDED = CALIB_DATA / "embedded.txt"
COCO2017 = CALIB_DATA / "coco2017"  # what `python -m calib_data` makes
COCO_ARCHIVE = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
BUILDER = "python -m calib_data annotations/captions_train2017.json"

SET_CAPTIONS, SET_MANIFEST = "captions.jsonl", "manifest.json"  # the two files of a built set
BUILD_AGAIN = "build it again (python -m calib_data ... --force)"
FILE_SUFFIXES = (".json", ".jsonl", ".txt")
CAPTION_KEYS = ("caption", "captions", "text", "sentence", "sentences")
IMAGE_KEYS = ("image_id", "cocoid", "imgid", "file_name", "filename")

NORMALIZATION = (
    "Whitespace runs become one space, control characters and lone surrogates go, ends are stripped, Unicode NFC; "
    "empty captions and exact repeats are dropped, a repeat over several images belongs to the smallest image id."
)
SAMPLING = (
    "Captions are ranked by SHA-256 of the seed in decimal, a NUL and the caption in UTF-8, lowest first; of an image "
    "the lowest per_image ranks are kept, and of these the lowest ranks, as many as asked."
)

_NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]+")  # control characters that are no space
_COCO = re.compile(r"\bCOCO 20\d\d Dataset\b|\bMS COCO dataset\b", re.IGNORECASE)

Image = int | str | None


class Caption(NamedTuple):
    """A caption and the id of its image, if one is known."""

    image: Image
    text: str


@dataclass(frozen=True)
class Terms:
    """Under which licence a source's captions are, and whom to name."""

    licence: str
    attribution: str


COCO_TERMS = Terms("CC BY 4.0", "COCO Consortium, https://cocodataset.org; Lin et al., Microsoft COCO, 2014")
EMBEDDED_TERMS = Terms("Apache-2.0", "fp8-pipeline")


@dataclass(frozen=True)
class Source:
    """What was read of one or more sources, before any choice.

    Attributes:
        captions: as the source holds them.
        files: (file name, SHA-256 of its bytes), or (name and split of a data set, SHA-256 of the captions read).
        terms: what the sources say of themselves.
    """

    captions: list[Caption]
    files: tuple[tuple[str, str], ...]
    terms: tuple[Terms, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Chosen captions in the order of their ranks, and what became of the others; see `CaptionSet`."""

    captions: tuple[Caption, ...]
    read: int
    empty: int
    duplicates: int
    over_per_image: int
    # of each chosen caption, from 1, as the source holds them: for messages, and no part of the choice
    numbers: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class CaptionSet:
    """The captions of a run.

    Attributes:
        texts: in the order of their ranks.
        origin: as the recipe names it.
        files: (file name, SHA-256 of its bytes), or (name and split of a data set, SHA-256 of the captions read).
        read: how many captions the source has.
        empty: of these dropped, as nothing was left after normalization.
        duplicates: dropped as exact repeats.
        over_per_image: dropped because their image had enough.
        numbers: of each text, from 1, in the order in which the source holds its captions.
    """

    texts: tuple[str, ...]
    origin: str
    files: tuple[tuple[str, str], ...]
    read: int
    empty: int
    duplicates: int
    over_per_image: int
    terms: tuple[Terms, ...] = ()
    numbers: tuple[int, ...] = field(default=(), compare=False)


def load_captions(wanted: Calibration) -> CaptionSet:
    """Read a recipe's captions and choose from them.

    Raises:
        UsageError: one line, with the source, what is wrong and what to do.
    """
    source = read_source(wanted.captions)
    keys = ("calibration.samples", "calibration.per_image")
    made = choose(source.captions, wanted.seed, wanted.samples, wanted.per_image, wanted.captions, keys)
    texts = tuple(caption.text for caption in made.captions)
    return CaptionSet(
        texts, wanted.captions, source.files, made.read, made.empty, made.duplicates, made.over_per_image, source.terms,
        made.numbers,
    )  # fmt: skip


# --- choosing ---------------------------------------------------------------------------------------


def normalize(text: str) -> str:
    """The form in which captions are compared, ranked and used; see `NORMALIZATION`."""
    return unicodedata.normalize("NFC", " ".join(_NO_TEXT.sub("", text).split()))


def choose(
    captions: list[Caption],
    seed: int,
    samples: int | None,
    per_image: int | None,
    origin: str,
    keys: tuple[str, str],
) -> Choice:
    """Normalize, rank and cut; see `NORMALIZATION` and `SAMPLING`.

    Args:
        captions: in any order.
        seed: of the ranks.
        samples: how many to take; None: all.
        per_image: how many of one image at most; None: no limit. Captions without an image have none.
        origin: the source, for errors.
        keys: what the user calls `samples` and `per_image`, for errors.

    Raises:
        UsageError: there are fewer captions than asked for, or none.
    """
    owners: dict[str, Image] = {}
    first: dict[str, int] = {}
    empty = duplicates = 0
    for number, (image, raw) in enumerate(captions, 1):
        text = normalize(raw)
        if not text:
            empty += 1
        elif text not in owners:
            owners[text], first[text] = image, number
        else:
            duplicates += 1
            owners[text] = min(owners[text], image, key=_image_order)
    start = f"{seed}\0"
    ranked = sorted((hashlib.sha256((start + text).encode()).digest(), text) for text in owners)
    kept, over, taken = [], 0, Counter[Image]()
    for _, text in ranked:
        image = owners[text]
        if image is not None and per_image is not None:
            if taken[image] == per_image:
                over += 1
                continue
            taken[image] += 1
        kept.append(Caption(image, text))
    if len(kept) < (samples or 1):
        dropped = f"{empty:,} empty, {duplicates:,} repeats, {over:,} beyond {keys[1]}"
        if not kept:
            raise UsageError(f"{origin}: no captions in it ({len(captions):,} read: {dropped})")
        raise UsageError(
            f"{origin}: {len(kept):,} captions to choose from, {keys[0]} asks for {samples:,} "
            f"({len(captions):,} read, dropped: {dropped})",
            remedy=f"lower {keys[0]} to {len(kept)}" + (f", or raise {keys[1]}" if over else ""),
        )
    chosen = tuple(kept[:samples])
    numbers = tuple(first[caption.text] for caption in chosen)
    return Choice(chosen, len(captions), empty, duplicates, over, numbers)


def _image_order(image: Image) -> tuple[int, int, str]:
    """Numbers before names, no image last."""
    if image is None:
        return 2, 0, ""
    return (0, image, "") if isinstance(image, int) else (1, 0, image)


# --- reading ----------------------------------------------------------------------------------------


def read_source(name: str) -> Source:
    """All captions of what a recipe's ``calibration.captions`` names, each as it stands there.

    Raises:
        UsageError: one line.
    """
    try:
        if name == "embedded":
            source = _read_file(EMBEDDED)
            return Source(source.captions, source.files, (EMBEDDED_TERMS,))
        if name == "coco2017":
            return _read_coco2017()
        path = Path(name).expanduser()
        if path.is_dir():
            return _read_directory(path)
        if path.exists() or name.startswith((".", "/", "~")) or path.suffix.lower() in FILE_SUFFIXES:
            return _read_file(path)
    except OSError as error:
        raise UsageError(f"{error.filename or name}: cannot be read: {error.strerror or error}") from None
    if not HUB_ID.fullmatch(name):
        raise UsageError(
            f"calibration.captions: {name!r} is no file or directory{seen_from(path)}",
            remedy="allowed: coco2017, embedded, a path to .json (COCO annotations), .jsonl or .txt, a directory, or "
            "a hub id (org/name)",
        )
    if Path(first := path.parts[0]).is_dir():
        raise UsageError(
            f"calibration.captions: {name!r} is no file or directory{seen_from(path)}; {first} is a directory here, so "
            "it is not looked for on the hub",
            remedy="correct the path",
        )
    return _read_hub(name)


def read_sources(names: list[str]) -> Source:
    """Several sources as one. The order of the names does not matter."""
    read = [read_source(name) for name in names]
    files = sorted(file for source in read for file in source.files)
    terms: dict[Terms, None] = {}
    if all(source.terms for source in read):  # what only some say is not true of all
        terms = dict.fromkeys(terms for source in sorted(read, key=lambda s: s.files) for terms in source.terms)
    return Source([caption for source in read for caption in source.captions], tuple(files), tuple(terms))


def _read_coco2017() -> Source:
    if named := os.environ.get("COCO_CAPTIONS"):
        names = [name for name in named.split(os.pathsep) if name]
        if "coco2017" in names:
            raise UsageError("COCO_CAPTIONS: it names paths, and coco2017 is what it stands for", remedy="unset it")
        try:
            return read_sources(names)
        except UsageError as error:
            raise UsageError(f"COCO_CAPTIONS: {error}") from None
    if COCO2017.is_dir():
        return _read_built(COCO2017)
    raise UsageError(
        f"calibration.captions: coco2017 is not here: fetch {COCO_ARCHIVE}, unpack it and run `{BUILDER}` once, or "
        "set COCO_CAPTIONS to annotation files, or set calibration.captions: embedded"
    )


def _read_file(path: Path, expected: str | None = None) -> Source:
    """A file's captions; `expected` is the SHA-256 that a built set's manifest has for it."""
    if not path.exists():
        raise UsageError(f"{path}: no such file{seen_from(path)}; calibration needs captions")
    readers: dict[str, Callable[[str, Path], tuple[list[Caption], tuple[Terms, ...]]]]
    readers = {".json": _parse_coco, ".jsonl": _parse_lines, ".txt": _parse_text}
    parse = readers.get(path.suffix.lower())
    if parse is None or not path.is_file():
        unpack = "unpack it first" if path.suffix.lower() in (".zip", ".gz", ".tgz", ".xz") else None
        raise UsageError(
            f"{path}: captions come as .json (COCO annotations), .jsonl, .txt or a directory, not like this",
            remedy=unpack,
        )
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if expected not in (None, digest):
        raise UsageError(
            f"{path}: its SHA-256 is not the one in {SET_MANIFEST}: the set was changed or is damaged",
            remedy=BUILD_AGAIN,
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}:{line}: byte {error.start} of the file is not UTF-8", remedy="save the captions as UTF-8"
        ) from None
    if not text.strip():
        raise UsageError(f"{path}: the file is empty; no captions in it")
    captions, terms = parse(text, path)
    if not captions:
        raise UsageError(f"{path}: no captions in it")
    return Source(captions, ((path.name, digest),), terms)


def _parse_text(text: str, path: Path) -> tuple[list[Caption], tuple[Terms, ...]]:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return [Caption(None, line) for line in text.removesuffix("\n").split("\n")], ()


def _parse_coco(text: str, path: Path) -> tuple[list[Caption], tuple[Terms, ...]]:
    expected = "expected is COCO's format, an object with annotations: [{image_id, caption}, ...]"
    value = _parse_json(text, str(path))
    annotations = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(annotations, list):
        lines = "; one object a line goes into a .jsonl file" if isinstance(value, list) else ""
        raise UsageError(f"{path}: found {_described(value)}; {expected}{lines}")
    captions = []
    for index, row in enumerate(annotations):
        caption, image = (row.get("caption"), row.get("image_id")) if isinstance(row, dict) else (None, None)
        if not isinstance(caption, str) or (type(image) is not int and not isinstance(image, str)):
            raise UsageError(
                f"{path}: annotations[{index}] is {_described(row)}; {expected}", remedy="is it a captions_*.json file?"
            )
        captions.append(Caption(image if isinstance(image, int) else normalize(image) or None, caption))
    info = value.get("info")
    is_coco = isinstance(info, dict) and _COCO.search(str(info.get("description")))
    return captions, (COCO_TERMS,) if is_coco else ()


def _parse_lines(text: str, path: Path) -> tuple[list[Caption], tuple[Terms, ...]]:
    captions: list[Caption] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        value = _parse_json(line, where)
        if isinstance(value, str):
            captions.append(Caption(None, value))
        elif isinstance(value, dict):
            captions += _of_row(value, where)
        else:
            raise UsageError(f"{where}: found {_described(value)}; expected is a JSON object with a caption, or text")
    return captions, ()


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{where}: this is not JSON ({error})", remedy="is it the right file, and is it whole?"
        ) from None


def _of_row(row: Mapping[str, Any], where: str) -> Iterator[Caption]:
    """The captions of a JSON line or of a data set's row: usually one, sometimes all those of an image."""
    key = next((key for key in CAPTION_KEYS if key in row), None)
    if key is None:
        raise UsageError(f"{where}: found {_described(row)}; expected is one of: {', '.join(CAPTION_KEYS)}")
    try:
        texts = list(_texts(row[key]))
    except TypeError:
        raise UsageError(f"{where}: {key} is {_described(row[key])}; expected is text, or a list of texts") from None
    image: Image = None
    for key in IMAGE_KEYS:
        value = row.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int and not isinstance(value, str | None):
            raise UsageError(f"{where}: {key} is {_described(value)}; expected is a number or a name")
        image = normalize(value) or None if isinstance(value, str) else value
        if image is not None:
            break
    if image is None and len(texts) > 1:  # one image, though it has no id: make one that needs no order of rows
        joined = "\0".join(sorted(normalize(text) for text in texts))
        image = f"row-{hashlib.sha256(joined.encode()).hexdigest()[:16]}"
    for text in texts:
        yield Caption(image, text)


def _texts(value: Any) -> Iterator[str]:
    """The texts of a caption column: text, a list of texts, or tokenized sentences that keep theirs as `raw`."""
    if isinstance(value, str):
        yield value
    elif value is None:
        yield ""
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict) and "raw" in value:
        yield from _texts(value["raw"])
    else:
        raise TypeError


def _described(value: Any) -> str:
    """What was found instead, short enough for an error."""
    if isinstance(value, dict):
        keys = [str(key)[:30] for key in value]
        return f"an object with {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}" if keys else "an empty object"
    return f"a list of {len(value)}" if isinstance(value, list) else json.dumps(value, default=str)[:40]


# --- directories and data sets ------------------------------------------------------------------------


def _read_directory(path: Path) -> Source:
    if (path / SET_CAPTIONS).exists() or (path / SET_MANIFEST).exists():
        return _read_built(path)
    if not any(path.iterdir()):
        raise UsageError(f"{path}: the directory is empty; no captions in it")
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    remedy = "name a .json (COCO annotations), .jsonl or .txt file instead of the directory"
    return _read_dataset("load_from_disk" if saved else "load_dataset", str(path), path.resolve().name, remedy)


def _read_built(path: Path) -> Source:
    """A set that `python -m calib_data` made, after a look at whether it is still what was made."""
    for name in (SET_CAPTIONS, SET_MANIFEST):
        if not (path / name).is_file():
            raise UsageError(f"{path}: there is no {name} in this set of captions", remedy=BUILD_AGAIN)
    where = path / SET_MANIFEST
    try:
        manifest = _parse_json(where.read_text(encoding="utf-8"), str(where))
        expected, known = manifest["captions"]["sha256"], [manifest.get(key) for key in ("licence", "attribution")]
    except (UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{where}: this is not the manifest of a set of captions", remedy=BUILD_AGAIN) from None
    source = _read_file(path / SET_CAPTIONS, str(expected))
    terms = (Terms(*known),) if all(isinstance(text, str) for text in known) else ()
    return Source(source.captions, source.files, terms)


def _read_hub(name: str) -> Source:
    remedy = "check the name and the connection (HF_HUB_OFFLINE, HF_TOKEN), or name a file or a directory"
    return _read_dataset("load_dataset", name, name, remedy)


def _read_dataset(function: str, where: str, name: str, remedy: str) -> Source:
    """The captions of what a function of `datasets` loads, or of one split: train if there is one, else the first."""
    import datasets

    try:
        loaded = getattr(datasets, function)(where)
        if isinstance(loaded, dict):
            split = "train" if "train" in loaded else next(iter(loaded))
            loaded, name, where = loaded[split], f"{name}:{split}", f"{where}, split {split}"
        captions = list(_of_dataset(loaded, where))
    except UsageError:
        raise
    except Exception as error:  # datasets, its readers and its HTTP client raise what they like
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        said = " ".join(str(cause or error).split())[:200] or type(error).__name__
        raise UsageError(f"{where}: datasets cannot load it ({said})", remedy=remedy) from None
    if not captions:
        raise UsageError(f"{where}: no captions in it")
    digest = hashlib.sha256()
    for caption in captions:
        digest.update(json.dumps(caption).encode() + b"\n")
    return Source(captions, ((name, digest.hexdigest()),))


def _of_dataset(dataset: Any, where: str) -> Iterator[Caption]:
    columns = [column for column in (*CAPTION_KEYS, *IMAGE_KEYS) if column in dataset.column_names]
    if not set(columns) & set(CAPTION_KEYS):
        found = ", ".join(dataset.column_names[:12])
        coco = "for COCO annotations name the .json file itself" if "annotations" in dataset.column_names else None
        raise UsageError(
            f"{where}: found the columns {found}; expected is one of: {', '.join(CAPTION_KEYS)}", remedy=coco
        )
    number = 0
    for batch in dataset.select_columns(columns).with_format(None).iter(1000):  # no pictures are decoded
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield from _of_row(dict(zip(columns, values, strict=True)), f"{where}, row {number}")
            number += 1
