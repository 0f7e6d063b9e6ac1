"""Captions as token batches: rows of one length each, so that nothing is padded and no pad token reaches an amax.

The batches are canonical: rows are sorted by length, then by tokens, and cut where a batch is full. The order in
which captions come, a resume, or another number of devices never change a batch, and with it never a bit.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.checkpoint.source import SourceError
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
    """

    batches: tuple[Batch, ...]
    samples: int
    tokens: int
    shortest: int
    longest: int
    cut: int
    digest: str


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
    """Captions as token ids of a checkpoint's own tokenizer.

    Args:
        texts: the captions.
        root: the checkpoint's directory.
        template: ``raw`` is the tokenizer's input_ids for the caption, nothing added; ``chat`` puts the caption as
            the answer to a question into the model's chat template.

    Raises:
        SourceError: the checkpoint has no tokenizer that loads, no chat template, or no token for a caption.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
    except Exception as error:  # whatever a damaged tokenizer raises, the remedy is the same
        raise SourceError(f"{root}: the tokenizer does not load ({_first_line(error)}); calibration needs it") from None
    texts = list(texts)
    if template == "chat":
        if not tokenizer.chat_template:
            raise SourceError(f"{root}: there is no chat template", remedy="use calibration.template: raw")
        sequences = [_chat(tokenizer, text, root) for text in texts]
    else:
        sequences = tokenizer(texts, verbose=False).input_ids
    for text, ids in zip(texts, sequences, strict=True):
        if not ids:
            raise SourceError(f"{root}: the tokenizer makes no token of {text[:60]!r}", remedy="is it this model's?")
    return [list(ids) for ids in sequences]


def _chat(tokenizer: Any, text: str, root: Path) -> list[int]:
    last: Exception | None = None
    for wrap in (lambda content: content, lambda content: [{"type": "text", "text": content}]):
        turns = [{"role": "user", "content": wrap(QUESTION)}, {"role": "assistant", "content": wrap(text)}]
        try:
            made = tokenizer.apply_chat_template(turns, tokenize=False, date_string=DAY, strftime_now=lambda _: DAY)
            if text in made:
                return list(tokenizer(made, add_special_tokens=False, verbose=False).input_ids)
        except Exception as error:  # templates raise what they like; the other form of content may be the right one
            last = error
    raise SourceError(
        f"{root}: the chat template does not take a caption ({_first_line(last) if last else 'the text is lost'})",
        remedy="use calibration.template: raw",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
