"""The OpenAI dialect's Responses, whose requests, records and ends are unlike those of the rest of it.

Stateless: a fleet keeps no responses, so what asks for one that was kept is refused. A stream ends with
`response.completed` (or `.incomplete`), never with `[DONE]` (docs/backends.md, "Responses").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from herd.dialects import base, openai
from herd.dialects.base import Dialect, Ending, How, Parsed, Prompt, Verdict
from herd.errors import ApiError, BadRequest
from herd_node.protocol.routes import Route

_ENDS = ("response.completed", "response.incomplete")
#: What needs a response that was kept, and what to do instead.
_STATEFUL = {
    "previous_response_id": "send the whole conversation as 'input'",
    "conversation": "send the whole conversation as 'input'",
    "background": "ask for a stream",
}


def parse(route: Route, body: bytes) -> Parsed:
    """Read the head of a request. Raises BadRequest with one sentence."""
    head = base.read_object(body)
    value = head.value
    asked = base.model_names(value, "model", openai.missing_model)
    base.refuse_twins(head, "model")
    stream = base.optional(value, "stream", bool, "a boolean")
    for key, instead in _STATEFUL.items():
        if value.get(key):
            raise BadRequest(f"'{key}' is not supported, since no response is kept: {instead}")
    prompt = Prompt(cut=head.cut)
    tools = base.objects(value, "tools")
    if tools:
        prompt.value(tools)
    instructions = base.optional(value, "instructions", str, "a string")
    if instructions:
        prompt.text(instructions)
    _read_input(value, prompt)
    text = base.optional(value, "text", dict, "an object")
    asides = base.asides(value)
    return Parsed(
        asked=asked,
        stream=bool(stream),
        est_tokens=prompt.tokens,
        max_tokens=base.positive(value.get("max_output_tokens")),
        wanted_context_tokens=None,
        needs=base.needs(route, tools=bool(tools), images=bool(prompt.images)),
        prefixes=tuple(prompt.marks),
        buffered=bool(tools) or base.mapping(base.mapping(text).get("format")).get("type", "text") != "text",
        user=asides.user,
        tags=asides.tags,
        model_key="model",
        fallback=asides.fallback,
    )


def _read_input(value: dict[str, Any], prompt: Prompt) -> None:
    given = base.optional(value, "input", (str, list), "a string or a list of items")
    if given is None:
        raise BadRequest("'input' is required")
    if isinstance(given, str):
        prompt.blocks(given)
        return
    for item in given:
        if not isinstance(item, dict):
            raise BadRequest(
                f"'input' must be a string or a list of objects; it holds {base.json_type(item)}"
            )
        _read_item(item, prompt)
        prompt.mark()


def _read_item(item: dict[str, Any], prompt: Prompt) -> None:
    """A message; a call, its output and the like count as they stand."""
    content = item.get("content")
    if content is None:
        prompt.value(item)
    elif isinstance(content, str):
        prompt.message(str(item.get("role")), content)
    elif isinstance(content, list):
        prompt.text(str(item.get("role")))
        for part in content:
            _read_part(part, prompt)
    else:
        raise BadRequest(f"an item's 'content' must be a string or a list, not {base.json_type(content)}")


def _read_part(part: object, prompt: Prompt) -> None:
    if not isinstance(part, dict):
        raise BadRequest("an item's 'content' must be a string or a list of objects")
    text = part.get("text")
    if isinstance(text, str):
        prompt.text(text)
    if part.get("type") == "input_image":
        url = part.get("image_url")
        prompt.image(url if isinstance(url, str) else "")


def error_record(error: ApiError) -> bytes:
    """The last event of a stream that broke, in both spellings that clients look for."""
    told = openai.error_object(error)
    event = {"type": "error", "sequence_number": 0, "error": told, **told}
    event["type"] = "error"  # the kind of error stands inside
    return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"


def judge(payload: bytes) -> Verdict:
    """What an event is."""
    value = base.read_record(payload)
    if value is None:
        return Verdict.MALFORMED
    kind = value.get("type")
    if kind in ("error", "response.failed") or (kind is None and value.get("error")):
        return Verdict.ERROR
    if not isinstance(kind, str):
        return Verdict.MALFORMED
    if kind in _ENDS:
        return Verdict.END
    spoke = value.get("delta") if kind.endswith(".delta") else kind == "response.output_item.done"
    return Verdict.CONTENT if spoke else Verdict.SILENT


def ending(last: Sequence[bytes]) -> Ending:
    """How a stream ended: its last event holds the whole response."""
    value = base.read_record(last[-1]) if last else {}
    if value is None:
        return Ending("error", message=base.UNREADABLE)
    if value.get("type") not in _ENDS:
        return Ending("truncated")
    return _counted("complete", base.mapping(value.get("response")), base.mapping(value.get("timings")))


def _counted(how: How, response: dict[str, Any], timings: dict[str, Any]) -> Ending:
    usage = base.mapping(response.get("usage"))
    details = base.mapping(usage.get("input_tokens_details"))
    completion = base.count(usage.get("output_tokens"))
    return Ending(
        how,
        "stop" if response.get("status") == "completed" else "length",
        prompt_tokens=base.count(usage.get("input_tokens")),
        cached_tokens=base.count(timings.get("cache_n", details.get("cached_tokens"))),
        completion_tokens=completion,
        prefill_ms=base.milliseconds(timings.get("prompt_ms")),
        decode_ms=base.milliseconds(timings.get("predicted_ms")),
        no_output=completion == 0,
    )


def whole(route: Route, body: bytes) -> Ending:
    """How a non-streaming answer ended."""
    del route
    value = base.read_record(body)
    if value is None:
        return Ending("truncated", message="the node's answer is not a JSON object")
    if value.get("error") or value.get("status") == "failed":
        return Ending("error", message=base.error_text(body))
    if value.get("object") != "response" or value.get("status") not in ("completed", "incomplete"):
        return Ending("truncated", message="the node's answer is no finished response")
    return _counted("complete", value, base.mapping(value.get("timings")))


def proper_end(last: Sequence[bytes]) -> bytes:
    """Never asked for: Ollama's stop on a repeated token cannot be told from a broken stream here."""
    del last
    return b""


def frame(payload: bytes) -> bytes:
    """One event as it stands in the stream."""
    name = base.mapping(base.read_record(payload)).get("type")
    named = isinstance(name, str) and name.replace(".", "").isidentifier()
    head = b"event: " + str(name).encode() + b"\n" if named else b""
    return head + openai.frame(payload)


RESPONSES = Dialect(
    openai.OPENAI.name,
    "sse",
    b"text/event-stream",
    (b'"error"', b'"response.completed"', b'"response.incomplete"', b'"response.failed"'),
    parse,
    openai.error_body,
    error_record,
    judge,
    ending,
    whole,
    proper_end,
    frame,
    event=b"response.output_text.delta",
    ping=b": ping\n\n",
    error_type=dict,
)
