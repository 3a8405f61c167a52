"""The SQLite file: opened once, checked, migrated; one writer connection in one thread, a reader in another.

Why threads of our own and not aiosqlite: what is written arrives as functions over a connection, a whole
transaction at a time, so one executor with one worker is all the machinery there is. A page's read never
waits for a write (WAL), and neither ever runs on the event loop.

The router starts whatever the file looks like: `Database.open` never raises. A damaged file, or one of
another program, is set aside under another name; a newer or unreachable one is left alone and the database
lives in memory for this run. `notice` says so in one sentence.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

from herd.errors import HerdError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

APPLICATION_ID: Final = 0x68657264
BUSY_TIMEOUT_MS: Final = 5_000
JOURNAL_LIMIT_BYTES: Final = 64 * 1024 * 1024

#: Of a new file: a page takes five rows, and the log half as many writes as with SQLite's own 4,096.
PAGE_BYTES: Final = 8_192
#: KiB of pages that a connection keeps. Rows are written at the table's end, so more would only be memory.
_CACHE: Final = "PRAGMA cache_size = -512"

#: docs/traces.md "Durability". WAL with NORMAL keeps every commit through a crash of the process.
_WRITER_PRAGMAS: Final = (
    _CACHE,
    "PRAGMA synchronous = NORMAL",
    "PRAGMA wal_autocheckpoint = 1000",
    f"PRAGMA journal_size_limit = {JOURNAL_LIMIT_BYTES}",
    # else each batch makes and removes a file of its own, with what would undo a statement of many rows
    "PRAGMA temp_store = MEMORY",
    # The CHECK on `status` builds a table of eight words for each row, a third of what a row costs SQLite.
    # What this connection writes is a `Status`, whose words a test holds equal to the table's.
    "PRAGMA ignore_check_constraints = ON",
    "PRAGMA foreign_keys = ON",
    "PRAGMA trusted_schema = OFF",
)

#: A database in memory must not grow for as long as the router runs.
_KEEP_FEW: Final = """
CREATE TEMP TRIGGER keep_few AFTER INSERT ON request_traces BEGIN
    DELETE FROM request_traces WHERE rowid <= NEW.rowid - 1000;
END
"""

Trouble = Literal["damaged", "foreign", "newer", "unavailable"]


class DatabaseUnusable(HerdError):
    """The file cannot serve as our database. `trouble` decides what becomes of it."""

    def __init__(self, trouble: Trouble, reason: str) -> None:
        super().__init__(reason)
        self.trouble: Trouble = trouble


class Migration(NamedTuple):
    """One numbered step forward."""

    version: int
    sql: str


class Database:
    """The open database. Make it with `open`; `close` it when nothing more will be written."""

    def __init__(self, connection: sqlite3.Connection, path: Path | None, notice: str | None) -> None:
        self.path = path
        self.notice = notice
        self._connection = connection
        self._reader: sqlite3.Connection | None = None
        self._closed = False
        self._write_thread = ThreadPoolExecutor(1, thread_name_prefix="herd-db-writer")
        self._read_thread = ThreadPoolExecutor(1, thread_name_prefix="herd-db-reader")

    @classmethod
    def open(cls, path: Path, now_wall_s: float) -> Database:
        """Open or make the file; never raises. Synchronous: called once, before anything is served."""
        try:
            return cls(_open_file(path), path, None)
        except DatabaseUnusable as error:
            first = error
        if first.trouble in ("newer", "unavailable"):
            return cls._in_memory(f"{first} Traces of this run are kept in memory only.")
        # Damaged, or another program's: set it aside and begin anew.
        try:
            aside = _set_aside(path, first.trouble, now_wall_s)
            return cls(
                _open_file(path), path, f"{first} It was set aside as {aside.name} and a new one was begun."
            )
        except (DatabaseUnusable, OSError) as error:
            return cls._in_memory(
                f"{first} It could not be replaced ({error}). Traces are kept in memory only."
            )

    @classmethod
    def _in_memory(cls, notice: str) -> Database:
        connection = _connect(":memory:")
        migrate(connection, migrations())
        connection.execute(_KEEP_FEW)
        return cls(connection, None, notice)

    def write_now(self, work: Work[T]) -> T:
        """Run `work` in a transaction, here and now: for the start and for tests, not on a running loop."""
        return self._write_thread.submit(self._transaction, work).result()

    async def write(self, work: Work[T]) -> T:
        """Run `work` in one transaction on the writer thread. Raises what `work` or SQLite raises."""
        return await asyncio.get_running_loop().run_in_executor(self._write_thread, self._transaction, work)

    async def read(self, work: Work[T]) -> T:
        """Run `work` on a connection that cannot write, beside the writer."""
        if self.path is None:  # a database in memory has one connection
            return await self.write(work)
        return await asyncio.get_running_loop().run_in_executor(self._read_thread, self._read, work)

    async def close(self) -> None:
        """Close both connections after what was already handed in; the log is folded into the file."""
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._read_thread, self._close_reader)
        await loop.run_in_executor(self._write_thread, self._connection.close)
        self._read_thread.shutdown(wait=False)
        self._write_thread.shutdown(wait=False)

    def _transaction(self, work: Work[T]) -> T:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return result

    def _read(self, work: Work[T]) -> T:
        if self._reader is None:
            assert self.path is not None
            self._reader = open_read_only(self.path)
        return work(self._reader)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def open_read_only(path: Path) -> sqlite3.Connection:
    """A connection that can only read: for pages, and for the commands when the router is down.

    Raises DatabaseUnusable when there is no such file, or it is not ours, or it is newer than this program.
    """
    if not path.is_file():
        raise DatabaseUnusable("unavailable", f"There is no database at {path}.")
    try:
        connection = _connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    try:
        connection.execute("PRAGMA query_only = ON")
        connection.execute(_CACHE)
        _check_ours(connection, path)
        if _pragma(connection, "user_version") == 0:
            raise DatabaseUnusable("unavailable", f"The database {path} is still empty.")
    except sqlite3.Error as error:
        connection.close()
        raise _unusable(path, error) from error
    except DatabaseUnusable:
        connection.close()
        raise
    return connection


def migrations() -> tuple[Migration, ...]:
    """The numbered steps that lie beside this module, in order."""
    folder = resources.files("herd.store") / "migrations"
    files = sorted(
        (item for item in folder.iterdir() if item.name.endswith(".sql")), key=lambda item: item.name
    )
    return tuple(Migration(int(item.name[:4]), item.read_text("utf-8")) for item in files)


def migrate(connection: sqlite3.Connection, steps: tuple[Migration, ...]) -> None:
    """Bring the schema up to date, one transaction a step: a step that fails leaves nothing of itself."""
    done = _pragma(connection, "user_version")
    for step in steps:
        if step.version <= done:
            continue
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{step.sql}\nPRAGMA user_version = {step.version};\nCOMMIT;"
            )
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _open_file(path: Path) -> sqlite3.Connection:
    """The writer's connection. Raises DatabaseUnusable, and then has left the contents as they were."""
    try:
        _make_private(path)
        connection = _connect(str(path))
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, error) from error
    try:
        _check_ours(connection, path)
        # Only while the file is empty: later they would need a VACUUM (retention frees pages by the second).
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise DatabaseUnusable(
                "unavailable", f"The database {path} cannot use a write-ahead log ({mode})."
            )
        for pragma in _WRITER_PRAGMAS:
            connection.execute(pragma)
        migrate(connection, migrations())
    except sqlite3.Error as error:
        connection.close()
        raise _unusable(path, error) from error
    except DatabaseUnusable:
        connection.close()
        raise
    return connection


def _connect(target: str, *, uri: bool = False) -> sqlite3.Connection:
    # isolation_level None: transactions are ours, never begun behind our back.
    # check_same_thread off: opened here, then used by one worker thread alone.
    return sqlite3.connect(
        target, uri=uri, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False
    )


def _check_ours(connection: sqlite3.Connection, path: Path) -> None:
    """1. Damaged: the first read fails. 2. Tables without our mark: foreign. 3. Newer than we know."""
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and _pragma(connection, "application_id") != APPLICATION_ID:
        raise DatabaseUnusable("foreign", f"The database {path} was made by another program.")
    version, known = _pragma(connection, "user_version"), migrations()[-1].version
    if version > known:
        raise DatabaseUnusable(
            "newer", f"The database {path} has version {version}, newer than this program's {known}."
        )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _unusable(path: Path, error: Exception) -> DatabaseUnusable:
    """Locked, full, read-only, no folder: OperationalError, the file is fine. Else its contents are not."""
    if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
        return DatabaseUnusable("damaged", f"The database {path} is damaged ({error}).")
    return DatabaseUnusable("unavailable", f"The database {path} cannot be used ({error}).")


def _make_private(path: Path) -> None:
    """Make the file if need be, readable by its owner alone; SQLite gives -wal and -shm the same mode."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    if sys.platform != "win32" and path.stat().st_mode & 0o077:
        path.chmod(0o600)


def _set_aside(path: Path, trouble: Trouble, now_wall_s: float) -> Path:
    """Rename the file, its log first: a log that stays behind would be played into the new file."""
    word = "corrupt" if trouble == "damaged" else "other"
    stamp = datetime.fromtimestamp(now_wall_s, UTC).strftime("%Y%m%dT%H%M%SZ")
    aside = path.with_name(f"{path.name}.{word}-{stamp}")
    for suffix in ("-wal", "-shm", ""):
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.replace(aside.with_name(aside.name + suffix))
    logger.warning("set the database aside", extra={"path": str(path), "aside": str(aside), "why": trouble})
    return aside
