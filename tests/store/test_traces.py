"""Rows of request_traces: a contract with everybody who queries the file."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.store.database import Database, migrate, migrations
from herd.store.nodes import load_models, save_models
from herd.store.rates import load_rates, save_rates
from herd.store.reports import latencies
from herd.store.traces import (
    COLUMNS,
    list_traces,
    mark_interrupted,
    prune,
)
from herd.trace import SIGNALS, Exclusion, ScoreCard, Status, Trace
from tests.samples import WALL_S, as_row, started, trace, write_batch

LAST = (
    "SELECT request_id, model, node_id, score, scores_breakdown FROM request_traces"
    " ORDER BY timestamp DESC LIMIT 1"
)
AVERAGES = (
    "SELECT node_id, model, COUNT(*) n, ROUND(AVG(latency_ms)/1000.0,1),"
    " ROUND(AVG(COALESCE(completion_tokens,0)*1000.0/NULLIF(latency_ms,0)),1) FROM request_traces"
    " WHERE status='completed' GROUP BY node_id, model HAVING n > 10"
)


@pytest.fixture
def conn() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection, migrations())
    yield connection
    connection.close()


def test_the_table_has_the_documented_columns_in_order(conn: sqlite3.Connection) -> None:
    assert tuple(row[1] for row in conn.execute("PRAGMA table_info(request_traces)")) == COLUMNS


def test_every_field_of_a_trace_has_its_column() -> None:
    serialised_otherwise = {"card": "scores_breakdown", "excluded": "excluded_nodes"}
    assert {serialised_otherwise.get(name, name) for name in Trace._fields} == set(COLUMNS)


def test_every_column_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "traces.md").read_text("utf-8")
    assert [name for name in COLUMNS if f"| `{name}` |" not in text] == []
    assert LAST in text
    assert AVERAGES in text


def test_a_row_reads_as_it_was_put(conn: sqlite3.Connection) -> None:
    write_batch(conn, [trace()])
    (row,) = list_traces(conn, 10, None)
    assert row == as_row(trace())
    assert row["scores_breakdown"] == dict(
        zip(SIGNALS, (50.0, 20.0, 0.0, -3.5, 15.0, 10.0, 15.0), strict=True)
    )
    assert row["candidates"] == [
        ["den", 106.5, [50.0, 20.0, 0.0, -3.5, 15.0, 10.0, 15.0]],
        ["attic", 69.0, [20.0, 20.0, -1.0, -2.0, 7.0, 10.0, 15.0]],
    ]
    assert row["excluded_nodes"] == {"laptop": "offline"}
    assert row["tags"] == ["home"]
    assert row["fallback_used"] is False


def test_what_is_not_known_is_null_in_the_file(conn: sqlite3.Connection) -> None:
    write_batch(conn, [trace(user=None, cached_tokens=None, score=None, card=None)])
    kinds = (
        "typeof(user), typeof(cached_tokens), typeof(score), typeof(scores_breakdown), typeof(fallback_used)"
    )
    (row,) = conn.execute(f"SELECT {kinds} FROM request_traces").fetchall()
    assert row == ("null", "null", "null", "null", "integer")


def test_a_breakdown_stands_in_the_order_of_the_signals(conn: sqlite3.Connection) -> None:
    card = ScoreCard("}", 28.0, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0))
    write_batch(conn, [trace(card=card, candidates=(card,))])
    (row,) = list_traces(conn, 10, None)
    assert isinstance(row["scores_breakdown"], dict)
    assert list(row["scores_breakdown"].items()) == list(zip(SIGNALS, card.by_signal, strict=True))
    assert row["candidates"] == [["}", 28.0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]]


def test_a_row_without_a_choice_has_no_breakdown(conn: sqlite3.Connection) -> None:
    write_batch(
        conn, [trace(card=None, candidates=(), excluded=(), score=None, node_id=None, status="rejected")]
    )
    (row,) = list_traces(conn, 10, None)
    assert (row["scores_breakdown"], row["candidates"], row["excluded_nodes"]) == (None, [], {})


@pytest.mark.parametrize("variables", [999, 250_000])
def test_a_batch_of_any_size_is_written_whole_and_in_order(conn: sqlite3.Connection, variables: int) -> None:
    conn.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, variables)
    ids = [f"{i:024x}" for i in range(300)]
    write_batch(conn, [])
    write_batch(conn, [started(i) for i in ids] + [trace(i, timestamp=WALL_S + 1) for i in ids[:299]])
    rows = {row["request_id"]: row for row in list_traces(conn, 1_000, None)}
    assert len(rows) == 300
    assert [rows[i]["status"] for i in ids] == ["completed"] * 299 + ["started"]
    assert rows[ids[7]] == as_row(trace(ids[7], timestamp=WALL_S + 1))


WORDS = st.sampled_from([None, "x", "日本", ""])
TRACES = st.builds(
    lambda **fields: trace(**fields),
    status=st.sampled_from(get_args(Status)),
    model=st.sampled_from(["a", "b"]),
    node_id=WORDS,
    client_request_id=WORDS,
    user=WORDS,
    error_message=WORDS,
    finish_reason=WORDS,
    agent_version=WORDS,
    retry_count=st.integers(0, 2),
    fallback_used=st.booleans(),
    latency_ms=st.none() | st.floats(0, 1e6),
    cached_tokens=st.none() | st.integers(0, 9),
    excluded=st.sampled_from([(), (Exclusion("laptop", "offline"),)]),
    tags=st.sampled_from([(), ("home",)]),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(TRACES, max_size=90))
def test_every_row_of_a_batch_reads_as_it_was_put(made: list[Trace]) -> None:
    made = [one._replace(request_id=f"{i:024x}") for i, one in enumerate(made)]
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        migrate(conn, migrations())
        write_batch(conn, made)
        read = {row["request_id"]: row for row in list_traces(conn, 1_000, None)}
    assert read == {one.request_id: as_row(one) for one in made}


def test_the_table_takes_the_words_for_a_status_and_no_other(conn: sqlite3.Connection) -> None:
    write_batch(conn, [trace(f"{i:024x}", status=word) for i, word in enumerate(get_args(Status))])
    assert {row["status"] for row in list_traces(conn, 10, None)} == set(get_args(Status))
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        write_batch(conn, [trace(status="lost")])


def test_an_end_takes_the_place_of_its_start(conn: sqlite3.Connection) -> None:
    write_batch(conn, [started()])
    assert [row["status"] for row in list_traces(conn, 10, None)] == ["started"]
    write_batch(conn, [trace()])
    (row,) = list_traces(conn, 10, None)
    assert row == as_row(trace())


def test_a_late_start_does_not_reopen_what_has_ended(conn: sqlite3.Connection) -> None:
    write_batch(conn, [trace(), started()])
    write_batch(conn, [started()])
    assert [row["status"] for row in list_traces(conn, 10, None)] == ["completed"]


def test_the_eight_best_and_sixty_four_excluded_are_kept(conn: sqlite3.Connection) -> None:
    cards = tuple(ScoreCard(f"n{i}", 0.0, (0.0,) * 7) for i in range(12))
    out = tuple(Exclusion(f"x{i:03}", "offline") for i in range(100))
    write_batch(conn, [trace(candidates=cards, excluded=out)])
    (row,) = list_traces(conn, 10, None)
    assert isinstance(row["candidates"], list)
    assert isinstance(row["excluded_nodes"], dict)
    assert [card[0] for card in row["candidates"]] == [f"n{i}" for i in range(8)]
    assert list(row["excluded_nodes"]) == [f"x{i:03}" for i in range(64)]


def test_rows_come_newest_first_and_no_more_than_asked(conn: sqlite3.Connection) -> None:
    write_batch(conn, [trace(f"{i:024x}", timestamp=WALL_S + (i * 7) % 10) for i in range(10)])
    stamps = [row["timestamp"] for row in list_traces(conn, 4, None)]
    assert stamps == [WALL_S + 9, WALL_S + 8, WALL_S + 7, WALL_S + 6]
    assert list_traces(conn, -1, None) == []


def test_one_request_can_be_asked_for(conn: sqlite3.Connection) -> None:
    write_batch(conn, [trace("b" * 24), trace(attempt=1, status="retried"), trace(attempt=2)])
    assert [row["attempt"] for row in list_traces(conn, 10, "a" * 24)] == [2, 1]
    assert list_traces(conn, 10, "c' OR 1=1 --") == []


def test_what_an_earlier_run_left_open_becomes_interrupted(conn: sqlite3.Connection) -> None:
    write_batch(conn, [started("b" * 24, timestamp=WALL_S + 10**6), trace()])
    assert mark_interrupted(conn) == 1
    statuses = {row["request_id"]: row["status"] for row in list_traces(conn, 10, None)}
    assert statuses == {"a" * 24: "completed", "b" * 24: "interrupted"}


def test_old_rows_go_the_oldest_first_and_not_all_at_once(conn: sqlite3.Connection) -> None:
    write_batch(conn, [trace(f"{i:024x}", timestamp=WALL_S + i) for i in range(10)])
    assert prune(conn, WALL_S + 6, at_most=4) == 4
    assert prune(conn, WALL_S + 6, at_most=4) == 2
    assert prune(conn, WALL_S + 6) == 0
    assert [row["timestamp"] for row in list_traces(conn, 10, None)] == [WALL_S + i for i in (9, 8, 7, 6)]


async def test_both_statements_of_the_docs_run_unchanged_in_the_sqlite3_program(tmp_path: Path) -> None:
    program = shutil.which("sqlite3")
    if program is None:
        pytest.skip("THE sqlite3 PROGRAM IS MISSING (apt install sqlite3): the documented SQL was not run")
    path = tmp_path / "latency.db"
    db = Database.open(path, WALL_S)
    rows = [trace(f"{i:024x}", timestamp=WALL_S + i, latency_ms=1000.0 + 100 * i) for i in range(11)]
    other = [trace(f"{i:024x}", node_id="attic") for i in range(100, 110)]
    await db.write(lambda conn: write_batch(conn, [*rows, *other, started("f" * 24)]))

    def ask(sql: str) -> str:  # beside the router, as people do it
        return subprocess.run(
            [program, path, sql], capture_output=True, text=True, check=True, timeout=20
        ).stdout

    *columns, breakdown = ask(LAST).strip().split("|")
    assert columns == [f"{10:024x}", "llama3.2:3b", "den", "106.5"]
    assert list(json.loads(breakdown)) == list(SIGNALS)
    rate = sum(80_000 / (1000 + 100 * i) for i in range(11)) / 11
    assert ask(AVERAGES).strip() == f"den|llama3.2:3b|11|1.5|{rate:.1f}"
    await db.close()


def test_percentiles_are_values_that_occurred(conn: sqlite3.Connection) -> None:
    rows = [
        trace(f"{i:024x}", latency_ms=float(i), time_to_first_token_ms=None if i % 2 else float(i))
        for i in range(1, 101)
    ]
    slow = trace("e" * 24, node_id="attic", latency_ms=7.0, time_to_first_token_ms=None)
    old = trace("d" * 24, timestamp=WALL_S - 10**6, latency_ms=10**6)
    failed = trace("c" * 24, status="failed", latency_ms=10**6)
    write_batch(conn, [*rows, slow, old, failed])
    attic, den = latencies(conn, WALL_S - 3600)
    assert attic == ("attic", "llama3.2:3b", 1, 7.0, 7.0, 7.0, None, None)
    assert den == ("den", "llama3.2:3b", 100, 50.0, 75.0, 95.0, 50.0, 96.0)


def test_what_a_node_lists_replaces_what_it_listed(conn: sqlite3.Connection) -> None:
    save_models(conn, "den", ["a", "b"], WALL_S)
    save_models(conn, "attic", ["b", "b", "日本"], WALL_S)
    assert load_models(conn) == {
        "a": frozenset({"den"}),
        "b": frozenset({"den", "attic"}),
        "日本": frozenset({"attic"}),
    }
    save_models(conn, "den", [], WALL_S)
    assert load_models(conn) == {"b": frozenset({"attic"}), "日本": frozenset({"attic"})}


def test_rates_are_loaded_as_they_were_saved(conn: sqlite3.Connection) -> None:
    save_rates(conn, [("den", "m", "step_s", 0.02), ("", "m", "out_tokens", 150.0)], WALL_S)
    save_rates(conn, [("den", "m", "step_s", 0.03)], WALL_S + 1)
    assert sorted(load_rates(conn)) == [("", "m", "out_tokens", 150.0), ("den", "m", "step_s", 0.03)]
