"""What a llama-server forgets at the start of an Anthropic stream, made up. Pure.

Where the first token is a part of a character (an emoji often is), it swallows the first event together with
that token, and clients fall over a stream without `message_start` (docs/backends.md).
"""

from __future__ import annotations

import orjson

from herd_node.translate.events import Line

_SECOND_EVENT = b"event: content_block_start"


def behind_pings(piece: bytes) -> int:
    """Where the first event stands behind the comments that a stream may begin with."""
    at = 0
    while piece.startswith(b":", at):
        end = piece.find(b"\n\n", at)
        if end < 0:
            return len(piece)
        at = end + 2
    return at


def lacks_opening(piece: bytes, at: int) -> bool:
    """Whether the stream begins with what should come second."""
    return piece.startswith(_SECOND_EVENT, at)


def message(model: str, message_id: str) -> Line:
    """A message before anything was said. How long the prompt was is not known here: `message_delta` says."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": model,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def message_start(model: str, message_id: str) -> bytes:
    """The event."""
    event = {"type": "message_start", "message": message(model, message_id)}
    return b"event: message_start\ndata: " + orjson.dumps(event) + b"\n\n"
