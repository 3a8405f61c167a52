"""`request_traces`: attempts in, attempts out. The columns are a contract (docs/traces.md).

What this costs is paid once an attempt, so `row_of` and `write_rows` are in longhand (docs/decisions/0015).
Nothing here may keep prompt text: a trace has none, and no column would take it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Final, cast

import orjson

from herd.trace import ScoreCard, Trace

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

#: An attempt as it is bound to the statement, in `_ORDER`. None may stand in it, a bool may not.
Row = tuple[object, ...]

#: So many fields of a trace are columns as they stand; what follows takes another form.
_PLAIN_COUNT: Final = Trace._fields.index("fallback_used")
_ORDER: Final = (*Trace._fields[:_PLAIN_COUNT], "fallback_used", *JSON_COLUMNS)
_when: Final = itemgetter(_ORDER.index("timestamp"), _ORDER.index("attempt"))
#: Rows a statement: few sizes, so that each is prepared once and kept; more would only cost memory.
_STATEMENT_ROWS: Final = (64, 16, 4, 1)
#: SQLite stores NaN as NULL. Binding None costs six times as much: sqlite3 looks for an adapter first.
_NULL: Final = float("nan")


def _upsert(rows: int) -> str:
    """Many rows are one statement: between two rows of `executemany` the interpreter's lock changes hands.

    A row that has ended stays ended: a late or repeated `started` changes nothing.
    """
    values = f"({', '.join('?' * len(COLUMNS))})"
    changes = (f"{name} = excluded.{name}" for name in COLUMNS if name not in ("request_id", "attempt"))
    return f"""
INSERT INTO request_traces ({", ".join(_ORDER)}) VALUES {", ".join([values] * rows)}
ON CONFLICT (request_id, attempt) DO UPDATE SET {", ".join(changes)}
WHERE excluded.status <> 'started' OR request_traces.status = 'started'
"""


_UPSERTS: Final = {rows: _upsert(rows) for rows in _STATEMENT_ROWS}
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


def write_rows(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Write the rows inside the caller's transaction. An end replaces its start, row for row."""
    allowed = connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER) // len(COLUMNS)
    done = 0
    for size, statement in _UPSERTS.items():
        if size > allowed:
            continue
        while len(rows) - done >= size:
            values = [_NULL if x is None else x for row in rows[done : done + size] for x in row]
            connection.execute(statement, values)
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


def row_of(trace: Trace) -> Row:
    """What is written of the trace; from here on it keeps no cards alive."""
    card, excluded, tags = trace.card, trace.excluded, trace.tags
    cards = trace.candidates[:MAX_CANDIDATES]
    if card is None:
        breakdown, listed = None, orjson.dumps(cards, default=tuple).decode()
    else:
        # One text, cut in two: the breakdown holds numbers alone, so the first brace that closes is its own.
        text = orjson.dumps((_breakdown(card), cards), default=tuple).decode()
        cut = text.index("}") + 1
        breakdown, listed = text[1:cut], text[cut + 1 : -1]
    left_out = {out.node_id: out.reason for out in excluded[:MAX_EXCLUDED]} if excluded else None
    last = (
        1 if trace.fallback_used else 0,
        breakdown,
        listed,
        orjson.dumps(left_out).decode() if left_out else "{}",
        orjson.dumps(tags).decode() if tags else "[]",
    )
    return trace[:_PLAIN_COUNT] + last


def key_of(row: Row) -> tuple[str, int]:
    """Request and attempt: what makes a row the same row."""
    return cast("tuple[str, int]", row[:2])


def newest_first(rows: Iterable[Row]) -> list[Row]:
    """In the order of `list_traces`."""
    return sorted(rows, key=_when, reverse=True)


def as_listed(row: Row) -> dict[str, object]:
    """The same dictionary that `list_traces` gives for the row, made without a database."""
    by_name = dict(zip(_ORDER, row, strict=True))
    return _decoded({name: by_name[name] for name in COLUMNS})


def _breakdown(card: ScoreCard) -> dict[str, float]:
    thermal, memory, queue, wait, role, trend, context = card.by_signal
    return {  # the order of SIGNALS, as a test says: in longhand it costs half
        "thermal": thermal,
        "memory_fit": memory,
        "queue_depth": queue,
        "wait_time": wait,
        "role_affinity": role,
        "availability_trend": trend,
        "context_fit": context,
    }


def _decoded(row: dict[str, object]) -> dict[str, object]:
    for name in JSON_COLUMNS:
        value = row[name]
        if isinstance(value, str):
            row[name] = orjson.loads(value)
    row["fallback_used"] = bool(row["fallback_used"])
    return row
