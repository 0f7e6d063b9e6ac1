"""What a source's own model card says in its front matter, for the card of the result: huggingface_hub reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.result import CARD

MAX_BYTES = 1 << 20  # of a card; what is longer is no card
LONGEST = 300  # characters of a value that is a name or a link


@dataclass(frozen=True)
class SourceCard:
    """The front matter of a README.md, as far as a quantized version shares it; names are the hub's.

    Attributes:
        license: the hub's identifier, such as apache-2.0 or other.
        license_name: of one that the hub has no identifier for.
        license_link: a URL or a file of the repository.
        language: codes.
        base_model: what the source itself was made from.
        base_model_relation: how: finetune, merge, adapter, quantized.
        pipeline_tag: the task.
        tags: all of them.
        problem: why there is a card that could not be read; None where it was, or there is none.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    base_model: tuple[str, ...] = ()
    base_model_relation: str | None = None
    pipeline_tag: str | None = None
    tags: tuple[str, ...] = ()
    problem: str | None = None


def read_source_card(root: Path) -> SourceCard:
    """The card in a checkpoint's directory; an empty one where there is none, or none with metadata. Never raises."""
    path = root / CARD
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return SourceCard()
        text = path.read_bytes().decode("utf-8-sig")
        if not text.lstrip().startswith("---"):
            return SourceCard()
        return _made(_front_matter(text))
    except Exception as error:  # a card is anybody's text, and YAML fails in many ways; none of them stops a conversion
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return SourceCard(problem=lines[0].strip()[:LONGEST])


def _front_matter(text: str) -> dict[str, Any]:
    """The metadata block as `huggingface_hub` reads it, without a look at keys that are of no use here."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

    if REGEX_YAML_BLOCK.search(text) is None:
        if "---" in (line.rstrip() for line in text.lstrip().splitlines()[1:]):
            return {}  # nothing between the two lines
        raise ValueError("it has no end, a line ---")
    found: dict[str, Any] = RepoCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    return found


def _made(found: dict[str, Any]) -> SourceCard:
    words = {
        key: _texts(found.get(key))[:1]
        for key in ("license", "license_name", "license_link", "base_model_relation", "pipeline_tag")
    }
    return SourceCard(
        **{key: value[0] if value else None for key, value in words.items()},
        language=_texts(_with_norwegian(found.get("language"))),
        base_model=_texts(found.get("base_model")),
        tags=_texts(found.get("tags")),
    )


def _texts(value: Any) -> tuple[str, ...]:
    """One text or a list of them, without what is neither."""
    values = value if isinstance(value, list | tuple) else [value]
    kept = (text.strip() for text in values if isinstance(text, str) and len(text) <= LONGEST)
    return tuple(dict.fromkeys(text for text in kept if text and text.isprintable()))


def _with_norwegian(value: Any) -> Any:
    """Codes of languages: to YAML, Norwegian (no) is false."""
    return ["no" if each is False else each for each in (value if isinstance(value, list) else [value])]
