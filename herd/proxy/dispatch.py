"""Serving one request: get a slot, send, commit late, stream, retry elsewhere, record every attempt.

States of a request: admitted -> waiting -> attempt k -> committed -> end (docs/behaviour.md). Rules kept:
R-1 the head goes out with the first content record; R-2 no other attempt after that, one error record
instead; R-3 a non-streaming answer is buffered and must be complete; R-4 an attempt is closed and its slot
free before the next begins; R-5 at most so many attempts over the whole chain (the planner counts); R-6 is
the pool's. What a failure means stands in `failures`; who is next is `herd.scheduling.plan`'s decision.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from dataclasses import dataclass
from functools import partial

import orjson

from herd.dialects import Dialect, Ending, StreamWatch
from herd.dialects.base import error_text
from herd.errors import ApiError, BadRequest, ModelNotFound, Saturated, UpstreamFailed, UpstreamTimeout
from herd.fleet.registry import AttemptResult, Registry
from herd.proxy import failures, records
from herd.proxy.calls import CallSigner, Peer
from herd.proxy.failures import Effect, Failure
from herd.proxy.guard import Cause, Guard, Tripped
from herd.proxy.records import Sent
from herd.proxy.slots import Granted, WaitingRoom
from herd.proxy.trace_writer import TraceWriter
from herd.request import InferenceRequest
from herd.scheduling.plan import Attempt, History, Reject
from herd.trace import ENDED, Status, Trace
from herd_node.net.exchange import ClientGone, Exchange
from herd_node.net.pool import (
    BadResponse,
    ConnectFailed,
    ConnectRefused,
    ConnectTimeout,
    Origin,
    Pool,
    PoolError,
    Upstream,
    UpstreamCut,
)
from herd_node.protocol import auth, jsonedit, names
from herd_node.runtime.clock import Clock

_log = logging.getLogger(__name__)

_MAX_ERROR_BYTES = 256 * 1024
_MAX_WHOLE_BYTES = 256 * 1024 * 1024
_BUSY_S = 2.0
_BAD_MODEL_S = 60.0
_HASH_IN_THREAD_BYTES = 256 * 1024
#: How long an upstream may take to end a body whose end mark has come.
_REST_S = 1.0
#: How long a slot may count as taken after its request was cancelled: Ollama finishes the batch in work;
#: a llama-server is believed busy until its own report says otherwise, at most so long (docs/backends.md).
_SETTLE_S = {"ollama": 2.5, "llama-server": 120.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """docs/behaviour.md, "Deadlines". Seconds; built in `herd.app` from the settings."""

    first_record_s: float = 120.0
    cold_load_s: float = 300.0
    gap_s: float = 60.0
    gap_buffered_s: float = 120.0
    total_s: float = 1800.0
    write_s: float = 60.0


class _Failed(Exception):
    """One attempt ended without content having reached the caller."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.error.message)
        self.failure = failure


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
        registry: Registry,
        room: WaitingRoom,
        pool: Pool,
        signer: CallSigner,
        traces: TraceWriter,
        clock: Clock,
        deadlines: Deadlines,
        router_id: str,
        chance: random.Random,
    ) -> None:
        self.registry = registry
        self.room = room
        self.pool = pool
        self.signer = signer
        self.traces = traces
        self.clock = clock
        self.deadlines = deadlines
        self.router_id = router_id
        self.chance = chance
        self.live: set[Guard] = set()
        self.loop = asyncio.get_running_loop()

    async def handle(self, exchange: Exchange, request: InferenceRequest, dialect: Dialect) -> None:
        """Answer one admitted request, whatever a node or its client does."""
        await _Run(self, exchange, request, dialect).serve()

    def drain(self) -> None:
        """End what still runs: streams get their error record, the rest a 503."""
        for guard in list(self.live):
            guard.trip("drain")


class _Run:
    """The life of one request."""

    def __init__(
        self, owner: Dispatcher, exchange: Exchange, request: InferenceRequest, dialect: Dialect
    ) -> None:
        self.owner = owner
        self.exchange = exchange
        self.request = request
        self.dialect = dialect
        self.guard = Guard(owner.loop)
        self.history = History()
        self.rows = 0
        self.sent: Sent | None = None
        self.upstream: Upstream | None = None
        self.first_record_s: float | None = None
        self.last_failure: Failure | None = None
        self.last_row: Trace | None = None

    async def serve(self) -> None:
        owner, guard = self.owner, self.guard
        owner.live.add(guard)
        try:
            with guard:
                guard.deadline("total", owner.deadlines.total_s, "total")
                self.exchange.on_gone(lambda: guard.trip("client_gone"))
                await self._attempts()
        except ClientGone:
            self._end_client_gone()
        except Tripped as tripped:
            await self._tripped(tripped.cause)
        except asyncio.CancelledError as error:
            self._end_unexpected(error)
            raise
        except Exception as error:  # noqa: BLE001 - logged; the caller gets a 500 with the request's own id
            _log.exception("unexpected error while serving %s", self.request.request_id)
            await self._answer_unexpected(self._end_unexpected(error))
        finally:
            owner.live.discard(guard)

    async def _attempts(self) -> None:
        while True:
            self.guard.check()
            granted = await self.owner.room.acquire(self.request, self.history, self._note_waiting)
            if isinstance(granted, Reject):
                await self._refuse(granted)
                return
            self.history = granted.history
            try:
                await self._attempt(granted)
                return
            except _Failed as failed:
                await self._note_failure(failed.failure)
                if not failed.failure.elsewhere:
                    await self._give_up(failed.failure.error)
                    return
            except _Broken as broken:
                await self._end_broken(broken.error)
                return

    # -- one attempt -------------------------------------------------------------------------------------

    async def _attempt(self, granted: Granted) -> None:
        sent = self._begin(granted)
        try:
            started = await self._until_answer(sent)
            if started is None:
                await self._whole(sent)
            else:
                await self._relay(sent, *started)
        except PoolError as error:
            raise _Failed(failures.broken(sent.peer.node_id, f"its answer broke off ({error})")) from error
        finally:
            if self.upstream is not None:
                self.upstream.close()
                self.upstream = None

    def _begin(self, granted: Granted) -> Sent:
        step, registry = granted.step, self.owner.registry
        host, port = registry.address(step.node_id)
        agent_id, boot, version = registry.agent(step.node_id)
        self.first_record_s = None
        self.sent = Sent(
            step,
            granted.token,
            Peer(step.node_id, host, port, agent_id, boot),
            granted.backend_kind,
            granted.cold,
            version,
            self.owner.clock.now_s(),
            self.owner.clock.wall_s(),
            self.rows,
            granted.shown,
        )
        self.rows += 1
        # Most attempts end before their batch is written: then this row is never made.
        start = partial(records.started, self.request, self.sent, self.rows, self.owner.router_id)
        self.owner.traces.put_start(self.request.request_id, self.rows, start)
        return self.sent

    async def _until_answer(self, sent: Sent) -> tuple[StreamWatch, bytes] | None:
        """Send, and read up to the first content record; None when the answer does not stream."""
        if not self.request.stream:  # only the total deadline: the first byte comes last
            await self._open(sent)
            return None
        deadlines = self.owner.deadlines
        limit_s = deadlines.cold_load_s if sent.cold else deadlines.first_record_s
        try:
            with Guard(self.owner.loop) as silence:
                silence.deadline("first_record", limit_s, "first_record")
                upstream = await self._open(sent)
                kind = upstream.header(b"content-type") or b""
                if not kind.startswith(self.dialect.stream_type):
                    return None
                watch = StreamWatch(self.dialect)
                return watch, await self._until_content(sent, upstream, watch)
        except Tripped as tripped:
            raise _Failed(failures.too_late(sent.peer.node_id, limit_s)) from tripped

    async def _open(self, sent: Sent) -> Upstream:
        """Send and read the head; whatever is not 200 is a failure of the attempt."""
        upstream = self.upstream = await self._send(sent)
        if upstream.status != 200:
            raise _Failed(await self._read_failure(sent, upstream))
        return upstream

    async def _send(self, sent: Sent) -> Upstream:
        body = self._body(sent.step)
        if len(body) > _HASH_IN_THREAD_BYTES:
            digest = await asyncio.to_thread(auth.body_hash, body)
        else:
            digest = auth.body_hash(body)
        target = self.request.route.path
        peer, signer = sent.peer, self.owner.signer

        def headers() -> list[tuple[bytes, bytes]]:
            signature = signer.sign(peer, "POST", target, digest)
            return [
                *self.request.headers,
                (b"x-request-id", self.request.request_id.encode()),
                (b"x-herd-auth", signature.encode()),
            ]

        node = peer.node_id
        try:
            return await self.owner.pool.request(Origin(peer.host, peer.port), "POST", target, headers, body)
        except (ConnectRefused, ConnectTimeout, ConnectFailed) as error:
            raise _Failed(failures.unreachable(node, str(error))) from error
        except BadResponse as error:
            raise _Failed(failures.broken(node, f"its answer is not valid HTTP ({error})")) from error
        except PoolError as error:
            raise _Failed(failures.broken(node, f"the connection broke off ({error})")) from error

    def _body(self, step: Attempt) -> bytes:
        """The caller's bytes; of a fallback model only the bytes of `model` differ."""
        request = self.request
        if step.model_index == 0 or request.model_span is None:
            return request.body
        start, end = request.model_span
        return request.body[:start] + orjson.dumps(request.asked[step.model_index]) + request.body[end:]

    async def _read_failure(self, sent: Sent, upstream: Upstream) -> Failure:
        """What an answer that is not 200 means: by the agent's own word first, by status otherwise."""
        node, model = sent.peer.node_id, self.request.asked[sent.step.model_index]
        try:
            body = await upstream.read_all(_MAX_ERROR_BYTES)
        except PoolError as error:
            return failures.broken(node, f"its answer broke off ({error})")
        text = error_text(body) if body else f"status {upstream.status}"
        retry_after_s = _seconds(upstream.header(b"retry-after"))
        word = (upstream.header(b"x-herd-error") or b"").decode("ascii", "replace")
        by_word = failures.by_agent(word, node, model, text, retry_after_s) if word else None
        return by_word or failures.by_status(upstream.status, node, model, text, retry_after_s)

    async def _until_content(self, sent: Sent, upstream: Upstream, watch: StreamWatch) -> bytes:
        """R-1: everything up to and with the first content record. Whatever fails here may go elsewhere."""
        node = sent.peer.node_id
        held = []
        while not watch.content_seen:
            chunk = await upstream.read()
            if not chunk:
                tail, ending = watch.finish()
                held.append(tail)
                if ending.how == "error":
                    raise _Failed(failures.in_band(node, ending.message or "it reported an error"))
                if not watch.content_seen:
                    raise _Failed(failures.broken(node, "its answer ended before the first word"))
                break
            held.append(watch.feed(chunk))
            if watch.failed is not None and not watch.content_seen:
                raise _Failed(failures.in_band(node, watch.failure().message or "it reported an error"))
        return b"".join(held)

    async def _whole(self, sent: Sent) -> None:
        """R-3: read all, make sure that it is complete, then answer."""
        upstream, node = self.upstream, sent.peer.node_id
        assert upstream is not None
        body = await upstream.read_all(_MAX_WHOLE_BYTES)
        ending = self.dialect.whole(self.request.route, body)
        if ending.how == "repeat_abort" and sent.backend_kind == "ollama":
            body = _ended_properly(body)
            ending = ending._replace(finish_reason="repeat_abort")
        elif ending.how == "error":
            raise _Failed(failures.in_band(node, ending.message or "it reported an error"))
        elif ending.how != "complete":
            raise _Failed(failures.broken(node, ending.message or "its answer is incomplete"))
        headers = self._answer_headers(sent, upstream)
        self._note_first_record(sent, now_known=False)
        self._finish(sent, ending)
        self._writing()
        await self.exchange.respond(200, headers, body)

    async def _relay(self, sent: Sent, watch: StreamWatch, out: bytes) -> None:
        """R-2: from here on bytes pass as they come; a failure becomes one error record."""
        upstream, guard, exchange = self.upstream, self.guard, self.exchange
        assert upstream is not None
        deadlines, node = self.owner.deadlines, sent.peer.node_id
        self._note_first_record(sent, now_known=True)
        gap_s = deadlines.gap_buffered_s if self.request.buffered else deadlines.gap_s
        self._writing()
        await exchange.start(200, self._answer_headers(sent, upstream))
        while True:
            if out:
                self._writing()
                await exchange.send(out)
            if watch.failed is not None:
                raise _Broken(UpstreamFailed(f"node '{node}': {watch.failure().message}"))
            if watch.ended:
                await self._end_stream(sent, watch)
                await _read_rest(upstream)
                return
            guard.touch("gap", gap_s)
            try:
                chunk = await upstream.read()
            except UpstreamCut as error:
                message = f"node '{node}' broke off in the middle of its answer"
                raise _Broken(UpstreamFailed(message)) from error
            if not chunk:
                await self._end_stream(sent, watch)
                return
            out = watch.feed(chunk)

    def _writing(self) -> None:
        """From here on it is the client's turn to make progress."""
        self.guard.touch("client_stalled", self.owner.deadlines.write_s)

    async def _end_stream(self, sent: Sent, watch: StreamWatch) -> None:
        tail, ending = watch.finish()
        node = sent.peer.node_id
        if ending.how == "repeat_abort" and sent.backend_kind == "ollama":
            tail += self.dialect.proper_end(tuple(watch.last))
            ending = ending._replace(finish_reason="repeat_abort")
        elif ending.how == "error":
            raise _Broken(UpstreamFailed(f"node '{node}': {ending.message}"))
        elif ending.how != "complete":
            raise _Broken(UpstreamFailed(f"node '{node}' ended its answer without its end mark"))
        self._finish(sent, ending)
        self._writing()
        await self.exchange.finish(tail)

    # -- how it ends -------------------------------------------------------------------------------------

    def _finish(self, sent: Sent, ending: Ending) -> None:
        """The whole answer is here: record, learn, free the slot."""
        total_s = self.owner.clock.now_s() - sent.started_s
        ttft_s = None if self.first_record_s is None else self.first_record_s - sent.started_s
        self._record("no_output" if ending.no_output else "completed", ending=ending)
        self._end_attempt(records.result(sent, ending, ttft_s, total_s, self.request.est_tokens))

    async def _note_failure(self, failure: Failure) -> None:
        """Record, free the slot, tell the registry, count; R-8: a short pause unless nothing was sent."""
        sent = self.sent
        assert sent is not None
        self._record("retried" if failure.elsewhere else "failed", error=failure.error)
        self._end_attempt(self._cancelled() if failure.cancelled else self._cut_short())
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
        registry, now_s = self.owner.registry, self.owner.clock.now_s()
        node, key = sent.peer.node_id, sent.step.instance_key
        match failure.effect:
            case Effect.UNREACHABLE:
                address = (sent.peer.host, sent.peer.port)
                registry.on_connect_failed(node, now_s, failure.why, address=address)
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
        self.owner.room.wake()

    async def _refuse(self, reject: Reject) -> None:
        """No node: the planner's own sentence, or the last failure when attempts were made."""
        failure = self.last_failure
        if failure is not None and (reject.status in (None, 404) or failure.error.status == 429):
            await self._give_up(failure.error)
            return
        if reject.status == 404:
            error: ApiError = ModelNotFound(reject.message, model=self.request.asked[0])
        elif reject.status == 400:
            error = BadRequest(reject.message)
        else:
            error = Saturated(reject.message, retry_after_s=self._jittered(reject.retry_after_s))
        if self._never_sent:
            self._record("rejected", error=error, reject=reject)
        await self._give_up(error)

    async def _give_up(self, error: ApiError) -> None:
        """The caller gets an error with its real status; the last attempt's row becomes the final one."""
        if self.last_row is not None and self.last_row.status == "retried":
            self._put(self.last_row._replace(status="failed"))
        headers = [*self._common_headers(), (b"content-type", b"application/json")]
        if error.status in (429, 503):
            retry_after_s = error.retry_after_s or self._jittered(2)
            headers.append((b"retry-after", str(retry_after_s).encode()))
        if error.status in (400, 404):
            headers.append((b"x-should-retry", b"false"))
        if self.last_row is not None and self.last_row.node_id is not None:
            headers.append((b"x-fleet-node", self.last_row.node_id.encode()))
        body = self.dialect.error_body(error, self.request.request_id)
        await self.exchange.respond(error.status, headers, body)

    async def _end_broken(self, error: ApiError) -> None:
        """After content: exactly one error record, then the end of the body without an end mark."""
        self._record("failed", error=error)
        self._end_attempt(self._cut_short())
        self._writing()
        await self.exchange.finish(self.dialect.error_record(error))

    async def _tripped(self, cause: Cause) -> None:
        """A deadline, the client or the drain interrupted it."""
        has_ended = self.sent is None and self.last_row is not None and self.last_row.status in ENDED
        if has_ended and self.exchange.started:  # the last bytes were on their way
            self.exchange.abort()
            return
        if cause in ("client_gone", "client_stalled"):
            self._end_client_gone()
            if self.exchange.started:
                self.exchange.abort()
            return
        error = self._error_of(cause)
        if self.sent is not None:
            self._record("failed", error=error)
            self._end_attempt(self._cancelled())
        elif self._never_sent:
            self._record("rejected", error=error)
        try:
            with Guard() as patience:
                patience.deadline("write", self.owner.deadlines.write_s, "client_stalled")
                if self.exchange.started:
                    await self.exchange.finish(self.dialect.error_record(error))
                else:
                    await self._give_up(error)
        except (ClientGone, Tripped):
            _log.debug("the client of %s did not take its error", self.request.request_id)
            if self.exchange.started:
                self.exchange.abort()

    def _error_of(self, cause: Cause) -> ApiError:
        if cause == "drain":
            return Saturated("the router is shutting down; try again", retry_after_s=5)
        if cause == "total":
            return UpstreamTimeout(f"the request took longer than {self.owner.deadlines.total_s:.0f} s")
        node = self.sent.peer.node_id if self.sent is not None else "?"
        return UpstreamTimeout(f"node '{node}' fell silent in the middle of its answer")

    def _end_client_gone(self) -> None:
        if self.sent is None:
            self._end_between_attempts("client_gone", None)
            return
        self._record("client_gone")
        self._end_attempt(self._cancelled())

    async def _answer_unexpected(self, error: ApiError) -> None:
        if self.exchange.started:
            self.exchange.abort()
            return
        with contextlib.suppress(ClientGone):
            await self._give_up(error)

    @property
    def _never_sent(self) -> bool:
        """It has no row yet, or only the one that says it waits."""
        return self.last_row is None or self.rows == 0

    def _note_waiting(self) -> None:
        """It waits, or is held: from now on it has a row, which its first attempt will fill."""
        if self.last_row is None:
            self._record("started")

    def _end_unexpected(self, error: BaseException) -> ApiError:
        """The router's own failure or its forced end: the slot must not leak, the row must not stay open."""
        stopped = isinstance(error, asyncio.CancelledError)
        status: Status = "interrupted" if stopped else "failed"
        why = ApiError("the router stopped" if stopped else "an internal error of the router")
        if self.sent is None:
            self._end_between_attempts(status, why)
            return why
        self._record(status, error=why)
        self._end_attempt(self._cut_short())
        return why

    def _end_between_attempts(self, status: Status, error: ApiError | None) -> None:
        """The last attempt's row, or the request's own if it never had one, becomes the final one."""
        if self.last_row is None or self.rows == 0:
            self._record(status, error=error)
        elif self.last_row.status not in ENDED:
            self._put(self.last_row._replace(status=status))

    def _cut_short(self) -> AttemptResult:
        """An attempt that ended by itself, without a whole answer."""
        lived_s = self.owner.clock.now_s() - self.sent.started_s if self.sent is not None else 0.0
        return AttemptResult(ok=False, total_s=lived_s)

    def _cancelled(self) -> AttemptResult:
        """An attempt that we end: before its first record the backend does not hear of it at once."""
        settle_s = 0.0
        if self.sent is not None and self.first_record_s is None:
            settle_s = _SETTLE_S.get(self.sent.backend_kind, 0.0)
        return self._cut_short()._replace(cancelled=True, settle_s=settle_s)

    # -- bookkeeping -------------------------------------------------------------------------------------

    def _note_first_record(self, sent: Sent, *, now_known: bool) -> None:
        """Content is here. A whole answer does not say when its first word was made."""
        now_s = self.owner.clock.now_s()
        if now_known:
            self.first_record_s = now_s
        if sent.token is not None:
            self.owner.registry.first_record(sent.token, now_s)
        if sent.cold:
            self.owner.room.wake()

    def _end_attempt(self, result: AttemptResult) -> None:
        sent, self.sent = self.sent, None
        if sent is not None and sent.token is not None:
            self.owner.registry.end_attempt(sent.token, self.owner.clock.now_s(), outcome=result)
            self.owner.room.wake()

    def _common_headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"x-request-id", self.request.request_id.encode()),
            (b"x-fleet-attempts", str(self.rows).encode()),
        ]

    def _answer_headers(self, sent: Sent, upstream: Upstream) -> list[tuple[bytes, bytes]]:
        """What served the request, always."""
        step, request = sent.step, self.request
        headers = [
            (b"content-type", upstream.header(b"content-type") or b"application/json"),
            *self._common_headers(),
            (b"x-fleet-node", step.node_id.encode()),
            (b"x-fleet-model", names.header_value(sent.shown)),
        ]
        if step.card.by_signal:
            headers.append((b"x-fleet-score", b"%.1f" % step.card.total))
        if step.model_index:
            headers.append((b"x-fleet-fallback", names.header_value(request.asked[0])))
        return headers

    def _jittered(self, seconds: int | None) -> int:
        return max(1, min(60, round((seconds or 2) * self.owner.chance.uniform(0.8, 1.2))))

    def _record(
        self,
        status: Status,
        *,
        ending: Ending | None = None,
        error: ApiError | None = None,
        reject: Reject | None = None,
    ) -> None:
        """One attempt's row as far as it is known; the writer makes columns of it, off the hot path."""
        now_s, sent = self.owner.clock.now_s(), self.sent
        known = sent is not None and self.first_record_s is not None
        ttft_s = self.first_record_s - sent.started_s if known else None  # type: ignore[union-attr, operator]
        row = records.trace(
            self.request,
            sent,
            status,
            number=self.rows or 1,
            router_id=self.owner.router_id,
            now_s=now_s,
            ttft_s=ttft_s,
            ending=ending,
            error=error,
            reject=reject,
        )
        self._put(row)

    def _put(self, row: Trace) -> None:
        self.last_row = row
        self.owner.traces.put(row)


async def _read_rest(upstream: Upstream) -> None:
    """What follows the end mark is nobody's; read shortly, so that the connection can be used again."""
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


def _seconds(value: bytes | None) -> int | None:
    return max(1, min(int(value), 3600)) if value and value.isdigit() else None
