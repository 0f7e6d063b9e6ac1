"""Token batches: nothing padded, one canonical order, tokenizers' own ids."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.calibration.batches import QUESTION, encode, make_batches, tokenize
from pipeline.checkpoint.source import SourceError
from pipeline.errors import UsageError
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


# --- special tokens within captions --------------------------------------------------------------------


def edit(path: Path, **values: Any) -> None:
    """Change a JSON file; None removes a key."""
    found = {**json.loads(path.read_text() if path.exists() else "{}"), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def bytes_of(root: Path, text: str) -> list[int]:
    """A text's ids by its bytes alone, as the tokenizer of `families` has them."""
    return [tokenize([char], root, "raw")[0][0] for char in text]


@pytest.mark.parametrize("token", ["<image>", "</s>", "<turn>", "<pad>"])
def test_special_tokens_in_captions_are_text(token: str, tmp_path: Path) -> None:
    families.add_tokenizer(tmp_path)
    plain, marked = "A red boat.", f"A {token} boat"
    raw = encode([plain, marked], tmp_path, "raw")
    assert raw.special == {1: token} and raw.sequences == [bytes_of(tmp_path, plain), bytes_of(tmp_path, marked)]
    chat = encode([plain, marked], tmp_path, "chat")
    turn, end = 3, 2
    question = bytes_of(tmp_path, f"user: {QUESTION}")
    assert chat.sequences[1] == [turn, *question, end, turn, *bytes_of(tmp_path, f"assistant: {marked}"), end]
    assert chat.sequences[0] == tokenize([plain], tmp_path, "chat")[0]


def test_a_place_for_a_picture_that_stays_one_is_refused(tmp_path: Path) -> None:
    families.add_tokenizer(tmp_path)
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    added[-1]["special"] = False  # as some tokenizers have it
    edit(tmp_path / "tokenizer.json", added_tokens=added)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {}, "image_token_id": families.IMAGE}))
    with pytest.raises(UsageError, match=r"<image> stands in the caption 'A <image> boat'.*take it out"):
        encode(["A boat", "A <image> boat"], tmp_path, "raw")


# --- tokenizers and templates as people have them ------------------------------------------------------


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")
    if importlib.util.find_spec("sentencepiece") is not None:
        pytest.skip("sentencepiece is installed here, and such a model loads")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    edit(tmp_path / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    for name in ("LlamaTokenizer", "GemmaTokenizer"):
        edit(tmp_path / "tokenizer_config.json", tokenizer_class=name)
        with pytest.raises(
            SourceError, match=r"its tokenizer is tokenizer.model alone.*write tokenizer.json"
        ) as caught:
            tokenize(["x"], tmp_path, "raw")
        assert "pip install tiktoken" not in str(caught.value)


def test_settings_without_a_vocabulary_are_no_tokenizer(tmp_path: Path) -> None:
    edit(tmp_path / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    for name in ("LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer"):
        edit(tmp_path / "tokenizer_config.json", tokenizer_class=name)
        with pytest.raises(SourceError, match="there is no tokenizer here"):
            tokenize(["x"], tmp_path, "raw")


SHORT = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"


def keep_in_json(root: Path) -> None:
    edit(root / "chat_template.json", chat_template=SHORT)


def keep_in_processor(root: Path) -> None:
    edit(root / "processor_config.json", chat_template=SHORT)


def keep_as_list(root: Path) -> None:
    named = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": SHORT}]
    edit(root / "tokenizer_config.json", chat_template=named)


def keep_one_in_a_list(root: Path) -> None:
    edit(root / "tokenizer_config.json", chat_template=[{"name": "mine", "template": SHORT}])


def keep_in_additional(root: Path) -> None:
    (root / "additional_chat_templates").mkdir()
    (root / "additional_chat_templates/mine.jinja").write_text(SHORT)


def keep_beside_additional(root: Path) -> None:
    keep_in_additional(root)
    (root / "additional_chat_templates/mine.jinja").write_text("{{ 1 }}")
    (root / "chat_template.jinja").write_text(SHORT)


@pytest.mark.parametrize(
    "keep",
    [keep_in_json, keep_in_processor, keep_as_list, keep_one_in_a_list, keep_in_additional, keep_beside_additional],
)
def test_chat_templates_wherever_they_are_kept(keep: Callable[[Path], None], tmp_path: Path) -> None:
    families.add_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer_config.json", chat_template=None)
    keep(tmp_path)
    (ids,) = tokenize(["A boat"], tmp_path, "chat")
    assert ids == [3, *bytes_of(tmp_path, QUESTION), 3, *bytes_of(tmp_path, "A boat")]


def test_several_templates_without_a_default(tmp_path: Path) -> None:
    families.add_tokenizer(tmp_path)
    named = [{"name": "tool_use", "template": SHORT}, {"name": "rag", "template": SHORT}]
    edit(tmp_path / "tokenizer_config.json", chat_template=named)
    with pytest.raises(SourceError, match=r"called tool_use, rag, and none of them default; use .*template: raw"):
        tokenize(["A boat"], tmp_path, "chat")
