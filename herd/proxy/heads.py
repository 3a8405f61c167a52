"""The headers of answers: what served a request is always visible (docs/behaviour.md, "Headers"). Pure."""

from __future__ import annotations

from functools import lru_cache

from herd.errors import ApiError
from herd.proxy.records import Sent
from herd.request import InferenceRequest
from herd_node.protocol import names

Headers = list[tuple[bytes, bytes]]

#: Of every stream: nobody on the way may keep its pieces back or store them.
_UNBUFFERED = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
_JSON = (b"content-type", b"application/json")


def common(request: InferenceRequest, attempts: int) -> Headers:
    return [
        (b"x-request-id", request.request_id.encode()),
        (b"x-fleet-attempts", b"%d" % attempts),
    ]


def of_answer(request: InferenceRequest, sent: Sent, attempts: int, kind: bytes, *, stream: bool) -> Headers:
    """Of a 200 that a node made; `kind` is its content type."""
    headers = [
        (b"content-type", kind),
        (b"x-request-id", request.request_id.encode()),
        (b"x-fleet-attempts", b"%d" % attempts),
        *_served(request, sent),
    ]
    if stream:
        headers += _UNBUFFERED
    return headers


def early(request: InferenceRequest, kind: bytes) -> Headers:
    """Of a stream that begins before anybody serves it (R-1): `served` follows as a comment."""
    return [(b"content-type", kind), (b"x-request-id", request.request_id.encode()), *_UNBUFFERED]


def as_comment(request: InferenceRequest, sent: Sent, attempts: int) -> bytes:
    """What an early head could not say, as one comment of the event stream."""
    fields = [*_served(request, sent), (b"x-fleet-attempts", b"%d" % attempts)]
    return b": " + b" ".join(b"%b=%b" % field for field in fields) + b"\n\n"


def of_error(
    request: InferenceRequest, attempts: int, error: ApiError, node_id: str | None, retry_after_s: int
) -> Headers:
    headers = [*common(request, attempts), _JSON]
    if error.status in (429, 503):
        headers.append((b"retry-after", b"%d" % (error.retry_after_s or retry_after_s)))
    if error.status in (400, 404, 501):
        headers.append((b"x-should-retry", b"false"))
    if node_id is not None:
        headers.append((b"x-fleet-node", node_id.encode()))
    return headers


def of_guess(request: InferenceRequest, attempts: int) -> Headers:
    """Of a count of tokens that is the router's own estimate."""
    return [*common(request, attempts), _JSON, (b"x-fleet-estimated", b"1")]


@lru_cache(1024)  # each answer says the same few
def _who(node_id: str, shown: str) -> tuple[tuple[bytes, bytes], ...]:
    return (b"x-fleet-node", node_id.encode()), (b"x-fleet-model", names.header_value(shown))


def _served(request: InferenceRequest, sent: Sent) -> Headers:
    step = sent.step
    fields = [*_who(step.node_id, sent.shown)]
    if step.card.by_signal:
        fields.append((b"x-fleet-score", b"%.1f" % step.card.total))
    if step.model_index or step.stand_in is not None:
        fields.append((b"x-fleet-fallback", names.header_value(request.asked[0])))
    if step.context.reload:
        fields.append((b"x-fleet-context", b"reload"))
    return fields
