"""Learned rates over restarts: rows as `herd.fleet.rates` exports and loads them.

One row a (node, model, quantity), so that a quantity which is learned later needs no migration.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

#: node id ("" for what belongs to the model alone), model, quantity, value.
Row = tuple[str, str, str, float]


def save_rates(connection: sqlite3.Connection, rows: Iterable[Row], wall_s: float) -> None:
    """Write these values; others stay as they are."""
    connection.executemany(
        "INSERT INTO learned_rates (node_id, model, quantity, value, updated) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (node_id, model, quantity)"
        " DO UPDATE SET value = excluded.value, updated = excluded.updated",
        [(*row, wall_s) for row in rows],
    )


def load_rates(connection: sqlite3.Connection) -> list[Row]:
    """Everything that was ever learned."""
    return connection.execute("SELECT node_id, model, quantity, value FROM learned_rates").fetchall()
