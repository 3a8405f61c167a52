"""What is written down of one request: its slot, its rows, and what the registry learns. No I/O, no decision.

Exactly one row of a request ends with a terminal status (docs/traces.md), whatever happens to it; and a slot
that was taken is given back exactly once.
"""

from __future__ import annotations

import asyncio
from functools import partial

from herd.dialects import Ending
from herd.errors import ApiError
from herd.fleet.registry import AttemptResult, Registry
from herd.proxy import records
from herd.proxy.calls import Peers
from herd.proxy.records import Sent
from herd.proxy.slots import Granted, WaitingRoom
from herd.proxy.trace_writer import TraceWriter
from herd.request import InferenceRequest
from herd.scheduling.plan import Reject
from herd.trace import ENDED, Status, Trace
from herd_node.runtime.clock import Clock

#: How long a slot may count as taken after its request was cancelled: Ollama finishes the batch in work;
#: a llama-server is believed busy until its own report says otherwise, at most so long (docs/backends.md).
_SETTLE_S = {"ollama": 2.5, "llama-server": 120.0, "llama-router": 120.0}


class Books:
    """Where it is written down; the same for all requests of a router."""

    __slots__ = ("clock", "peers", "registry", "room", "router_id", "traces")

    def __init__(
        self, registry: Registry, room: WaitingRoom, traces: TraceWriter, clock: Clock, router_id: str
    ) -> None:
        self.registry = registry
        self.peers = Peers(registry)
        self.room = room
        self.traces = traces
        self.clock = clock
        self.router_id = router_id


class Ledger:
    """Of one request."""

    __slots__ = ("_books", "_request", "first_record_s", "last_row", "rows", "sent")

    def __init__(self, books: Books, request: InferenceRequest) -> None:
        self._books = books
        self._request = request
        self.rows = 0
        """Attempts that were begun."""
        self.sent: Sent | None = None
        """The attempt in work."""
        self.first_record_s: float | None = None
        self.last_row: Trace | None = None

    @property
    def never_sent(self) -> bool:
        """It has no row yet, or only the one that says it waits."""
        return self.last_row is None or self.rows == 0

    def begin(self, granted: Granted) -> Sent:
        """An attempt begins."""
        step, books, request = granted.step, self._books, self._request
        peer = books.peers.of(step.node_id)
        self.first_record_s = None
        sent = self.sent = Sent(
            step,
            granted.token,
            peer,
            granted.backend_kind,
            granted.cold,
            peer.agent_version,
            books.clock.now_s(),
            books.clock.wall_s(),
            self.rows,
            granted.shown,
        )
        self.rows += 1
        # Most attempts end before their batch is written: then this row is never made.
        start = partial(records.started, request, sent, self.rows, books.router_id)
        books.traces.put_start(request.request_id, self.rows, start)
        return sent

    def content(self) -> None:
        """The first words are here. A whole answer does not tell when that was: it is `completed` at once."""
        sent, now_s = self.sent, self._books.clock.now_s()
        assert sent is not None
        self.first_record_s = now_s
        if sent.token is not None:
            self._books.registry.first_record(sent.token, now_s)
        if sent.cold:
            self._books.room.wake()

    def completed(self, ending: Ending) -> None:
        """The whole answer is here: record, learn, free the slot."""
        sent, first_s, now_s = self.sent, self.first_record_s, self._books.clock.now_s()
        assert sent is not None
        ttft_s = None if first_s is None else first_s - sent.started_s
        status: Status = "no_output" if ending.no_output else "completed"
        self._put(
            records.trace(
                self._request,
                sent,
                status,
                self.rows,
                self._books.router_id,
                now_s,
                ttft_s,
                ending,
                None,
                None,
            )
        )
        total_s = now_s - sent.started_s
        self._free(records.result(sent, ending, ttft_s, total_s, self._request.est_tokens), now_s)

    def failed(self, status: Status, error: ApiError | None, *, cancelled: bool) -> None:
        """The attempt is over without a whole answer. `cancelled`: by us; the backend may still be busy."""
        now_s = self._books.clock.now_s()
        self._put(self._row(status, now_s, error=error))
        self._free(self._cancelled(now_s) if cancelled else self._cut_short(now_s), now_s)

    def waits(self) -> None:
        """It waits, or is held: from now on it has a row, which its first attempt will fill."""
        if self.last_row is None:
            self.record("started")

    def client_gone(self) -> None:
        if self.sent is None:
            self._end_between_attempts("client_gone", None)
        else:
            self.failed("client_gone", None, cancelled=True)

    def unexpected(self, error: BaseException) -> ApiError:
        """The router's own failure or its forced end: the slot must not leak, the row must not stay open."""
        stopped = isinstance(error, asyncio.CancelledError)
        status: Status = "interrupted" if stopped else "failed"
        why = ApiError("the router stopped" if stopped else "an internal error of the router")
        if self.sent is None:
            self._end_between_attempts(status, why)
        else:
            self.failed(status, why, cancelled=False)
        return why

    def given_up(self) -> None:
        """No other attempt follows the failed one: its row becomes the final one."""
        if self.last_row is not None and self.last_row.status == "retried":
            self._put(self.last_row._replace(status="failed"))

    @property
    def has_ended(self) -> bool:
        return self.sent is None and self.last_row is not None and self.last_row.status in ENDED

    def record(
        self,
        status: Status,
        *,
        ending: Ending | None = None,
        error: ApiError | None = None,
        reject: Reject | None = None,
    ) -> None:
        """One attempt's row as far as it is known."""
        self._put(self._row(status, self._books.clock.now_s(), ending, error, reject))

    def _row(
        self,
        status: Status,
        now_s: float,
        ending: Ending | None = None,
        error: ApiError | None = None,
        reject: Reject | None = None,
    ) -> Trace:
        sent, first_s = self.sent, self.first_record_s
        return records.trace(
            self._request,
            sent,
            status,
            self.rows or 1,
            self._books.router_id,
            now_s,
            None if sent is None or first_s is None else first_s - sent.started_s,
            ending,
            error,
            reject,
        )

    def _free(self, result: AttemptResult, now_s: float) -> None:
        """Give the slot back. Does nothing when there is none."""
        sent, self.sent = self.sent, None
        if sent is not None and sent.token is not None:
            self._books.registry.end_attempt(sent.token, now_s, outcome=result)
            self._books.room.wake()

    def _end_between_attempts(self, status: Status, error: ApiError | None) -> None:
        """The last attempt's row, or the request's own if it never had one, becomes the final one."""
        if self.last_row is None or self.rows == 0:
            self.record(status, error=error)
        elif self.last_row.status not in ENDED:
            self._put(self.last_row._replace(status=status))

    def _cut_short(self, now_s: float) -> AttemptResult:
        """An attempt that ended by itself, without a whole answer."""
        lived_s = now_s - self.sent.started_s if self.sent is not None else 0.0
        return AttemptResult(ok=False, total_s=lived_s)

    def _cancelled(self, now_s: float) -> AttemptResult:
        """An attempt that we end: before its first record the backend does not hear of it at once."""
        settle_s = 0.0
        if self.sent is not None and self.first_record_s is None:
            settle_s = _SETTLE_S.get(self.sent.backend_kind, 0.0)
        return self._cut_short(now_s)._replace(cancelled=True, settle_s=settle_s)

    def _put(self, row: Trace) -> None:
        self.last_row = row
        self._books.traces.put(row)
