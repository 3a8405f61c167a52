"""Serving one request: get a slot, send, commit late, stream, retry elsewhere, record every attempt.

States of a request: admitted -> waiting -> attempt k -> committed -> end (docs/behaviour.md). Rules kept:
R-1 the head goes out with the first content record, or early and without a word of content where a stream is
silent for long; R-2 no other attempt after content, one error record instead; R-3 a non-streaming answer is
buffered and must be complete; R-4 an attempt is closed and its slot free before the next begins; R-5 at most
so many attempts over the whole chain (the planner counts); R-6 is the pool's. What a failure means stands in
`failures`, who is next is `herd.scheduling.plan`'s decision, what is written down `ledger`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable
from dataclasses import dataclass

from herd.dialects import Dialect, Ending, StreamWatch
from herd.dialects.base import has_error, with_status
from herd.errors import (
    ApiError,
    BackendRefused,
    BadRequest,
    ModelNotFound,
    NotOffered,
    Saturated,
    UpstreamFailed,
    UpstreamTimeout,
)
from herd.fleet.snapshot import DEFAULT_STATS
from herd.proxy import failures, heads
from herd.proxy.autopull import AutoPull
from herd.proxy.early import Early
from herd.proxy.failures import Effect, Failure
from herd.proxy.guard import Cause, Guard, Tripped, Watch
from herd.proxy.ledger import Books, Ledger
from herd.proxy.records import Sent
from herd.proxy.relaying import Relaying
from herd.proxy.sending import Failed, Sender, until_content
from herd.proxy.telling import Teller
from herd.request import InferenceRequest
from herd.scheduling.plan import NEW, Reject
from herd.trace import Status
from herd_node.net.exchange import ClientGone, Exchange
from herd_node.net.pool import PoolError, Upstream, UpstreamCut
from herd_node.protocol import jsonedit

_log = logging.getLogger(__name__)

_MAX_WHOLE_BYTES = 256 * 1024 * 1024
_BUSY_S = 2.0
_BAD_MODEL_S = 60.0
#: How long an upstream may take to end a body whose end mark has come.
_REST_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """docs/behaviour.md, "Deadlines". Seconds; built in `herd.app` from the settings."""

    first_record_s: float = 120.0
    cold_load_s: float = 300.0
    gap_s: float = 60.0
    gap_buffered_s: float = 120.0
    total_s: float = 1800.0
    write_s: float = 60.0
    early_sent_s: float = 15.0
    """Silence after which a stream that was sent to a node begins early (R-1)."""
    early_waiting_s: float = 30.0
    """The same while it waits for a busy node."""
    ping_s: float = 15.0
    progress_s: float = 2.0
    """Silence after which a stream is told what it waits for, where it wants to know; and how often then."""
    pull_wait_s: float = 30.0
    """How long a request that cannot be kept alive waits for its model to be pulled."""


class _Broken(Exception):
    """One attempt ended after content had reached the caller."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class Dispatcher:
    """Serves requests. Holds nothing of one request: that lives in `_Run`."""

    def __init__(
        self,
        *,
        books: Books,
        sender: Sender,
        pulls: AutoPull,
        deadlines: Deadlines,
        chance: random.Random,
        tell_all: bool = False,
    ) -> None:
        self.pulls = pulls
        self.tell_all = tell_all
        """Every stream is told what it waits for, asked for or not."""
        self.books = books
        self.sender = sender
        self.deadlines = deadlines
        self.chance = chance
        self.live: set[Guard] = set()
        self.watch = Watch(asyncio.get_running_loop())

    def handle(self, exchange: Exchange, request: InferenceRequest, dialect: Dialect) -> Awaitable[None]:
        """Answer one admitted request, whatever a node or its client does."""
        return _Run(self, exchange, request, dialect).serve()

    def drain(self) -> None:
        """End what still runs: streams get their error record, the rest a 503."""
        for guard in list(self.live):
            guard.trip("drain")


class _Run:
    """The life of one request."""

    __slots__ = (
        "dialect",
        "early",
        "exchange",
        "guard",
        "history",
        "last_failure",
        "ledger",
        "owner",
        "request",
        "silent",
        "upstream",
    )

    def __init__(
        self, owner: Dispatcher, exchange: Exchange, request: InferenceRequest, dialect: Dialect
    ) -> None:
        self.owner = owner
        self.exchange = exchange
        self.request = request
        self.dialect = dialect
        self.guard = Guard(owner.watch)
        self.ledger = Ledger(owner.books, request)
        self.history = NEW
        self.early: Early | None = None
        self.silent = True
        """What a stream waits for is not told: it gets pings, if anything."""
        self.upstream: Upstream | None = None
        self.last_failure: Failure | None = None

    async def serve(self) -> None:
        owner, guard, ledger = self.owner, self.guard, self.ledger
        owner.live.add(guard)
        try:
            with guard:
                guard.deadline("total", owner.deadlines.total_s, "total")
                self.exchange.on_gone(lambda: guard.trip("client_gone"))
                if self.request.stream:
                    await self._begun_early()
                else:
                    while await self._one():
                        pass
        except ClientGone:
            ledger.client_gone()
        except Tripped as tripped:
            await self._tripped(tripped.cause)
        except asyncio.CancelledError as error:
            ledger.unexpected(error)
            raise
        except Exception as error:  # noqa: BLE001 - logged; the caller gets a 500 with the request's own id
            _log.exception("unexpected error while serving %s", self.request.request_id)
            await self._answer_unexpected(ledger.unexpected(error))
        finally:
            owner.live.discard(guard)

    async def _begun_early(self) -> None:
        """The attempts of a stream, which begins before one of them succeeds if that takes long."""
        self.early = self._make_early()
        try:
            while await self._one():
                pass
        finally:
            await self._stop_early()
            self.early = None  # it holds this object: else only the garbage collector would free both

    async def _one(self) -> bool:
        """A slot and an attempt; whether another one is to follow."""
        self.guard.check()
        granted = await self.owner.books.room.acquire(self.request, self.history, self._note_waiting)
        if isinstance(granted, Reject):
            return await self._refused(granted)
        self.history = granted.history
        sent = self.ledger.begin(granted)
        trouble: Failure | _Broken
        try:
            if self.request.stream:
                await self._stream(sent)
            else:  # only the total deadline: the first byte comes last
                self.upstream = await self.owner.sender.send(self.request, sent)
                await self._whole(sent, self.upstream)
            return False
        except Failed as failed:
            trouble = failed.failure
        except PoolError as error:
            trouble = failures.broken(sent.peer.node_id, f"its answer broke off ({error})")
        except _Broken as broken:
            trouble = broken
        finally:
            if self.upstream is not None:
                self.upstream.close()
                self.upstream = None
        return await self._after(trouble)

    async def _after(self, trouble: Failure | _Broken) -> bool:
        """The attempt is closed; whether another one is to follow."""
        if isinstance(trouble, _Broken):
            await self._end_broken(trouble.error)
            return False
        await self._note_failure(trouble)
        if not trouble.elsewhere:
            await self._give_up(trouble.error)
        return trouble.elsewhere

    # -- one attempt -------------------------------------------------------------------------------------

    async def _stream(self, sent: Sent) -> None:
        """Send, read up to the first content record, and pass on what follows."""
        deadlines = self.owner.deadlines
        limit_s = deadlines.cold_load_s if sent.cold else deadlines.first_record_s
        if self.early is not None:
            self.early.expect(deadlines.early_sent_s if self.silent else deadlines.progress_s)
        try:
            with Guard(self.owner.watch) as silence:
                silence.deadline("first_record", limit_s, "first_record")
                upstream = self.upstream = await self.owner.sender.send(self.request, sent)
                kind = upstream.header(b"content-type") or b""
                watch = StreamWatch(self.dialect) if kind.startswith(self.dialect.stream_type) else None
                out = b"" if watch is None else await until_content(sent, upstream, watch)
        except Tripped as tripped:
            raise Failed(failures.too_late(sent.peer.node_id, limit_s)) from tripped
        await self._stop_early()
        if watch is not None:
            await self._relay(sent, upstream, watch, out)
        elif self.exchange.started:
            raise Failed(failures.broken(sent.peer.node_id, "its answer is no stream, which was asked for"))
        else:
            await self._whole(sent, upstream)

    async def _whole(self, sent: Sent, upstream: Upstream) -> None:
        """R-3: read all, make sure that it is complete, then answer."""
        node, request = sent.peer.node_id, self.request
        body = await upstream.read_all(_MAX_WHOLE_BYTES)
        ending = self.dialect.whole(request.route, body)
        if ending.how == "repeat_abort" and sent.backend_kind == "ollama":
            body = _ended_properly(body)
            ending = ending._replace(finish_reason="repeat_abort")
        elif ending.how == "error":
            raise Failed(failures.in_band(node, ending.message or "it reported an error"))
        elif ending.how != "complete":
            raise Failed(failures.broken(node, ending.message or "its answer is incomplete"))
        kind = upstream.header(b"content-type") or b"application/json"
        headers = heads.of_answer(request, sent, self.ledger.rows, kind, stream=False)
        self.ledger.completed(ending)
        self._writing()
        await self.exchange.respond(200, headers, body)

    async def _relay(self, sent: Sent, upstream: Upstream, watch: StreamWatch, out: bytes) -> None:
        """R-2: from here on bytes pass as they come; a failure becomes one error record."""
        guard, exchange, request = self.guard, self.exchange, self.request
        deadlines, node = self.owner.deadlines, sent.peer.node_id
        self.ledger.content()
        gap_s = deadlines.gap_buffered_s if request.buffered else deadlines.gap_s
        self._writing()
        if not exchange.started:
            kind = upstream.header(b"content-type") or self.dialect.stream_type
            await exchange.start(200, heads.of_answer(request, sent, self.ledger.rows, kind, stream=True))
        elif self.dialect.framing == "sse":
            out = heads.as_comment(request, sent, self.ledger.rows) + out
        relaying = Relaying(exchange, upstream, watch, guard, gap_s=gap_s, write_s=deadlines.write_s)
        try:
            out = await relaying.run(out)
        except UpstreamCut as error:
            message = f"node '{node}' broke off in the middle of its answer"
            raise _Broken(UpstreamFailed(message)) from error
        if watch.failed is not None:
            raise _Broken(UpstreamFailed(f"node '{node}': {watch.failure().message}"))
        await self._end_stream(sent, watch, out)
        await _read_rest(upstream)

    async def _end_stream(self, sent: Sent, watch: StreamWatch, out: bytes) -> None:
        tail, ending = watch.finish()
        node = sent.peer.node_id
        if ending.how == "repeat_abort" and sent.backend_kind == "ollama":
            tail += self.dialect.proper_end(tuple(watch.last))
            ending = ending._replace(finish_reason="repeat_abort")
        elif ending.how == "error":
            raise _Broken(UpstreamFailed(f"node '{node}': {ending.message}"))
        elif ending.how != "complete":
            raise _Broken(UpstreamFailed(f"node '{node}' ended its answer without its end mark"))
        self.ledger.completed(ending)
        self._writing()
        await self.exchange.finish(out + tail)

    def _writing(self) -> None:
        """From here on it is the client's turn to make progress."""
        self.guard.touch("client_stalled", self.owner.deadlines.write_s)

    # -- silence -----------------------------------------------------------------------------------------

    def _make_early(self) -> Early | None:
        request, dialect, deadlines = self.request, self.dialect, self.owner.deadlines
        wanted = request.progress or self.owner.tell_all
        tells = wanted and dialect.progress is not None and dialect.progress(request.route, "", "", 0.0)
        self.silent = not tells
        if self.silent and not dialect.ping:
            return None  # a line of NDJSON would be a record

        def headers() -> heads.Headers:
            return heads.early(request, dialect.stream_type)

        if self.silent:
            return Early(self.exchange, self.guard, headers, lambda: dialect.ping, deadlines.ping_s)
        teller = Teller(self.owner.books, self.owner.pulls, request, dialect, self.ledger)
        return Early(self.exchange, self.guard, headers, teller.word, deadlines.progress_s)

    async def _stop_early(self) -> None:
        if self.early is not None:
            await self.early.stop()

    def _note_waiting(self, held: bool) -> None:
        """It waits for a busy node, or is held because nobody can take it now."""
        self.ledger.waits()
        if self.early is not None:
            if held:
                self.early.wait_on()
            else:
                deadlines = self.owner.deadlines
                self.early.expect(deadlines.early_waiting_s if self.silent else deadlines.progress_s)

    # -- how it ends -------------------------------------------------------------------------------------

    async def _note_failure(self, failure: Failure) -> None:
        """Record, free the slot, tell the registry, count; R-8: a short pause unless nothing was sent."""
        sent = self.ledger.sent
        assert sent is not None
        status: Status = "retried" if failure.elsewhere else "failed"
        self.ledger.failed(status, failure.error, cancelled=failure.cancelled)
        self._apply(sent, failure)
        if self.last_failure is None or failure.effect is not Effect.DELIST:
            self.last_failure = failure  # that one node lacks the model is no news once another failed
        # A call that takes no slot is not held back by a mark either: it must not ask the same node for ever.
        if not failure.counts and sent.token is not None:
            return
        tried = self.history.tried
        if failure.effect is not Effect.UNREACHABLE:
            tried |= {sent.peer.node_id}
        self.history = self.history._replace(tried=tried, attempts=self.history.attempts + 1)
        if failure.backoff and failure.elsewhere:
            await asyncio.sleep(self.owner.chance.uniform(0.05, 0.25))

    def _apply(self, sent: Sent, failure: Failure) -> None:
        registry, now_s = self.owner.books.registry, self.owner.books.clock.now_s()
        node, key = sent.peer.node_id, sent.step.instance_key
        match failure.effect:
            case Effect.UNREACHABLE:
                registry.on_connect_failed(node, now_s, failure.why, address=sent.peer.origin)
            case Effect.BUSY:
                registry.mark_busy(node, key, now_s + (failure.error.retry_after_s or _BUSY_S))
            case Effect.DELIST:
                registry.delist(node, sent.step.model)
            case Effect.STALE:
                registry.on_stale_auth(node, now_s)
            case Effect.BAD_MODEL:
                registry.mark_bad(node, key, now_s + _BAD_MODEL_S)
            case Effect.NONE:
                return
        self.owner.books.room.wake()

    async def _refused(self, reject: Reject) -> bool:
        """No node: the planner's own sentence, or the last failure when attempts were made.

        Whether to plan again: a model that nobody had may have been pulled.
        """
        failure = self.last_failure
        if self.request.route.kind == "count" and reject.status in (None, 501):
            await self._guess()
            return False
        if failure is not None and (reject.status in (None, 404) or failure.error.status == 429):
            await self._give_up(failure.error)
            return False
        error = self._refusal(reject)
        if reject.status == 404 and self._may_pull():
            try:
                await self._pull()
                return True
            except ApiError as trouble:
                error = trouble
        if self.ledger.never_sent:
            self.ledger.record("rejected", error=error, reject=reject)
        await self._give_up(error)
        return False

    def _may_pull(self) -> bool:
        """Not for a look at a model, nor for a node that was named: those mean what there is."""
        request = self.request
        if request.only is not None or request.route.kind in ("show", "count"):
            return False
        return self.owner.pulls.allows(request.principal)

    async def _pull(self) -> None:
        """Until some node has the model. Raises ApiError."""
        self.ledger.waits()
        wait_s: float | None = self.owner.deadlines.pull_wait_s
        if self.early is not None:
            deadlines = self.owner.deadlines
            self.early.expect(deadlines.early_sent_s if self.silent else deadlines.progress_s)
            wait_s = None  # it is kept alive
        await self.owner.pulls.get((self.request.resolved or self.request.asked)[0], wait_s)

    def _refusal(self, reject: Reject) -> ApiError:
        match reject.status:
            case 404:
                model = self.request.asked[0]
                if self.request.only is not None:  # some other node may well have it
                    return ModelNotFound(reject.message)
                return ModelNotFound(f"{reject.message}; {self.owner.pulls.hint(model)}", model=model)
            case 400:
                return BadRequest(reject.message)
            case 501:
                return NotOffered(reject.message)
        return Saturated(reject.message, retry_after_s=self._jittered(reject.retry_after_s))

    async def _give_up(self, error: ApiError) -> None:
        """The caller gets an error with its real status; in a stream that began early it is a record."""
        await self._stop_early()
        self.ledger.given_up()
        if self.exchange.started:
            self._writing()
            record = with_status(self.dialect.error_record(error), self.dialect.status(error))
            await self.exchange.finish(record)
            return
        row = self.ledger.last_row
        node_id = row.node_id if row is not None else None
        headers = heads.of_error(self.request, self.ledger.rows, error, node_id, self._jittered(2))
        said = error.said if isinstance(error, BackendRefused) else None
        if said is not None and has_error(said.body, self.dialect.error_type):
            headers = [field for field in headers if field[0] != b"content-type"]
            headers.append((b"content-type", said.content_type))
            await self.exchange.respond(said.status, headers, said.body)
            return
        body = self.dialect.error_body(error, self.request.request_id)
        await self.exchange.respond(self.dialect.status(error), headers, body)

    async def _guess(self) -> None:
        """No node can count the prompt's tokens: our own estimate, and a header that says so."""
        request, books, ledger = self.request, self.owner.books, self.ledger
        assert self.dialect.guess is not None
        snapshot = books.registry.snapshot(books.clock.now_s())
        stats = snapshot.stats.get(request.chain[0], DEFAULT_STATS)
        headers = heads.of_guess(request, ledger.rows)
        ledger.rows += ledger.rows > 0  # an attempt that failed keeps its row
        ledger.record("completed", ending=Ending("complete"))
        body = self.dialect.guess(request.est_tokens * stats.token_correction)
        await self.exchange.respond(200, headers, body)

    async def _end_broken(self, error: ApiError) -> None:
        """After content: exactly one error record, then the end of the body without an end mark."""
        self.ledger.failed("failed", error, cancelled=False)
        self._writing()
        await self.exchange.finish(self.dialect.error_record(error))

    async def _tripped(self, cause: Cause) -> None:
        """A deadline, the client or the drain interrupted it."""
        ledger, exchange = self.ledger, self.exchange
        if ledger.has_ended and exchange.started:  # the last bytes were on their way
            exchange.abort()
            return
        if cause in ("client_gone", "client_stalled"):
            ledger.client_gone()
            if exchange.started:
                exchange.abort()
            return
        error = self._error_of(cause)
        had_content = ledger.first_record_s is not None
        if ledger.sent is not None:
            ledger.failed("failed", error, cancelled=True)
        elif ledger.never_sent:
            ledger.record("rejected", error=error)
        try:
            with Guard() as patience:
                patience.deadline("write", self.owner.deadlines.write_s, "client_stalled")
                if had_content and exchange.started:
                    await exchange.finish(self.dialect.error_record(error))
                else:
                    await self._give_up(error)
        except (ClientGone, Tripped):
            _log.debug("the client of %s did not take its error", self.request.request_id)
            if exchange.started:
                exchange.abort()

    def _error_of(self, cause: Cause) -> ApiError:
        if cause == "drain":
            return Saturated("the router is shutting down; try again", retry_after_s=5)
        if cause == "total":
            return UpstreamTimeout(f"the request took longer than {self.owner.deadlines.total_s:.0f} s")
        sent = self.ledger.sent
        node = sent.peer.node_id if sent is not None else "?"
        return UpstreamTimeout(f"node '{node}' fell silent in the middle of its answer")

    async def _answer_unexpected(self, error: ApiError) -> None:
        if self.exchange.started:
            self.exchange.abort()
            return
        with contextlib.suppress(ClientGone):
            await self._give_up(error)

    def _jittered(self, seconds: int | None) -> int:
        return max(1, min(60, round((seconds or 2) * self.owner.chance.uniform(0.8, 1.2))))


async def _read_rest(upstream: Upstream) -> None:
    """What follows the end mark is nobody's; read shortly, so that the connection can be used again."""
    if upstream.ended:
        return
    try:
        with Guard() as patience:
            patience.deadline("rest", _REST_S, "gap")
            while await upstream.read():
                pass
    except (Tripped, UpstreamCut):
        return


def _ended_properly(body: bytes) -> bytes:
    """A whole answer that Ollama stopped on a repeated token (`done: false`), ended as a client expects."""
    span = jsonedit.find_top_level(body, "done")
    assert span is not None
    return jsonedit.replace_span(body, span, b'true,"done_reason":"stop"')
