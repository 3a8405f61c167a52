"""The file itself: made private, checked, migrated; and what happens when it is not what it should be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from herd.store import database
from herd.store.database import (
    PAGE_BYTES,
    Database,
    DatabaseUnusable,
    Migration,
    migrate,
    migrations,
    open_read_only,
)
from herd.store.traces import list_traces
from tests.samples import WALL_S, trace, write_batch


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    return tmp_path / "latency.db"


@pytest.fixture
async def db(path: Path) -> AsyncIterator[Database]:
    opened = Database.open(path, WALL_S)
    yield opened
    await opened.close()


async def put_one(db: Database) -> None:
    await db.write(lambda conn: write_batch(conn, [trace()]))


def pragma(connection: sqlite3.Connection, name: str) -> object:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


async def test_the_pragmas_are_those_of_the_durability_page(db: Database) -> None:
    def look(connection: sqlite3.Connection) -> dict[str, object]:
        names = "journal_mode busy_timeout wal_autocheckpoint journal_size_limit foreign_keys trusted_schema"
        return {name: pragma(connection, name) for name in names.split()}

    assert await db.write(look) == {
        "journal_mode": "wal",
        "busy_timeout": 5000,
        "wal_autocheckpoint": 1000,
        "journal_size_limit": 64 * 1024 * 1024,
        "foreign_keys": 1,
        "trusted_schema": 0,
    }
    assert await db.write(lambda conn: pragma(conn, "synchronous")) == 1  # NORMAL
    assert await db.write(lambda conn: pragma(conn, "temp_store")) == 2  # MEMORY
    assert await db.write(lambda conn: pragma(conn, "ignore_check_constraints")) == 1  # of the writer alone
    assert await db.read(lambda conn: pragma(conn, "ignore_check_constraints")) == 0
    assert db.notice is None


async def test_a_file_with_other_pages_is_used_as_it_is(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as older:
        older.execute("PRAGMA page_size = 4096")
        older.execute("PRAGMA journal_mode = WAL")
        migrate(older, migrations())
    db = Database.open(path, WALL_S)
    await db.write(lambda conn: write_batch(conn, [trace()]))
    assert await db.read(lambda conn: pragma(conn, "page_size")) == 4096
    assert len(await db.read(lambda conn: list_traces(conn, 10, None))) == 1
    assert db.notice is None
    await db.close()
    newer = Database.open(path.with_name("newer.db"), WALL_S)
    assert await newer.write(lambda conn: pragma(conn, "page_size")) == PAGE_BYTES
    await newer.close()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
async def test_nobody_else_may_read_the_file_or_its_log(path: Path) -> None:
    path.touch(mode=0o644)
    path.chmod(0o644)
    old_mask = os.umask(0)
    try:
        db = Database.open(path, WALL_S)
        await put_one(db)
        modes = {item.name: stat.S_IMODE(item.stat().st_mode) for item in path.parent.iterdir()}
        await db.close()
    finally:
        os.umask(old_mask)
    assert modes == {"latency.db": 0o600, "latency.db-wal": 0o600, "latency.db-shm": 0o600}


async def test_what_was_written_is_there_after_a_restart(path: Path) -> None:
    first = Database.open(path, WALL_S)
    await put_one(first)
    await first.close()
    second = Database.open(path, WALL_S)
    assert [row["request_id"] for row in await second.read(lambda c: list_traces(c, 9, None))] == ["a" * 24]
    await second.close()


async def test_after_close_everything_is_in_the_one_file(db: Database, path: Path) -> None:
    await put_one(db)
    await db.close()
    assert [item.name for item in path.parent.iterdir()] == ["latency.db"]


async def test_a_write_that_fails_leaves_nothing(db: Database) -> None:
    def half(connection: sqlite3.Connection) -> None:
        write_batch(connection, [trace()])
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        await db.write(half)
    assert await db.read(lambda conn: list_traces(conn, 9, None)) == []
    await put_one(db)


async def test_a_page_cannot_write(db: Database) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        await db.read(lambda conn: conn.execute("DELETE FROM request_traces"))


async def test_a_page_reads_while_somebody_writes(db: Database, path: Path) -> None:
    await put_one(db)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert len(await db.read(lambda conn: list_traces(conn, 9, None))) == 1
    other.execute("ROLLBACK")
    other.close()


async def test_a_file_that_is_no_database_is_set_aside(path: Path) -> None:
    path.write_bytes(b"no database at all, but long enough to look like one " * 100)
    db = Database.open(path, WALL_S)
    await put_one(db)
    aside = path.with_name("latency.db.corrupt-20260921T141320Z")
    assert aside.read_bytes().startswith(b"no database at all")
    assert db.notice is not None
    assert "damaged" in db.notice
    assert aside.name in db.notice
    assert db.path == path
    await db.close()


async def test_a_database_of_another_program_is_set_aside_unharmed(path: Path) -> None:
    theirs = sqlite3.connect(path)
    theirs.execute("CREATE TABLE request_traces (something TEXT)")
    theirs.commit()
    theirs.close()
    before = path.read_bytes()
    db = Database.open(path, WALL_S)
    await put_one(db)
    await db.close()
    assert path.with_name("latency.db.other-20260921T141320Z").read_bytes() == before
    assert db.notice is not None
    assert "another program" in db.notice


async def test_a_newer_database_is_left_alone_and_this_run_lives_in_memory(db: Database, path: Path) -> None:
    await db.close()
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 999")
    newer.commit()
    newer.close()
    before = path.read_bytes()

    again = Database.open(path, WALL_S)
    await put_one(again)
    rows = await again.read(lambda conn: list_traces(conn, 9, None))
    await again.close()
    assert len(rows) == 1
    assert again.path is None
    assert again.notice is not None
    assert "999" in again.notice
    assert path.read_bytes() == before


async def test_a_folder_that_cannot_be_used_means_memory_and_a_notice(tmp_path: Path) -> None:
    db = Database.open(tmp_path / "nowhere" / "latency.db", WALL_S)
    await put_one(db)
    assert db.notice is not None
    assert "memory" in db.notice
    await db.close()


async def test_a_database_in_memory_keeps_the_newest_thousand(tmp_path: Path) -> None:
    db = Database.open(tmp_path / "nowhere" / "latency.db", WALL_S)
    rows = [trace(f"{i:024x}", timestamp=WALL_S + i) for i in range(1_200)]
    await db.write(lambda conn: write_batch(conn, rows))
    kept = await db.read(lambda conn: conn.execute("SELECT request_id FROM request_traces").fetchall())
    await db.close()
    assert {name for (name,) in kept} == {f"{i:024x}" for i in range(200, 1_200)}


def test_a_migration_that_fails_leaves_the_version_before_it() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    good = Migration(1, "CREATE TABLE one (a);")
    bad = Migration(2, "CREATE TABLE two (a); CREATE TABLE one (a);")
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, (good, bad))
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]
    assert tables == ["one"]
    assert pragma(connection, "user_version") == 1
    migrate(connection, (good, Migration(2, "CREATE TABLE two (a);")))
    assert pragma(connection, "user_version") == 2
    connection.close()


def test_migrations_are_numbered_without_a_gap() -> None:
    steps = database.migrations()
    assert [step.version for step in steps] == list(range(1, len(steps) + 1))


async def test_reading_without_a_router_needs_no_router_and_changes_nothing(db: Database, path: Path) -> None:
    await put_one(db)
    await db.close()
    before = path.read_bytes()
    connection = open_read_only(path)
    assert len(list_traces(connection, 9, None)) == 1
    connection.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"rubbish " * 1000])
def test_reading_a_file_that_is_not_ours_says_why(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatabaseUnusable, match=r"latency\.db"):
        open_read_only(path)


@pytest.mark.slow
def test_what_a_killed_router_left_in_its_log_can_be_read_and_is_kept(path: Path) -> None:
    program = (
        "import os, sys, pathlib\n"
        "from herd.store.database import Database\n"
        "from tests.samples import trace, write_batch\n"
        "db = Database.open(pathlib.Path(sys.argv[1]), 0.0)\n"
        "db.write_now(lambda conn: write_batch(conn, [trace()]))\n"
        "os._exit(9)\n"
    )
    repository = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", program, path], cwd=repository, timeout=30, check=False)
    assert run.returncode == 9
    assert path.with_name("latency.db-wal").stat().st_size > 0
    connection = open_read_only(path)
    assert len(list_traces(connection, 9, None)) == 1
    connection.close()
    again = Database.open(path, WALL_S)
    assert len(again.write_now(lambda conn: list_traces(conn, 9, None))) == 1
    asyncio.run(again.close())
