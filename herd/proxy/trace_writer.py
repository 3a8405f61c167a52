"""From values to rows, off the hot path: one queue in memory, one writer, batches.

A request puts its trace here and goes on; it never waits, never sees an error of the database, and
serialises nothing. What is queued is keyed by attempt, so a start whose end comes before its batch is written
becomes one row, ended; its Trace need never be made (`put_start`). The queue is bounded: with the database
away for long, starts go before ends.

Durability (docs/traces.md): a row is handed to SQLite at most 100 ms after `put`, which leaves 150 ms of the
promised 250 for the commit. `close` writes everything.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice
from typing import Final

from herd.store import traces
from herd.store.database import Database
from herd.trace import Trace
from herd_node.runtime.clock import Clock

logger = logging.getLogger(__name__)

Job = Callable[[sqlite3.Connection], object]
#: Makes the row of an attempt that has begun, if somebody wants it before the attempt ends. It cannot fail.
Start = Callable[[], Trace]
_Key = tuple[str, int]

BATCH_ROWS: Final = 256
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
        self._started: OrderedDict[_Key, Trace | Start] = OrderedDict()
        self._ended: OrderedDict[_Key, Trace] = OrderedDict()
        self._jobs: deque[Job] = deque(maxlen=MAX_JOBS)
        self._recent: OrderedDict[_Key, Trace | Start] = OrderedDict()
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
        key = (trace.request_id, trace.attempt)
        self._remember(key, trace)
        self._started.pop(key, None)
        self._ended[key] = trace
        self._queue_grew()

    def put_start(self, request_id: str, attempt: int, start: Start) -> None:
        """Queue a start as what makes its row; most are replaced by their end and never called."""
        key = (request_id, attempt)
        if key in self._ended:  # a row that has ended stays ended
            return
        self._remember(key, start)
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
            batches = -(-self._queued() // BATCH_ROWS)
            for _ in range(batches):
                if not await self._write_batch():
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
        """The newest of the last 1,000 attempts of this run, from memory, in the form of `list_traces`."""
        wanted = [
            _made(row) for key, row in self._recent.items() if request_id is None or key[0] == request_id
        ]
        newest = sorted(wanted, key=lambda t: (t.timestamp, t.attempt), reverse=True)
        return [traces.as_row(trace) for trace in newest[: max(0, limit)]]

    def stats(self) -> dict[str, int | str | None]:
        """Counters since the start, and the error that stands now, if any."""
        return {
            "written": self._written,
            "dropped": self._dropped,
            "queue": self._queued(),
            "last_error": self._last_error,
        }

    def _queued(self) -> int:
        return len(self._started) + len(self._ended)

    def _queue_grew(self) -> None:
        if len(self._started) + len(self._ended) > MAX_QUEUED:
            self._drop_one()
        self._filled.set()

    def _remember(self, key: _Key, row: Trace | Start) -> None:
        self._recent[key] = row
        if len(self._recent) > RECENT_ROWS:
            self._recent.popitem(last=False)

    def _drop_one(self) -> None:
        (self._started or self._ended).popitem(last=False)
        self._dropped += 1

    async def _write_batch(self) -> bool:
        # Rows stay queued until they are written: a failure needs no way back, and an end that comes
        # meanwhile simply takes the place of its start. Ends first: they are worth more.
        batch = list(islice(chain(self._ended.items(), self._started.items()), BATCH_ROWS))
        rows = [_made(row) for _, row in batch]
        if not await self._attempt(partial(traces.write_batch, rows=rows), rows):
            return False
        for key, row in batch:
            if self._ended.get(key) is row:
                del self._ended[key]
            elif self._started.get(key) is row:
                del self._started[key]
        return True

    async def _write_job(self) -> bool:
        job = self._jobs[0]
        if not await self._attempt(job, ()):
            return False
        if self._jobs and self._jobs[0] is job:
            self._jobs.popleft()
        return True

    async def _attempt(self, job: Job, rows: Sequence[Trace]) -> bool:
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

    async def _salvage(self, rows: Sequence[Trace]) -> bool:
        """One row that SQLite cannot take spoils its batch: write the others, count that one as dropped."""
        for row in rows:
            try:
                await self._database.write(partial(traces.write_batch, rows=[row]))
                self._written += 1
            except Exception as error:
                if _database_away(error):
                    self._failed(error)
                    return False
                self._dropped += 1
                logger.exception("trace row %s/%d is given up", row.request_id, row.attempt)
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


def _made(row: Trace | Start) -> Trace:
    return row if isinstance(row, Trace) else row()


def _database_away(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError
