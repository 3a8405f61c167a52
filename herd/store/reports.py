"""Aggregates of `request_traces` for people. The planner uses none of them (docs/scheduling.md says why)."""

from __future__ import annotations

import sqlite3
from typing import Final, NamedTuple


class Latency(NamedTuple):
    """Completed attempts of one model on one node. Percentiles by nearest rank: values that occurred."""

    node_id: str
    model: str
    completed_count: int
    p50_ms: float
    p75_ms: float
    p95_ms: float
    first_token_p50_ms: float | None
    first_token_p95_ms: float | None


_LATENCIES: Final = """
WITH ended AS (
    SELECT node_id, model, latency_ms, time_to_first_token_ms AS first_ms FROM request_traces
    WHERE status = 'completed' AND latency_ms IS NOT NULL AND node_id IS NOT NULL AND timestamp >= ?
), ranked AS (
    SELECT node_id, model, latency_ms, first_ms,
        COUNT(*) OVER pair AS n,
        ROW_NUMBER() OVER (pair ORDER BY latency_ms) AS place,
        COUNT(first_ms) OVER pair AS first_n,
        ROW_NUMBER() OVER (pair ORDER BY first_ms NULLS LAST) AS first_place
    FROM ended WINDOW pair AS (PARTITION BY node_id, model)
)
SELECT node_id, model, MAX(n),
    MIN(CASE WHEN place >= 0.50 * n THEN latency_ms END),
    MIN(CASE WHEN place >= 0.75 * n THEN latency_ms END),
    MIN(CASE WHEN place >= 0.95 * n THEN latency_ms END),
    MIN(CASE WHEN first_place >= 0.50 * first_n THEN first_ms END),
    MIN(CASE WHEN first_place >= 0.95 * first_n THEN first_ms END)
FROM ranked GROUP BY node_id, model ORDER BY node_id, model
"""


def latencies(connection: sqlite3.Connection, since_wall_s: float) -> list[Latency]:
    """p50, p75 and p95 per (node, model) over the completed attempts that started since then."""
    return [Latency(*row) for row in connection.execute(_LATENCIES, (since_wall_s,))]
