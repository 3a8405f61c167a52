"""Errors as the caller's dialect writes them. The only place that turns an exception into an answer."""

from __future__ import annotations

from herd.dialects import DIALECTS, OLLAMA
from herd.errors import ApiError, BodyTooLarge, MethodNotAllowed
from herd_node.net import exchange as net
from herd_node.net.exchange import ClientGone, Exchange
from herd_node.runtime.chance import new_hex


async def answer_error(exchange: Exchange, dialect: str, error: Exception) -> None:
    """Answer with the error's status and the dialect's body. An unexpected error says nothing of itself."""
    known = _as_api_error(error)
    request_id = new_hex(12)
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", request_id.encode()),
        (b"x-fleet-attempts", b"0"),
    ]
    if isinstance(known, MethodNotAllowed):
        headers.append((b"allow", known.allow.encode()))
    if known.retry_after_s is not None:
        headers.append((b"retry-after", str(known.retry_after_s).encode()))
    if known.status in (400, 404):
        headers.append((b"x-should-retry", b"false"))
    if known.status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    row = DIALECTS.get(dialect, OLLAMA)
    try:
        await exchange.respond(row.status(known), headers, row.error_body(known, request_id))
    except ClientGone:
        return


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, net.BodyTooLarge):
        return BodyTooLarge(f"the request body is larger than the limit of {error.limit_bytes} bytes")
    return ApiError("an internal error of the router; its log has the details")
