"""Reads the tables of docs/scheduling.md, which are the test tables too."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "scheduling.md"

Rows = list[dict[str, str]]


def table(*first_columns: str) -> Rows:
    """The rows of the one table whose header starts with these columns."""
    found: list[Rows] = []
    header: list[str] | None = None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
            if tuple(cells[: len(first_columns)]) == first_columns:
                found.append([])
        elif not set(line) <= set("|- ") and tuple(header[: len(first_columns)]) == first_columns:
            found[-1].append(dict(zip(header, cells, strict=True)))
    assert len(found) == 1, f"{len(found)} tables start with {first_columns}"
    return found[0]


def number(cell: str) -> float:
    return float(cell.replace("−", "-"))
