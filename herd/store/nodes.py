"""What each node lists, kept over restarts: a model whose holder is away is "not now", never "nowhere"."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import orjson


def save_models(connection: sqlite3.Connection, node_id: str, names: Iterable[str], wall_s: float) -> None:
    """Remember the canonical names that the node lists now; what it listed before is forgotten."""
    connection.execute(
        "INSERT INTO nodes (node_id, models, updated) VALUES (?, ?, ?)"
        " ON CONFLICT (node_id) DO UPDATE SET models = excluded.models, updated = excluded.updated",
        (node_id, orjson.dumps(sorted(set(names))).decode(), wall_s),
    )


def load_models(connection: sqlite3.Connection) -> dict[str, frozenset[str]]:
    """Model → ids of the nodes that listed it when they were last heard."""
    holders: dict[str, set[str]] = {}
    for node_id, names in connection.execute("SELECT node_id, models FROM nodes"):
        for name in orjson.loads(names):
            holders.setdefault(name, set()).add(node_id)
    return {name: frozenset(nodes) for name, nodes in holders.items()}
