"""From values to rows, beside the requests: one queue in memory, one writer, batches.

A request puts its trace here and goes on; it never waits and never sees an error of the database. What is
queued is keyed by attempt, so a start whose end comes before its batch is written becomes one row, ended; its
Trace need never be made (`put_start`). An end is made a row at once: its cards are at hand then, and need not
live until the batch. The queue is bounded: with the database away for long, starts go before ends.

Durability (docs/traces.md): a row is handed to SQLite at most 100 ms after `put`, which leaves 150 ms of the
promised 250 for the commit. `close` writes everything.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Final

from herd.store import traces
from herd.store.database import Database
from herd.store.traces import Row
from herd.trace import Trace
from herd_node.runtime.clock import Clock

logger = logging.getLogger(__name__)

Job = Callable[[sqlite3.Connection], object]
#: Makes the row of an attempt that has begun, if somebody wants it before the attempt ends. It cannot fail.
Start = Callable[[], Trace]
_Key = tuple[str, int]

BATCH_ROWS: Final = 512
BATCH_WAIT_S: Final = 0.1
RETRY_S: Final = 5.0
MAX_QUEUED: Final = 10_000
MAX_JOBS: Final = 1_000
RECENT_ROWS: Final = 1_000


class TraceWriter:
    """The only writer of the database while the router runs. Used from the event loop alone."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._started: dict[_Key, Start] = {}
        self._ended: dict[_Key, Row] = {}
        self._taken: dict[_Key, Row] = {}  # ends in the database's hands; they are queued until it says so
        self._jobs: deque[Job] = deque(maxlen=MAX_JOBS)
        self._recent: deque[Row] = deque(maxlen=RECENT_ROWS)  # the last that were written
        self._filled = asyncio.Event()
        self._writing = asyncio.Lock()
        self._written = 0
        self._dropped = 0
        self._last_error: str | None = None

    def put(self, trace: Trace) -> None:
        """Queue a start or an end. Never blocks, never fails."""
        if trace.status == "started":
            self.put_start(trace.request_id, trace.attempt, lambda: trace)
            return
        key = trace[:2]
        self._started.pop(key, None)
        row = self._row(trace)
        if row is not None:
            self._ended[key] = row
            self._queue_grew()

    def put_start(self, request_id: str, attempt: int, start: Start) -> None:
        """Queue a start as what makes its row; most are replaced by their end and never called."""
        key = (request_id, attempt)
        if key in self._ended or key in self._taken:  # a row that has ended stays ended
            return
        self._started[key] = start
        self._queue_grew()

    def submit(self, job: Job) -> None:
        """Queue other work for the same writer (learned rates, what nodes list), a transaction each."""
        self._jobs.append(job)
        self._filled.set()

    async def run(self) -> None:
        """Write for ever. Ends only by cancellation; whatever is queued then is `close`'s to write."""
        while True:
            await self._filled.wait()
            await self._clock.sleep(BATCH_WAIT_S if self._last_error is None else RETRY_S)
            await self.flush()

    async def flush(self) -> bool:
        """Write what is queued now. False when the database did not take it: it stays queued."""
        async with self._writing:
            if not await self._write_traces():
                return False
            for _ in range(len(self._jobs)):
                if not await self._write_job():
                    return False
            if not self._queued() and not self._jobs:
                self._filled.clear()
            return True

    async def close(self) -> None:
        """Write everything. Call it when nobody puts any more; `run` may have been cancelled before."""
        while self._queued() or self._jobs:
            if not await self.flush():
                logger.error("the database took no more; %d trace rows of this run are lost", self._queued())
                return

    async def latest(self, limit: int, request_id: str | None = None) -> list[dict[str, object]]:
        """Rows for people, newest first: from the database, and from memory while that is away."""
        if self._last_error is None:
            try:
                return await self._database.read(lambda conn: traces.list_traces(conn, limit, request_id))
            except sqlite3.Error as error:
                logger.warning("traces cannot be read from the database: %s", error)
        return self.recent(limit, request_id)

    def recent(self, limit: int, request_id: str | None = None) -> list[dict[str, object]]:
        """The newest 1,000 rows of this run, from memory, in the form of `list_traces`."""
        rows = {traces.key_of(row): row for row in self._recent}
        rows |= self._taken
        rows |= self._ended
        rows |= {key: row for key, _, row in self._starts(request_id)}
        newest = traces.newest_first(rows.values())[:RECENT_ROWS]
        wanted = [row for row in newest if request_id is None or traces.key_of(row)[0] == request_id]
        return [traces.as_listed(row) for row in wanted[: max(0, limit)]]

    def stats(self) -> dict[str, int | str | None]:
        """Counters since the start, and the error that stands now, if any."""
        return {
            "written": self._written,
            "dropped": self._dropped,
            "queue": self._queued(),
            "last_error": self._last_error,
        }

    def _queued(self) -> int:
        return len(self._started) + len(self._ended) + len(self._taken)

    def _queue_grew(self) -> None:
        queued = len(self._started) + len(self._ended) + len(self._taken)
        if queued <= 1:  # while more is queued it has been set
            self._filled.set()
        elif queued > MAX_QUEUED:
            self._drop_one()

    def _drop_one(self) -> None:
        rows = self._started or self._ended
        del rows[next(iter(rows))]
        self._dropped += 1

    def _row(self, trace: Trace) -> Row | None:
        try:
            return traces.row_of(trace)
        except Exception:
            self._dropped += 1
            logger.exception("trace row %s/%d is given up", trace.request_id, trace.attempt)
            return None

    def _starts(self, request_id: str | None = None) -> list[tuple[_Key, Start, Row]]:
        """The starts that wait to be written, made rows; of one request, if it is given."""
        made = []
        for key, start in list(self._started.items()):
            if request_id is not None and key[0] != request_id:
                continue
            row = self._row(start())
            if row is None:
                del self._started[key]
            else:
                made.append((key, start, row))
        return made

    async def _write_traces(self) -> bool:
        starts = self._starts()
        self._taken, self._ended = self._ended, {}
        # Ends first: they are worth more.
        rows = [*self._taken.values(), *(row for _, _, row in starts)]
        done = 0
        try:
            while done < len(rows):
                batch = rows[done : done + BATCH_ROWS]
                if not await self._attempt(partial(traces.write_rows, rows=batch), batch):
                    return False
                done += len(batch)
                self._recent.extend(batch)
            return True
        finally:
            self._settle(starts, done)

    def _settle(self, starts: Sequence[tuple[_Key, Start, Row]], done: int) -> None:
        """So many rows are the database's now. The rest is queued as before, what came since behind it."""
        for key, start, _ in starts[: max(0, done - len(self._taken))]:
            if self._started.get(key) is start:  # else it has ended meanwhile
                del self._started[key]
        left = dict(islice(self._taken.items(), done, None))
        self._taken = {}
        if left:
            self._ended = left | self._ended
            while self._queued() > MAX_QUEUED:
                self._drop_one()

    async def _write_job(self) -> bool:
        job = self._jobs[0]
        if not await self._attempt(job, ()):
            return False
        if self._jobs and self._jobs[0] is job:
            self._jobs.popleft()
        return True

    async def _attempt(self, job: Job, rows: Sequence[Row]) -> bool:
        """False when the database is away, so that everything is kept and tried again."""
        try:
            await self._database.write(job)
        except Exception as error:
            # 1. Locked, full, unreachable, damaged: nothing to do with what was to be written.
            if _database_away(error):
                self._failed(error)
                return False
            # 2. What was to be written is at fault; it must not stop what stands behind it.
            if rows:
                return await self._salvage(rows)
            logger.exception("work for the database failed and is given up")
        else:
            self._written += len(rows)
        self._recovered()
        return True

    async def _salvage(self, rows: Sequence[Row]) -> bool:
        """One row that SQLite cannot take spoils its batch: write the others, count that one as dropped."""
        for row in rows:
            try:
                await self._database.write(partial(traces.write_rows, rows=[row]))
                self._written += 1
            except Exception as error:
                if _database_away(error):
                    self._failed(error)
                    return False
                self._dropped += 1
                logger.exception("trace row %s/%d is given up", *traces.key_of(row))
        self._recovered()
        return True

    def _failed(self, error: Exception) -> None:
        if self._last_error is None:
            logger.error("the database takes no rows (%s); they are kept and tried again every 5 s", error)
        self._last_error = str(error)

    def _recovered(self) -> None:
        if self._last_error is not None:
            logger.warning("the database takes rows again; %d were dropped meanwhile", self._dropped)
            self._last_error = None


def _database_away(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError
