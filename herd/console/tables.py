"""Text tables that fit the terminal. Everything printed passes here, so nothing can move the cursor.

Pure but for the two functions at the end, which ask the terminal its width and write.
"""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

GAP: Final = "  "
_SHORTEST: Final = 6


class Column(NamedTuple):
    """`flexible` columns are shortened, the widest first, when the terminal is too narrow."""

    title: str
    right: bool = False
    flexible: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int | None) -> list[str]:
    """Lines without trailing blanks. `width` None: as wide as it takes.

    1. As it is. 2. Too wide: titles are broken at `_`. 3. Still too wide: flexible cells are shortened.
    """
    cells = [[clean(cell) for cell in row] for row in rows]
    titles = [[column.title] for column in columns]
    widths = _widths(titles, cells)
    if width is not None and _total(widths) > width:
        titles = [_broken(column.title) for column in columns]
        widths = _widths(titles, cells)
        _shrink(widths, columns, width)
    height = max(len(lines) for lines in titles)
    head = [[([""] * (height - len(lines)) + lines)[i] for lines in titles] for i in range(height)]
    return [_line(columns, widths, row) for row in (*head, *cells)]


def clean(text: str) -> str:
    """Control and format characters out: names and reasons come from other machines."""
    return "".join("?" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char for char in text)


def columns_of(text: str) -> int:
    """How many terminal columns the text takes."""
    return sum(_char_columns(char) for char in text)


def shortened(text: str, width: int) -> str:
    """Cut to `width` columns, with an ellipsis where something is missing."""
    if columns_of(text) <= width:
        return text
    kept, used = [], 1
    for char in text:
        used += _char_columns(char)
        if used > width:
            break
        kept.append(char)
    return "".join(kept) + "…"


def _char_columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _widths(titles: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        max([*map(columns_of, lines), *(columns_of(row[i]) for row in rows)])
        for i, lines in enumerate(titles)
    ]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _broken(title: str) -> list[str]:
    """`queue_depth` on two lines: `queue_` above `depth`."""
    first, underscore, second = title.partition("_")
    return [first + underscore, second] if second else [title]


def _shrink(widths: list[int], columns: Sequence[Column], width: int) -> None:
    while _total(widths) > width:
        flexible = [i for i, column in enumerate(columns) if column.flexible and widths[i] > _SHORTEST]
        if not flexible:
            return
        widths[max(flexible, key=lambda i: widths[i])] -= 1


def _line(columns: Sequence[Column], widths: Sequence[int], row: Sequence[str]) -> str:
    cells = []
    for column, width, cell in zip(columns, widths, row, strict=True):
        text = shortened(cell, width)
        blank = " " * (width - columns_of(text))
        cells.append(blank + text if column.right else text + blank)
    return GAP.join(cells).rstrip()


def terminal_width() -> int | None:
    """Columns of the terminal; None when standard output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def write(lines: Iterable[str]) -> None:
    """To standard output; a character that its encoding lacks becomes `?` instead of an error."""
    text = "".join(f"{line}\n" for line in lines)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
