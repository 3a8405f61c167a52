"""What one event of an upstream stream says, whatever the shape of the stream. Pure.

chat    /v1/chat/completions: choices[0].delta
text    /v1/completions: choices[0].text
native  llama-server's /completion and /infill: content, and `stop` with its reason
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import orjson

from herd_node.translate.base import Truncated

Line = dict[str, object]

_NOTHING: Line = {}


class Piece(NamedTuple):
    text: str = ""
    thought: str = ""
    tool_calls: object = None
    """Pieces of calls, as they came."""
    logprobs: Sequence[object] = ()
    """One entry a token, in the chat shape."""
    finish: str = ""
    timings: Line = _NOTHING
    usage: Line = _NOTHING


Source = Callable[[Line], Piece]


def chat_piece(chunk: Line) -> Piece:
    choice = _first_choice(chunk)
    delta = as_object(choice.get("delta"))
    text = as_text(delta, "content")
    plain = text and len(delta) == 1 and len(choice) == 3 and "timings" not in chunk
    if plain and choice.get("finish_reason", "") is None and "usage" not in chunk and "index" in choice:
        return Piece(text)  # as most are
    return Piece(
        as_text(delta, "content"),
        as_text(delta, "reasoning_content") or as_text(delta, "reasoning"),
        delta.get("tool_calls"),
        as_list(as_object(choice.get("logprobs")).get("content")),
        as_text(choice, "finish_reason"),
        as_object(chunk.get("timings")),
        as_object(chunk.get("usage")),
    )


def text_piece(chunk: Line) -> Piece:
    choice = _first_choice(chunk)
    return Piece(
        text=as_text(choice, "text"),
        logprobs=_older_logprobs(as_object(choice.get("logprobs"))),
        finish=as_text(choice, "finish_reason"),
        timings=as_object(chunk.get("timings")),
        usage=as_object(chunk.get("usage")),
    )


def native_piece(chunk: Line) -> Piece:
    finish = ""
    if chunk.get("stop") is True:
        finish = "length" if chunk.get("stop_type") == "limit" else "stop"
    counted = {"prompt_tokens": "tokens_evaluated", "completion_tokens": "tokens_predicted"}
    return Piece(
        text=as_text(chunk, "content"),
        logprobs=as_list(chunk.get("completion_probabilities")),
        finish=finish,
        timings=as_object(chunk.get("timings")),
        usage={name: chunk.get(theirs) for name, theirs in counted.items()} if finish else _NOTHING,
    )


def parse_event(payload: bytes) -> Line:
    """An event's object; an empty one for `null`, which llama-server sends now and then."""
    try:
        chunk = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise Truncated("the answer turned into something that is not JSON") from None
    if chunk is None:
        return {}
    if not isinstance(chunk, dict):
        raise Truncated("the answer turned into something that is not a chunk")
    return chunk


def as_object(value: object) -> Line:
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def as_text(values: Line, name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""


def as_count(values: Line, name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) else 0


def _first_choice(chunk: Line) -> Line:
    choices = chunk.get("choices")
    return as_object(choices[0]) if isinstance(choices, list) and choices else {}


def _older_logprobs(given: Line) -> list[object]:
    """The chat shape, which llama-server uses here too; or the older one of parallel lists."""
    if "content" in given:
        return as_list(given["content"])
    logprobs, tops = as_list(given.get("token_logprobs")), as_list(given.get("top_logprobs"))
    entries: list[object] = []
    for at, (token, logprob) in enumerate(zip(as_list(given.get("tokens")), logprobs, strict=False)):
        entry: Line = {"token": token, "logprob": logprob}
        if at < len(tops):
            likely = as_object(tops[at])
            entry["top_logprobs"] = [{"token": name, "logprob": value} for name, value in likely.items()]
        entries.append(entry)
    return entries
