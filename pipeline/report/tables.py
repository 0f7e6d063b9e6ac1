"""Tables that fit where they are shown: the least important columns go first, and lines break between words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        cell: the text of a row's cell.
        rank: 0 stays in any case; of the others the highest goes first where the width does not suffice.
        right: figures are aligned at their ends.
    """

    name: str
    cell: Callable[[Any], str]
    rank: int = 0
    right: bool = True


def fitted(rows: Sequence[Any], columns: Sequence[Column], width: int, **options: Any) -> rich.table.Table:
    """A table of the columns that fit.

    Args:
        rows: what each column's `cell` is called with.
        columns: from left to right; the text of cells is shown as it is, without markup.
        width: of the terminal, in characters.
        options: of `rich.table.Table`: title, caption.
    """
    from rich.cells import cell_len
    from rich.markup import escape
    from rich.table import Table

    texts = {column: [column.cell(row) for row in rows] for column in columns}
    needed = {
        column: max([cell_len(column.name), *(cell_len(text) for text in cells)]) + 3 for column, cells in texts.items()
    }
    kept = list(columns)
    # a column of words may wrap down to its heading's width, or to twenty characters; what stays in any case does not
    least = {c: needed[c] if c.right or not c.rank else min(needed[c], max(len(c.name), 20) + 3) for c in columns}
    while 1 + sum(least[column] for column in kept) > width and any(column.rank for column in kept):
        kept.remove(max(kept, key=lambda column: column.rank))
    table = Table(title_justify="left", caption_justify="left", **options)
    for column in kept:
        side: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(column.name, justify=side, no_wrap=column.right, overflow="fold")
    for number in range(len(rows)):
        table.add_row(*(escape(texts[column][number]) for column in kept))
    return table
