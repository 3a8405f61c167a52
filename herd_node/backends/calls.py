"""The control calls of the agent to a local server: small, short, JSON, and never an exception of httpx's.

Plain httpx is enough here (a few calls every 5 s); callers' requests go through `herd_node.net.pool`.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import httpx
import orjson

CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 5.0
WHOLE_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024

Headers = tuple[tuple[bytes, bytes], ...]


class NoAnswer(Exception):
    """There was no usable answer; `str()` is the reason for people. `refused`: nothing listens there."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class Answer(NamedTuple):
    """`body` is the JSON value, None when it was none."""

    status: int
    body: object

    @property
    def fields(self) -> dict[str, object]:
        """The body of a 200 that is an object; empty for anything else."""
        return self.body if self.status == 200 and isinstance(self.body, dict) else {}


def control_client() -> httpx.AsyncClient:
    """The agent's one client for control calls; whoever makes it closes it.

    Idle connections live 3 s: llama-server closes them after 5 s, the very interval of the polls. Pulls hold
    theirs for hours, so there is no limit that they could use up.
    """
    return httpx.AsyncClient(
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=3.0),
    )


async def ask(
    http: httpx.AsyncClient,
    url: str,
    *,
    headers: Headers = (),
    payload: object | None = None,
    read_timeout_s: float = READ_TIMEOUT_S,
    whole_timeout_s: float = WHOLE_TIMEOUT_S,
) -> Answer:
    """GET, or POST of `payload` as JSON. Raises NoAnswer; a status is never an error here."""
    request = http.build_request(
        "GET" if payload is None else "POST",
        url,
        headers=[*headers, *([] if payload is None else [(b"content-type", b"application/json")])],
        content=None if payload is None else orjson.dumps(payload),
        timeout=httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S),
    )
    try:
        async with asyncio.timeout(whole_timeout_s):
            return await _send(http, request)
    except TimeoutError:
        raise NoAnswer(f"{url} gave no answer within {whole_timeout_s:.0f} s") from None


async def _send(http: httpx.AsyncClient, request: httpx.Request) -> Answer:
    try:
        response = await http.send(request, stream=True)
        try:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise NoAnswer(f"{request.url} answered more than {MAX_ANSWER_BYTES} bytes")
        finally:
            await response.aclose()
    except httpx.ConnectError:
        raise NoAnswer(f"nothing answers at {_where(request)}", refused=True) from None
    except httpx.TimeoutException:
        raise NoAnswer(f"{_where(request)} is silent") from None
    except httpx.HTTPError as error:
        raise NoAnswer(f"{_where(request)} broke the connection ({type(error).__name__})") from None
    return Answer(response.status_code, _json(bytes(body)))


def _json(body: bytes) -> object:
    try:
        parsed: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return parsed


def _where(request: httpx.Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc.decode('ascii', 'replace')}"


def error_text(body: object) -> str | None:
    """The sentence in `{"error": "…"}` (Ollama) or `{"error": {"message": "…"}}` (llama-server)."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else None


def text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def whole(value: object) -> int | None:
    """A JSON integer that is not negative (true and false are none)."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def objects(value: object) -> list[dict[str, object]]:
    """The objects of a JSON list; empty when it is none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def words(value: object) -> tuple[str, ...]:
    """The strings of a JSON list."""
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
