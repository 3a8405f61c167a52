"""One physical send of an attempt: the head of a good answer, or why there is none. The hot path.

Retries nothing, records nothing, knows no deadline: that is the caller's.
"""

from __future__ import annotations

import asyncio

import orjson

from herd.dialects import StreamWatch
from herd.dialects.base import error_text
from herd.errors import Said
from herd.proxy import failures
from herd.proxy.calls import CallSigner
from herd.proxy.failures import Failure
from herd.proxy.records import Sent
from herd.request import InferenceRequest
from herd.scheduling.context import ContextUse
from herd.scheduling.plan import Attempt
from herd_node.net.pool import (
    BadResponse,
    ConnectFailed,
    ConnectRefused,
    ConnectTimeout,
    Pool,
    PoolError,
    Upstream,
)
from herd_node.protocol import auth, jsonedit
from herd_node.protocol.forms import Body

_MAX_ERROR_BYTES = 256 * 1024
_HASH_IN_THREAD_BYTES = 256 * 1024


class Failed(Exception):
    """One attempt ended without content having reached the caller."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.error.message)
        self.failure = failure


class Sender:
    """Sends to nodes. One a router."""

    def __init__(self, pool: Pool, signer: CallSigner) -> None:
        self._pool = pool
        self._signer = signer

    async def send(self, request: InferenceRequest, sent: Sent) -> Upstream:
        """The head of a good answer: whatever is not 200 is a failure of the attempt. Raises Failed."""
        body = body_of(request, sent.step)
        if len(body) > _HASH_IN_THREAD_BYTES:
            digest = await asyncio.to_thread(auth.body_hash, body)
        else:
            digest = auth.body_hash(body)
        target, peer, signer = request.route.path, sent.peer, self._signer

        def headers() -> list[tuple[bytes, bytes]]:
            signature = signer.sign(peer, "POST", target, digest)
            return [
                *request.headers,
                (b"x-request-id", request.request_id.encode()),
                (b"x-herd-auth", signature.encode()),
            ]

        node = peer.node_id
        try:
            upstream = await self._pool.request(peer.origin, "POST", target, headers, body)
        except (ConnectRefused, ConnectTimeout, ConnectFailed) as error:
            raise Failed(failures.unreachable(node, str(error))) from error
        except BadResponse as error:
            raise Failed(failures.broken(node, f"its answer is not valid HTTP ({error})")) from error
        except PoolError as error:
            raise Failed(failures.broken(node, f"the connection broke off ({error})")) from error
        if upstream.status == 200:
            return upstream
        try:
            raise Failed(await _read_failure(request, sent, upstream))
        finally:
            upstream.close()


def body_of(request: InferenceRequest, step: Attempt) -> Body:
    """The caller's bytes. Only those of `model` differ, where another one serves or an alias stands for one,
    and those of options that would make the backend load the model anew."""
    body = request.body
    if step.model_index or request.resolved or step.stand_in is not None:
        body = _with_model(request, step)
    use = step.context
    if use.num_ctx is not None or use.removed:
        body = _with_options(body[:], use)
    return body


def _with_model(request: InferenceRequest, step: Attempt) -> Body:
    span = request.model_span
    if span is None:
        return request.body
    name = step.stand_in or (request.resolved or request.asked)[step.model_index]
    written = name.encode() if request.form_span is not None else orjson.dumps(name)
    return request.body[: span[0]] + written + request.body[span[1] :]


def _with_options(body: bytes, use: ContextUse) -> bytes:
    """What stands there twice is left alone: nobody can say which of the two a backend would read."""
    try:
        span = jsonedit.find_top_level(body, "options")
        if span is None:
            return body
        options = body[span[0] : span[1]]
        for name in use.removed:
            member = jsonedit.find_member(options, name)
            if member is not None:
                options = jsonedit.remove_member(options, member)
        if use.num_ctx is not None and (value := jsonedit.find_top_level(options, "num_ctx")) is not None:
            options = jsonedit.replace_span(options, value, b"%d" % use.num_ctx)
    except jsonedit.JsonEditError:
        return body
    return jsonedit.replace_span(body, span, options)


async def _read_failure(request: InferenceRequest, sent: Sent, upstream: Upstream) -> Failure:
    """What an answer that is not 200 means: by the agent's own word first, by status otherwise."""
    node, model = sent.peer.node_id, sent.step.stand_in or request.asked[sent.step.model_index]
    try:
        body = await upstream.read_all(_MAX_ERROR_BYTES)
    except PoolError as error:
        return failures.broken(node, f"its answer broke off ({error})")
    text = error_text(body) if body else f"status {upstream.status}"
    retry_after_s = _seconds(upstream.header(b"retry-after"))
    word = (upstream.header(b"x-herd-error") or b"").decode("ascii", "replace")
    by_word = failures.by_agent(word, node, model, text, retry_after_s) if word else None
    if by_word is not None:
        return by_word
    said = Said(upstream.status, body, upstream.header(b"content-type") or b"application/json")
    return failures.by_status(upstream.status, node, model, text, retry_after_s, said)


async def until_content(sent: Sent, upstream: Upstream, watch: StreamWatch) -> bytes:
    """R-1: everything up to and with the first content record. Raises Failed: it may go elsewhere."""
    node = sent.peer.node_id
    held = []
    while not watch.content_seen:
        chunk = await upstream.read()
        if not chunk:
            tail, ending = watch.finish()
            held.append(tail)
            if ending.how == "error":
                raise Failed(failures.in_band(node, ending.message or "it reported an error"))
            if not watch.content_seen:
                raise Failed(failures.broken(node, "its answer ended before the first word"))
            break
        held.append(watch.feed(chunk))
        if watch.failed is not None and not watch.content_seen:
            raise Failed(failures.in_band(node, watch.failure().message or "it reported an error"))
    return b"".join(held)


def _seconds(value: bytes | None) -> int | None:
    return max(1, min(int(value), 3600)) if value and value.isdigit() else None
