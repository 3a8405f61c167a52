"""Text tables that fit the terminal. Everything printed passes here, so nothing can move the cursor.

Pure but for the two functions at the end, which ask the terminal its width and write.
"""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

#: A flexible column is readable with so many characters, and recognisable with so few.
_READABLE: Final = 12
_SHORTEST: Final = 6


class Column(NamedTuple):
    """What to do with it when the terminal is too narrow: `flexible` is shortened, `spare` is left out."""

    title: str
    right: bool = False
    flexible: bool = False
    spare: bool = False


class _Layout(NamedTuple):
    columns: list[Column]
    titles: list[list[str]]
    cells: list[list[str]]
    widths: list[int]
    gap: int

    @property
    def total(self) -> int:
        return sum(self.widths) + self.gap * (len(self.widths) - 1)


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int | None) -> list[str]:
    """Lines without trailing blanks. `width` None: as wide as it takes.

    1. As it is. 2. Too wide: titles are broken at `_`, gaps are narrow. 3. Flexible cells are shortened to a
    readable length. 4. Spare columns go, the last first. 5. Flexible cells are shortened further.
    """
    cells = [[clean(cell) for cell in row] for row in rows]
    layout = _laid_out(columns, [[column.title] for column in columns], cells, gap=2)
    if width is not None and layout.total > width:
        layout = _laid_out(columns, [_broken(column.title) for column in columns], cells, gap=1)
        _shrink(layout, width, _READABLE)
        while layout.total > width and (spare := _last_spare(layout)) is not None:
            _drop(layout, spare)
        _shrink(layout, width, _SHORTEST)
    height = max(len(lines) for lines in layout.titles)
    padded = [[""] * (height - len(lines)) + lines for lines in layout.titles]
    head = [list(line) for line in zip(*padded, strict=True)]
    return [_line(layout, row) for row in (*head, *layout.cells)]


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


def _laid_out(
    columns: Sequence[Column], titles: list[list[str]], cells: list[list[str]], gap: int
) -> _Layout:
    widths = [
        max([*map(columns_of, lines), *(columns_of(row[i]) for row in cells)])
        for i, lines in enumerate(titles)
    ]
    return _Layout(list(columns), titles, [list(row) for row in cells], widths, gap)


def _broken(title: str) -> list[str]:
    """`queue_depth` on two lines: `queue_` above `depth`."""
    first, underscore, second = title.partition("_")
    return [first + underscore, second] if second else [title]


def _shrink(layout: _Layout, width: int, shortest: int) -> None:
    widths = layout.widths
    while layout.total > width:
        flexible = [i for i, column in enumerate(layout.columns) if column.flexible and widths[i] > shortest]
        if not flexible:
            return
        widths[max(flexible, key=lambda i: widths[i])] -= 1


def _last_spare(layout: _Layout) -> int | None:
    return max((i for i, column in enumerate(layout.columns) if column.spare), default=None)


def _drop(layout: _Layout, index: int) -> None:
    del layout.columns[index], layout.titles[index], layout.widths[index]
    for row in layout.cells:
        del row[index]


def _line(layout: _Layout, row: Sequence[str]) -> str:
    cells = []
    for column, width, cell in zip(layout.columns, layout.widths, row, strict=True):
        text = shortened(cell, width)
        blank = " " * (width - columns_of(text))
        cells.append(blank + text if column.right else text + blank)
    return (" " * layout.gap).join(cells).rstrip()


def terminal_width() -> int | None:
    """Columns of the terminal; None when standard output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def write(lines: Iterable[str]) -> None:
    """To standard output; a character that its encoding lacks becomes `?` instead of an error."""
    text = "".join(f"{line}\n" for line in lines)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
