"""`herd traces` and `herd explain`: what happened to requests, and why they went where they did.

Both ask the router, and read the database themselves when no router answers, so the past of a router that is
down can be looked at. With `--json`: `{"traces": [row, ...]}` as /dashboard/api/traces gives them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from herd.console.client import base_url, command, complain, get, print_json
from herd.console.tables import Column, clean, table, terminal_width, write
from herd.errors import HerdError, NotReachable
from herd.scheduling.eligibility import REASONS, Reason
from herd.trace import SIGNALS
from herd.web import human, overview
from herd_node.runtime.clock import SystemClock
from herd_node.runtime.paths import DataDir

Row = dict[str, Any]

_TRACES = (
    Column("TIME"),
    Column("REQUEST"),
    Column("TRY", right=True),
    Column("MODEL", flexible=True),
    Column("NODE", flexible=True),
    Column("STATUS"),
    Column("SCORE", right=True, spare=True),
    Column("QUEUE", right=True, spare=True),
    Column("FIRST", right=True, spare=True),
    Column("TOTAL", right=True),
    Column("TOK/S", right=True),
)
_CANDIDATES = (
    Column("node", flexible=True),
    *(Column(signal, right=True) for signal in SIGNALS),
    Column("total", right=True),
)
_EXCLUDED = (Column("excluded", flexible=True), Column("reason"), Column("meaning", flexible=True))
#: What a degraded node loses beside the seven signals (docs/scheduling.md §2).
_DEGRADED_POINTS = 10.0
_ROUNDING_POINTS = 0.5


@command
def run_traces(args: argparse.Namespace) -> int:
    """The newest attempts, the newest first."""
    rows = _rows(args, limit=args.limit)
    if args.json:
        print_json({"traces": rows})
        return 0
    now_wall_s = SystemClock().wall_s()
    lines = [
        (t.age, t.request_id, str(t.attempt), _served(t), t.node, t.status, t.score, t.queue, t.first_token,
         t.latency, t.rate)
        for t in overview.traces(rows, now_wall_s)
    ]  # fmt: skip
    write(table(_TRACES, lines, terminal_width()) if lines else ["No request has been made yet."])
    return 0


#: `explain last` looks for a request that was scored among so many rows.
_LAST_OF = 100


@command
def run_explain(args: argparse.Namespace) -> int:
    """One request, attempt by attempt: the signals of the best nodes, and who was left out for what."""
    request_id = args.request_id
    if request_id == "last":
        # A `show` is a look-up without a choice to explain, and clients send one before every chat.
        newest = [row for row in _rows(args, limit=_LAST_OF) if row["kind"] != "show"]
        if not newest:
            raise HerdError("No request has been made yet.")
        request_id = newest[0]["request_id"]
    attempts = sorted(_rows(args, request_id=request_id), key=lambda row: row["attempt"])
    if not attempts:
        raise HerdError(f"No request {request_id} is known; the ids stand in `traces`.")
    if args.json:
        print_json({"traces": attempts})
        return 0
    lines = _request(attempts[-1])
    for row in attempts:
        lines += ["", *_attempt(row)]
    write(lines)
    return 0


def _rows(args: argparse.Namespace, *, limit: int | None = None, request_id: str | None = None) -> list[Row]:
    """From the router; from its database when no router answers."""
    wanted: dict[str, str | int] = {}
    if limit is not None:
        wanted["limit"] = limit
    if request_id is not None:
        wanted["request_id"] = request_id
    try:
        answer = get(args, f"/dashboard/api/traces?{urlencode(wanted)}")
    except NotReachable as unreachable:
        return _from_database(args, unreachable, limit or 1_000, request_id)
    rows = answer.get("traces") if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        raise HerdError(f"What answers at {base_url(args)} is not a herd router.")
    return rows


def _from_database(
    args: argparse.Namespace, unreachable: NotReachable, limit: int, request_id: str | None
) -> list[Row]:
    # Here and not above: only a router that is down makes SQLite worth importing.
    import sqlite3

    from herd.store.database import DatabaseUnusable, open_read_only
    from herd.store.traces import list_traces

    path = DataDir(Path(args.data_dir)).database_file
    if not path.exists():
        raise unreachable
    try:
        with closing(open_read_only(path)) as connection:
            rows = list_traces(connection, limit, request_id)
    except DatabaseUnusable as error:
        raise HerdError(
            f"No router answers at {base_url(args)}, and its database helps no further: {error}"
        ) from error
    except sqlite3.Error as error:
        raise HerdError(
            f"No router answers at {base_url(args)}, and {path} cannot be read: {error}."
        ) from error
    complain(f"No router answers at {base_url(args)}; this is from {path}.")
    return rows


def _served(trace: overview.TraceSummary) -> str:
    return f"{trace.model} (for {trace.asked})" if trace.asked else trace.model


def _request(row: Row) -> list[str]:
    """What was asked, once for all attempts."""
    lines = [f"request {row['request_id']}  {overview.utc(row['timestamp'])}"]
    lines.append(f"{row['original_format']} {row['kind']}, model {row['original_model']}")
    if row.get("estimated_tokens"):  # a look at a model (show) has no prompt
        lines[-1] += f", about {row['estimated_tokens']:.0f} prompt tokens"
    if row.get("client_request_id"):
        lines.append(f"the caller's own id: {row['client_request_id']}")
    if row.get("tags"):
        lines.append(f"tags: {', '.join(map(str, row['tags']))}")
    return [clean(line) for line in lines]


def _attempt(row: Row) -> list[str]:
    where = f" on {row['node_id']}" if row.get("node_id") else ""
    served = f", served {row['model']} instead of {row['original_model']}" if row.get("fallback_used") else ""
    lines = [
        f"attempt {row['attempt']}{where}: {row['status']}{served}",
        f"  {_times(row)}",
        f"  {_tokens(row)}",
    ]
    if row.get("error_message"):
        lines.append(f"  {row['error_message']}")
    return [*map(clean, lines), *_candidates(row), *_excluded(row)]


def _times(row: Row) -> str:
    return (
        f"score {human.number(row.get('score'))}, queue {human.duration_ms(row.get('queue_ms'))},"
        f" first token {human.duration_ms(row.get('time_to_first_token_ms'))},"
        f" total {human.duration_ms(row.get('latency_ms'))}"
    )


def _tokens(row: Row) -> str:
    counts = (row.get("prompt_tokens"), row.get("cached_tokens"), row.get("completion_tokens"))
    prompt, cached, completion = map(human.text, counts)
    rate = human.number(overview.tokens_per_s(row))
    return f"{prompt} prompt tokens ({cached} cached), {completion} completion tokens, {rate} tokens/s"


def _candidates(row: Row) -> list[str]:
    """The eight best as a table, the chosen one starred; points lost beside the seven are explained."""
    candidates: Sequence[tuple[str, float, list[float]]] = row.get("candidates") or ()
    if not candidates:
        return []
    rows = [
        (
            f"*{node_id}" if node_id == row.get("node_id") else node_id,
            *map(human.number, signals),
            human.number(total),
        )
        for node_id, total, signals in candidates
    ]
    lines = ["", *table(_CANDIDATES, rows, terminal_width())]
    for node_id, total, signals in candidates:
        if abs(sum(signals) - total - _DEGRADED_POINTS) < _ROUNDING_POINTS:
            lines.append(
                clean(
                    f"{node_id} was degraded (late with its heartbeats): {_DEGRADED_POINTS:.0f} points off."
                )
            )
    return lines


def _excluded(row: Row) -> list[str]:
    excluded: dict[str, str] = row.get("excluded_nodes") or {}
    if not excluded:
        return []
    rows = [(node_id, reason, _meaning(reason)) for node_id, reason in sorted(excluded.items())]
    return ["", *table(_EXCLUDED, rows, terminal_width())]


def _meaning(reason: str) -> str:
    try:
        return REASONS[Reason(reason)].sentence
    except ValueError:  # written by a newer version
        return human.UNKNOWN
