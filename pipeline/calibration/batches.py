"""Captions as token batches: rows of one length each, so that nothing is padded and no pad token reaches an amax.

The batches are canonical: rows are sorted by length, then by tokens, and cut where a batch is full. The order in
which captions come, a resume, or another number of devices never change a batch, and with it never a bit.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.checkpoint.source import SourceError, read_json
from pipeline.errors import UsageError
from pipeline.library_messages import quiet
from pipeline.model.batch import Batch

BATCH_TOKENS = 4096  # computed at once: fills a GPU's matrix units, and stays small beside a layer
DAY = "01 Jan 2026"  # for templates that name today's date: the same captions give the same tokens tomorrow
QUESTION = "Describe the image in one sentence."  # what the caption answers, with template: chat


@dataclass(frozen=True)
class Batches:
    """All batches of a run, and what a careful user wants to know of them.

    Attributes:
        batches: in order.
        samples: sequences.
        tokens: positions, all of them real.
        shortest: tokens of the shortest sequence.
        longest: tokens of the longest sequence.
        cut: how many sequences were cut at the recipe's max_length.
        digest: SHA-256 over the batches: shapes and ids.
        notes: what was done about captions that are no plain text, a sentence each.
    """

    batches: tuple[Batch, ...]
    samples: int
    tokens: int
    shortest: int
    longest: int
    cut: int
    digest: str
    notes: tuple[str, ...] = ()

    @property
    def highest(self) -> int:
        """The largest token id."""
        return max(max(batch.ids) for batch in self.batches)


@dataclass(frozen=True)
class Encoded:
    """Captions as token ids.

    Attributes:
        sequences: token ids, one list a caption.
        special: of captions that hold a special token's text, by their index, that text.
    """

    sequences: list[list[int]]
    special: dict[int, str]


def make_batches(sequences: Iterable[list[int]], max_length: int, batch_tokens: int = BATCH_TOKENS) -> Batches:
    """Cut, sort and group token sequences.

    Args:
        sequences: token ids, each at least one.
        max_length: tokens that are kept of each.
        batch_tokens: upper bound of a batch's positions; one sequence longer than that is a batch of its own.
    """
    kept, cut = [], 0
    for sequence in sequences:
        cut += len(sequence) > max_length
        kept.append(sequence[:max_length])
    kept.sort(key=lambda row: (len(row), row))
    digest, batches = hashlib.sha256(), []
    for length, group in groupby(kept, key=len):
        rows = list(group)
        step = max(1, batch_tokens // length)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            ids = array("i", [token for row in part for token in row])
            batches.append(Batch(len(part), length, ids))
            digest.update(f"{len(part)}x{length}:".encode() + ids.tobytes())
    tokens = sum(len(row) for row in kept)
    return Batches(tuple(batches), len(kept), tokens, len(kept[0]), len(kept[-1]), cut, digest.hexdigest())


def tokenize(texts: Iterable[str], root: Path, template: str) -> list[list[int]]:
    """`encode`, the sequences alone."""
    return encode(texts, root, template).sequences


def encode(texts: Iterable[str], root: Path, template: str) -> Encoded:
    """Captions as token ids of a checkpoint's own tokenizer.

    A caption is text: what looks like a special token in it, ``<|image_pad|>`` or ``</s>``, is encoded as the words
    that it is written in. As a token it would stand for what is not there, and its embedding would reach an amax.

    Args:
        texts: the captions.
        root: the checkpoint's directory.
        template: ``raw`` is the tokenizer's input_ids for the caption, nothing added; ``chat`` puts the caption as
            the answer to a question into the model's chat template.

    Raises:
        SourceError: the checkpoint has no tokenizer that loads, no chat template, or no token for a caption.
        UsageError: a caption holds a special token that this tokenizer cannot write as text.
    """
    tokenizer, texts = load_tokenizer(root), list(texts)
    markers = _markers(tokenizer, root)
    special = _special_in(texts, markers)
    if template == "chat":
        form = chat_template(tokenizer, root)
        sequences = [_chat(tokenizer, form, text, index in special, root) for index, text in enumerate(texts)]
    else:
        sequences = tokenizer(texts, verbose=False).input_ids
        for index in special:
            sequences[index] = tokenizer(texts[index], split_special_tokens=True, verbose=False).input_ids
    for index, (text, ids) in enumerate(zip(texts, sequences, strict=True)):
        if not ids:
            raise SourceError(f"{root}: the tokenizer makes no token of {text[:60]!r}", remedy="is it this model's?")
        if index in special:
            _refuse_kept(tokenizer, text, special[index], markers)
    return Encoded([list(ids) for ids in sequences], special)


# --- the tokenizer -----------------------------------------------------------------------------------

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "*.model", "*.tiktoken")
LEAST_VOCABULARY = 256  # entries; bytes alone are as many


def load_tokenizer(root: Path) -> Any:
    """A checkpoint's tokenizer, as transformers loads it.

    Raises:
        SourceError: there is none, or it does not load; the text says what to do.
    """
    from transformers import AutoTokenizer

    files = sorted(path.name for pattern in VOCABULARIES for path in root.glob(pattern))
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
    except Exception as error:  # whatever a damaged tokenizer raises, the remedy is the same
        if files and "tokenizer.json" not in files and not any(name.startswith("vocab.") for name in files):
            raise SourceError(
                f"{root}: its tokenizer is {files[0]} alone, which transformers reads only with a further library "
                "(sentencepiece; for some, tiktoken or mistral-common)",
                remedy="write tokenizer.json beside it, once, where that library is installed: "
                f"AutoTokenizer.from_pretrained({str(root)!r}).save_pretrained(DIRECTORY); or install the library here",
            ) from None
        why = _first_line(error) if files else "there is none here"
        raise SourceError(f"{root}: the tokenizer does not load ({why}); calibration needs it") from None
    if not files and tokenizer.vocab_size < LEAST_VOCABULARY:  # transformers makes an empty one of its settings alone
        raise SourceError(
            f"{root}: there is no tokenizer here, none of {', '.join(VOCABULARIES)}; calibration needs it",
            remedy="copy the original model's tokenizer files into it",
        )
    return tokenizer


# --- special tokens ----------------------------------------------------------------------------------

_MEDIA = re.compile(r"(image|img|video|audio|vision|speech)\w*_token_(id|index)$")


def _markers(tokenizer: Any, root: Path) -> dict[str, int]:
    """Tokens that stand for no text: special ones, and what config.json names as the place of a picture or a sound."""
    known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known |= {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    named = _media_tokens(read_json(root / "config.json")) if (root / "config.json").exists() else set()
    for number in named & set(range(len(tokenizer))):
        known[str(tokenizer.convert_ids_to_tokens(number))] = number
    return {text: number for text, number in known.items() if len(text) > 1}


def _media_tokens(config: dict[str, Any]) -> set[int]:
    found = {value for key, value in config.items() if _MEDIA.search(key) and type(value) is int}
    for part in config.values():
        found |= _media_tokens(part) if isinstance(part, dict) else set()
    return found


def _special_in(texts: list[str], markers: dict[str, int]) -> dict[int, str]:
    """Of texts that hold one of the markers, by their index, the first of them."""
    if not markers:
        return {}
    pattern = re.compile("|".join(re.escape(text) for text in sorted(markers, key=len, reverse=True)))
    return {index: found[0] for index, text in enumerate(texts) if (found := pattern.search(text))}


def _refuse_kept(tokenizer: Any, text: str, marker: str, markers: dict[str, int]) -> None:
    """A special token that stays one, though it was to be text: some tokenizers do not mark theirs as special."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    if set(ids) & {number for token, number in markers.items() if token in text}:
        raise UsageError(
            f"calibration.captions: {marker} stands in the caption {text[:60]!r}; it is a special token of this model, "
            "and its tokenizer does not write it as text",
            remedy="take it out of the captions",
        )


# --- chat templates ----------------------------------------------------------------------------------


def chat_template(tokenizer: Any, root: Path) -> str:
    """The chat template of a checkpoint, wherever it keeps it.

    The tokenizer's own is asked first: of several named ones that called default, or the only one. Processors keep
    theirs in chat_template.json, or in processor_config.json.

    Raises:
        SourceError: there is none, or none of several is the default.
    """
    found: Any = tokenizer.chat_template
    for name in ("chat_template.json", "processor_config.json"):
        if not found and (root / name).exists():
            found = read_json(root / name).get("chat_template")
    if isinstance(found, list):
        found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict) and found:
        named = found.get("default") or (next(iter(found.values())) if len(found) == 1 else None)
        if named is None:
            raise SourceError(
                f"{root}: its chat templates are called {', '.join(map(str, found))}, and none of them default",
                remedy="use calibration.template: raw",
            )
        found = named
    if not isinstance(found, str) or not found:
        raise SourceError(f"{root}: there is no chat template", remedy="use calibration.template: raw")
    return found


def _chat(tokenizer: Any, form: str, text: str, special: bool, root: Path) -> list[int]:
    last: Exception | None = None
    for wrap in (lambda content: content, lambda content: [{"type": "text", "text": content}]):
        turns = [{"role": "user", "content": wrap(QUESTION)}, {"role": "assistant", "content": wrap(text)}]
        try:
            made = tokenizer.apply_chat_template(
                turns, chat_template=form, tokenize=False, date_string=DAY, strftime_now=lambda _: DAY
            )
            if text in made:
                return _chat_ids(tokenizer, made, text, special)
        except Exception as error:  # templates raise what they like; the other form of content may be the right one
            last = error
    raise SourceError(
        f"{root}: the chat template does not take a caption ({_first_line(last) if last else 'the text is lost'})",
        remedy="use calibration.template: raw",
    )


def _chat_ids(tokenizer: Any, made: str, text: str, special: bool) -> list[int]:
    """A conversation's ids; the special tokens of the template are some, those in a caption are text."""

    def ids(part: str, split: bool = False) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False, split_special_tokens=split, verbose=False).input_ids)

    if not special:
        return list(tokenizer(made, add_special_tokens=False, verbose=False).input_ids)
    before, _, after = made.rpartition(text)
    return ids(before) + ids(text, split=True) + (ids(after) if after else [])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
