"""`request_traces`: attempts in, attempts out. The columns are a contract (docs/traces.md).

Serialising happens here, on the writer's thread, never where a request is served. Nothing here may keep
prompt text: a trace has none, and no column would take it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Final

import orjson

from herd.trace import SIGNALS, ScoreCard, Trace

#: In the order of the table.
COLUMNS: Final = (
    "request_id",
    "client_request_id",
    "attempt",
    "model",
    "original_model",
    "node_id",
    "score",
    "scores_breakdown",
    "candidates",
    "excluded_nodes",
    "status",
    "latency_ms",
    "time_to_first_token_ms",
    "queue_ms",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "retry_count",
    "fallback_used",
    "client_ip",
    "original_format",
    "kind",
    "principal",
    "user",
    "error_message",
    "finish_reason",
    "estimated_tokens",
    "tags",
    "router_id",
    "agent_version",
    "timestamp",
)
JSON_COLUMNS: Final = ("scores_breakdown", "candidates", "excluded_nodes", "tags")
MAX_CANDIDATES: Final = 8
MAX_EXCLUDED: Final = 64
MAX_LISTED: Final = 1_000

#: Columns that are fields of the trace as they stand; in the statement they come before the JSON columns.
_PLAIN: Final = tuple(name for name in COLUMNS if name in Trace._fields and name not in JSON_COLUMNS)
_plain: Final = itemgetter(*map(Trace._fields.index, _PLAIN))
#: SQLite itself allows more; this bounds the memory of the prepared statements.
_MAX_STATEMENT_ROWS: Final = 128


def _upsert(rows: int) -> str:
    """Many rows are one statement: between two rows of `executemany` the interpreter's lock changes hands.

    A row that has ended stays ended: a late or repeated `started` changes nothing.
    """
    values = f"({', '.join('?' * len(COLUMNS))})"
    changes = (f"{name} = excluded.{name}" for name in COLUMNS if name not in ("request_id", "attempt"))
    return f"""
INSERT INTO request_traces ({", ".join(_PLAIN + JSON_COLUMNS)}) VALUES {", ".join([values] * rows)}
ON CONFLICT (request_id, attempt) DO UPDATE SET {", ".join(changes)}
WHERE excluded.status <> 'started' OR request_traces.status = 'started'
"""


#: Of few sizes, so that each is prepared once and kept: the powers of two.
_UPSERTS: Final = {
    1 << power: _upsert(1 << power) for power in reversed(range(_MAX_STATEMENT_ROWS.bit_length()))
}

_NEWEST: Final = (
    f"SELECT {', '.join(COLUMNS)} FROM request_traces ORDER BY timestamp DESC, attempt DESC LIMIT ?"
)
_OF_REQUEST: Final = (
    f"SELECT {', '.join(COLUMNS)} FROM request_traces WHERE request_id = ? ORDER BY attempt DESC LIMIT ?"
)
_PRUNE: Final = """
DELETE FROM request_traces WHERE rowid IN (
    SELECT rowid FROM request_traces WHERE timestamp < ? ORDER BY timestamp LIMIT ?
)
"""


def write_batch(connection: sqlite3.Connection, rows: Sequence[Trace]) -> None:
    """Write the rows inside the caller's transaction. An end replaces its start, row for row."""
    allowed = connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER) // len(COLUMNS)
    done = 0
    for size, statement in _UPSERTS.items():
        if size > allowed:
            continue
        while len(rows) - done >= size:
            some = rows[done : done + size]
            connection.execute(statement, tuple(chain.from_iterable(map(_values, some))))
            done += size


def list_traces(
    connection: sqlite3.Connection, limit: int, request_id: str | None
) -> list[dict[str, object]]:
    """Newest first; JSON columns as values. At most 1,000 rows."""
    limit = max(0, min(limit, MAX_LISTED))
    if request_id is None:
        cursor = connection.execute(_NEWEST, (limit,))
    else:
        cursor = connection.execute(_OF_REQUEST, (request_id, limit))
    return [_decoded(dict(zip(COLUMNS, row, strict=True))) for row in cursor]


def mark_interrupted(connection: sqlite3.Connection) -> int:
    """Close what an earlier run left open; to be called at the start, before this run writes its first row.

    By order and not by time: only one router runs on a data folder, so whatever is open now was cut off.
    """
    return connection.execute(
        "UPDATE request_traces SET status = 'interrupted',"
        " error_message = COALESCE(error_message, 'The router stopped before this attempt ended.')"
        " WHERE status = 'started'"
    ).rowcount


def prune(connection: sqlite3.Connection, before_wall_s: float, at_most: int = 5_000) -> int:
    """Delete rows that started before then, the oldest first and not too many at once; how many it was."""
    count = connection.execute(_PRUNE, (before_wall_s, at_most)).rowcount
    if count:
        connection.execute("PRAGMA incremental_vacuum").fetchall()
    return count


def as_row(trace: Trace) -> dict[str, object]:
    """The same dictionary that `list_traces` gives for the row, made without a database."""
    row: dict[str, object] = {name: getattr(trace, name, None) for name in COLUMNS}
    row["scores_breakdown"] = None if trace.card is None else _breakdown(trace.card)
    row["candidates"] = [[card.node_id, card.total, list(card.by_signal)] for card in _best(trace)]
    row["excluded_nodes"] = _excluded(trace)
    row["tags"] = list(trace.tags)
    return row


def _values(trace: Trace) -> tuple[object, ...]:
    """`_PLAIN`, then `JSON_COLUMNS`."""
    card, candidates, excluded, tags = trace.card, _best(trace), trace.excluded, trace.tags
    plain: tuple[object, ...] = _plain(trace)
    return (
        *plain,
        None if card is None else orjson.dumps(_breakdown(card)).decode(),
        orjson.dumps([(card.node_id, card.total, card.by_signal) for card in candidates]).decode(),
        orjson.dumps(_excluded(trace)).decode() if excluded else "{}",
        orjson.dumps(tags).decode() if tags else "[]",
    )


def _breakdown(card: ScoreCard) -> dict[str, float]:
    return dict(zip(SIGNALS, card.by_signal, strict=True))


def _best(trace: Trace) -> Sequence[ScoreCard]:
    return trace.candidates[:MAX_CANDIDATES]


def _excluded(trace: Trace) -> Mapping[str, str]:
    return {exclusion.node_id: exclusion.reason for exclusion in trace.excluded[:MAX_EXCLUDED]}


def _decoded(row: dict[str, object]) -> dict[str, object]:
    for name in JSON_COLUMNS:
        value = row[name]
        if isinstance(value, str):
            row[name] = orjson.loads(value)
    row["fallback_used"] = bool(row["fallback_used"])
    return row
