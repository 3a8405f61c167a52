"""The writer between requests and the database: nothing is lost, nothing is written twice, nobody waits."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.proxy import trace_writer
from herd.proxy.trace_writer import TraceWriter
from herd.store.database import Database
from herd.store.rates import load_rates, save_rates
from herd.store.traces import list_traces
from herd.trace import Trace
from herd_node.runtime.clock import ManualClock
from tests.samples import WALL_S, as_row, started, trace


def name(i: int) -> str:
    return f"{i:024x}"


async def rows_of(db: Database) -> dict[tuple[object, object], dict[str, object]]:
    rows = await db.read(lambda conn: list_traces(conn, 1_000, None))
    found = {(row["request_id"], row["attempt"]): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database.open(tmp_path / "latency.db", WALL_S)
    yield opened
    await opened.close()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def writer(db: Database, clock: ManualClock) -> TraceWriter:
    return TraceWriter(db, clock)


@pytest.fixture
async def running(writer: TraceWriter) -> AsyncIterator[TraceWriter]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(writer.run())
        yield writer
        task.cancel()


@pytest.fixture
def locked(db: Database) -> sqlite3.Connection:
    """Somebody else holds the write lock; the busy timeout is cut short so that no test waits for it."""
    db.write_now(lambda conn: None)
    assert db.path is not None
    other = sqlite3.connect(db.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other


async def impatient(db: Database) -> None:
    def shorten(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA busy_timeout = 1")

    await db.read(lambda conn: None)
    await asyncio.get_running_loop().run_in_executor(db._write_thread, shorten, db._connection)


async def written(writer: TraceWriter, db: Database, count: int) -> None:
    """Until the loop has written: the clock stands still, so only the database's thread is waited for."""
    while writer.stats()["written"] != count:
        await db.read(lambda conn: None)


async def test_a_row_is_written_within_200_ms(running: TraceWriter, db: Database, clock: ManualClock) -> None:
    running.put(trace())
    await clock.until_sleeping()
    assert await rows_of(db) == {}
    clock.advance(0.2)
    await written(running, db, 1)
    assert await rows_of(db) == {("a" * 24, 1): as_row(trace())}


async def test_an_end_before_the_batch_is_written_makes_one_row(writer: TraceWriter, db: Database) -> None:
    writer.put(started())
    writer.put(trace())
    assert writer.stats()["queue"] == 1
    await writer.flush()
    assert writer.stats() == {"written": 1, "dropped": 0, "queue": 0, "last_error": None}
    assert [row["status"] for row in (await rows_of(db)).values()] == ["completed"]


async def test_the_row_of_a_start_is_made_only_when_it_is_wanted(writer: TraceWriter, db: Database) -> None:
    made: list[str] = []

    def start(request_id: str) -> Trace:
        made.append(request_id)
        return started(request_id)

    for i in range(3):
        writer.put_start(name(i), 1, partial(start, name(i)))
    writer.put(trace(name(0)))
    writer.put_start(name(0), 1, partial(start, name(0)))  # too late: it has ended
    assert [row["status"] for row in writer.recent(9, name(0))] == ["completed"]
    assert made == []
    assert [row["status"] for row in writer.recent(9, name(1))] == ["started"]
    assert made == [name(1)]
    writer.put(trace(name(1)))
    await writer.flush()
    assert made == [name(1), name(2)]
    statuses = [(await rows_of(db))[name(i), 1]["status"] for i in range(3)]
    assert statuses == ["completed", "completed", "started"]


async def test_an_end_that_comes_while_its_start_is_being_written_is_not_lost(
    writer: TraceWriter, db: Database
) -> None:
    writer.put(started())
    async with asyncio.TaskGroup() as group:
        group.create_task(writer.flush())
        await asyncio.sleep(0)  # the start is with the database's thread now
        writer.put(trace())
    await writer.flush()
    assert [row["status"] for row in (await rows_of(db)).values()] == ["completed"]


async def test_a_row_that_changes_while_it_is_being_written_is_written_again(
    writer: TraceWriter, db: Database
) -> None:
    writer.put(trace(status="retried"))
    async with asyncio.TaskGroup() as group:
        group.create_task(writer.flush())
        await asyncio.sleep(0)  # with the database's thread now
        writer.put(trace(status="failed"))
    await writer.flush()
    assert [row["status"] for row in (await rows_of(db)).values()] == ["failed"]


async def test_what_a_cancelled_write_held_is_written_by_close(writer: TraceWriter, db: Database) -> None:
    writer.put(trace())
    writer.put(started("b" * 24))
    flush = asyncio.get_running_loop().create_task(writer.flush())
    await asyncio.sleep(0)
    flush.cancel()
    await asyncio.wait([flush])
    assert writer.stats()["queue"] == 2
    await writer.close()
    assert len(await rows_of(db)) == 2


async def test_what_was_written_is_also_remembered(writer: TraceWriter) -> None:
    writer.put(started())
    await writer.flush()
    writer.put(trace())
    await writer.flush()
    assert writer.recent(9) == [as_row(trace())]


async def test_a_trace_that_cannot_be_made_a_row_is_given_up_and_disturbs_nobody(
    writer: TraceWriter, db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    writer.put(started("b" * 24, tags=("\ud800",)))
    writer.put(trace("c" * 24, tags=("\ud800",)))
    writer.put(trace())
    assert await writer.flush()
    assert {request_id for request_id, _ in await rows_of(db)} == {"a" * 24}
    assert writer.stats() == {"written": 1, "dropped": 2, "queue": 0, "last_error": None}
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


async def test_close_writes_everything_also_after_run_was_cancelled(
    writer: TraceWriter, db: Database, clock: ManualClock
) -> None:
    run = asyncio.get_running_loop().create_task(writer.run())
    for i in range(500):
        writer.put(started(name(i)))
    for i in range(0, 500, 2):
        writer.put(trace(name(i)))
    writer.submit(lambda conn: save_rates(conn, [("", "m", "out_tokens", 9.0)], WALL_S))
    await clock.until_sleeping()
    run.cancel()
    await writer.close()
    statuses = [row["status"] for row in (await rows_of(db)).values()]
    assert (statuses.count("completed"), statuses.count("started")) == (250, 250)
    assert await db.read(load_rates) == [("", "m", "out_tokens", 9.0)]


async def test_a_locked_database_loses_nothing_and_is_logged_once(
    running: TraceWriter,
    db: Database,
    clock: ManualClock,
    locked: sqlite3.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await impatient(db)
    caplog.set_level(logging.INFO)
    running.put(trace())
    await clock.until_sleeping()
    clock.advance(0.2)
    await clock.until_sleeping()  # the first try has failed, and the loop waits for the next
    assert running.stats()["last_error"] == "database is locked"
    assert running.stats()["queue"] == 1
    assert [row["request_id"] for row in await running.latest(10)] == ["a" * 24]
    clock.advance(4.9)
    assert clock.sleeping == 1
    clock.advance(0.2)
    await clock.until_sleeping()
    locked.execute("ROLLBACK")
    locked.close()
    clock.advance(5.0)
    await written(running, db, 1)
    assert len(await rows_of(db)) == 1
    assert running.stats() == {"written": 1, "dropped": 0, "queue": 0, "last_error": None}
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


async def test_close_gives_up_on_a_database_that_stays_locked(
    writer: TraceWriter, db: Database, locked: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    await impatient(db)
    writer.put(trace())
    await writer.close()
    locked.close()
    assert "1 trace rows of this run are lost" in caplog.text


async def test_a_full_queue_drops_the_oldest_starts_first(
    writer: TraceWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_writer, "MAX_QUEUED", 4)
    for i in range(2):
        writer.put(trace(name(i)))
        writer.put(started(name(10 + i)))
    writer.put(trace(name(2)))
    assert list(writer._started) == [(name(11), 1)]
    writer.put(trace(name(3)))
    writer.put(trace(name(4)))
    assert [request_id for request_id, _ in writer._ended] == [name(1), name(2), name(3), name(4)]
    assert writer.stats()["dropped"] == 3


async def test_what_a_failed_write_gives_back_keeps_the_queue_within_its_bound(
    writer: TraceWriter, db: Database, locked: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await impatient(db)
    monkeypatch.setattr(trace_writer, "MAX_QUEUED", 4)
    for i in range(4):
        writer.put(trace(name(i)))
    async with asyncio.TaskGroup() as group:
        flush = group.create_task(writer.flush())
        await asyncio.sleep(0)
        writer.put(trace(name(4)))  # five now: the newest goes, the others are out of reach
        assert writer.stats()["queue"] == 4
    assert not flush.result()
    assert [request_id for request_id, _ in writer._ended] == [name(i) for i in range(4)]
    locked.close()
    assert await writer.flush()
    assert len(await rows_of(db)) == 4


@pytest.mark.parametrize(
    "spoilt",
    [
        trace("b" * 24, prompt_tokens=2**80),
        trace("b" * 24, error_message="\ud800"),
        trace("b" * 24, kind=None),
    ],
)
async def test_one_row_that_sqlite_cannot_take_spoils_no_other(
    writer: TraceWriter, db: Database, spoilt: Trace
) -> None:
    writer.put(trace())
    writer.put(spoilt)
    writer.put(trace("c" * 24))
    await writer.flush()
    assert {request_id for request_id, _ in await rows_of(db)} == {"a" * 24, "c" * 24}
    assert writer.stats() == {"written": 2, "dropped": 1, "queue": 0, "last_error": None}


async def test_work_that_fails_is_given_up_and_the_next_is_done(writer: TraceWriter, db: Database) -> None:
    def broken(connection: sqlite3.Connection) -> None:
        save_rates(connection, [("", "m", "out_tokens", 1.0)], WALL_S)
        raise ValueError("broken")

    writer.submit(broken)
    writer.submit(lambda conn: save_rates(conn, [("", "n", "out_tokens", 2.0)], WALL_S))
    assert await writer.flush()
    assert await db.read(load_rates) == [("", "n", "out_tokens", 2.0)]


async def test_recent_rows_are_the_newest_first_and_a_thousand_at_most(writer: TraceWriter) -> None:
    for i in range(1_200):
        writer.put(trace(name(i), timestamp=WALL_S + i))
    assert [row["request_id"] for row in writer.recent(2)] == [name(1199), name(1198)]
    assert len(writer.recent(5_000)) == 1_000
    assert writer.recent(9, name(0)) == []
    assert [row["request_id"] for row in writer.recent(9, name(1000))] == [name(1000)]


Event = tuple[str, int]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["start", "end", "flush", "lock", "unlock"]), st.integers(0, 5))))
def test_whatever_the_order_every_attempt_has_its_last_row_exactly_once(events: list[Event]) -> None:
    async def play() -> None:
        db = Database.open(Path(":nowhere:") / "x", WALL_S)  # in memory: hundreds of runs
        writer = TraceWriter(db, ManualClock())
        wanted: dict[tuple[str, int], str] = {}
        for event, i in events:
            if event == "start" and (name(i), 1) not in wanted:
                writer.put(started(name(i)))
                wanted[name(i), 1] = "started"
            elif event == "end":
                writer.put(trace(name(i)))
                wanted[name(i), 1] = "completed"
            elif event == "flush":
                await writer.flush()
            elif event in ("lock", "unlock"):
                value = int(event == "lock")
                await asyncio.get_running_loop().run_in_executor(
                    db._write_thread, db._connection.execute, f"PRAGMA query_only = {value}"
                )
        await asyncio.get_running_loop().run_in_executor(
            db._write_thread, db._connection.execute, "PRAGMA query_only = 0"
        )
        await writer.close()
        assert {key: row["status"] for key, row in (await rows_of(db)).items()} == wanted
        assert writer.stats()["dropped"] == 0
        await db.close()

    asyncio.run(play())
