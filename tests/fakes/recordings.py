"""Reads the recorded exchanges in `tests/golden/`: comments, the request's bytes, the response's bytes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

GOLDEN = Path(__file__).parent.parent / "golden"


class Recording(NamedTuple):
    request_head: bytes
    request_body: bytes
    status: int
    headers: dict[str, str]
    body: bytes
    """Without chunk framing."""
    complete: bool
    """False when a chunked body lacks its end chunk."""


def recording(name: str) -> Recording:
    """`name` is `folder/stem`, as in "ollama/chat-stream"."""
    raw = (GOLDEN / f"{name}.http").read_bytes()
    _, _, rest = raw.partition(b"##### REQUEST\n")
    request, _, response = rest.partition(b"##### RESPONSE\n")
    request_head, _, request_body = request.partition(b"\r\n\r\n")
    head, _, body = response.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:])}
    complete = True
    if headers.get("transfer-encoding") == "chunked":
        body, complete = _unchunked(body)
    request_body = request_body.removesuffix(b"\n")
    return Recording(request_head, request_body, int(lines[0].split()[1]), headers, body, complete)


def _unchunked(raw: bytes) -> tuple[bytes, bool]:
    out = b""
    while raw:
        size_text, _, raw = raw.partition(b"\r\n")
        size = int(size_text, 16)
        if size == 0:
            return out, True
        out, raw = out + raw[:size], raw[size + 2 :]
    return out, False
