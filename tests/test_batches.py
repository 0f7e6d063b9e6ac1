"""Token batches: nothing padded, one canonical order, tokenizers' own ids."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from pipeline.calibration.batches import QUESTION, make_batches, tokenize
from pipeline.checkpoint.source import SourceError
from tests import families


def sequences(count: int, seed: int = 1) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(300) for _ in range(dice.randint(1, 40))] for _ in range(count)]


def rows(batches: object) -> list[list[int]]:
    return [list(b.ids[r * b.length : (r + 1) * b.length]) for b in batches.batches for r in range(b.rows)]  # type: ignore[attr-defined]


def test_every_token_once_and_no_other() -> None:
    made = sequences(500)
    batches = make_batches(made, 512, batch_tokens=100)
    assert Counter(map(tuple, rows(batches))) == Counter(map(tuple, made))
    assert batches.tokens == sum(map(len, made)) and batches.samples == 500 and batches.cut == 0
    assert all(b.tokens <= 100 for b in batches.batches)
    assert (batches.shortest, batches.longest) == (min(map(len, made)), max(map(len, made)))


def test_order_does_not_matter_and_content_does() -> None:
    made = sequences(200)
    shuffled = made[:]
    random.Random(9).shuffle(shuffled)
    assert make_batches(shuffled, 512) == make_batches(made, 512)
    changed = [row[:] for row in made]
    changed[17][0] += 1
    assert make_batches(changed, 512).digest != make_batches(made, 512).digest
    assert make_batches(made, 512, batch_tokens=64).digest != make_batches(made, 512).digest


def test_long_sequences_are_cut_and_counted() -> None:
    batches = make_batches([[1] * 50, [2] * 10, [3] * 11], 10)
    assert (batches.cut, batches.longest, batches.tokens) == (2, 10, 30)
    assert make_batches([[1] * 50], 512, batch_tokens=8).batches[0].rows == 1


def test_raw_is_the_tokenizers_own_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    families.add_tokenizer(tmp_path)
    texts = ["A red boat.", "Zwei Kähne, 東京"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenize(texts, tmp_path, "raw") == [tokenizer(text).input_ids for text in texts]
    assert len(tokenize(texts, tmp_path, "raw")[1]) == len(texts[1].encode())


def test_chat_puts_the_caption_as_the_answer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    families.add_tokenizer(tmp_path)
    (ids,) = tokenize(["A red boat."], tmp_path, "chat")
    text = AutoTokenizer.from_pretrained(tmp_path).decode(ids)
    assert text == f"<turn>user: {QUESTION}</s><turn>assistant: A red boat.</s>"


def test_chat_templates_that_want_parts(tmp_path: Path) -> None:
    families.add_tokenizer(tmp_path)
    parts = "{% for m in messages %}<turn>{% for p in m.content %}{{ p['text'] }}{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(parts)
    (ids,) = tokenize(["A red boat."], tmp_path, "chat")
    assert len(ids) == 2 + len(QUESTION) + len("A red boat.")


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="the tokenizer does not load"):
        tokenize(["x"], tmp_path, "raw")
    families.add_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no captions here') }}")
    with pytest.raises(SourceError, match=r"does not take a caption .*no captions here.*use calibration.template: raw"):
        tokenize(["x"], tmp_path, "chat")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="the tokenizer does not load"):
        tokenize(["x"], tmp_path, "raw")
