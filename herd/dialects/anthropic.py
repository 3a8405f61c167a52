"""The Anthropic dialect: messages and their count of tokens (docs/backends.md, "Anthropic's dialect").

Passed on only to backends that speak it themselves. llama-server answers here with errors of OpenAI's shape,
and both backends end a broken stream without a word; what the caller sees has Anthropic's shape all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from herd.dialects import base
from herd.dialects.base import Dialect, Ending, How, Parsed, Prompt, Verdict
from herd.errors import ApiError, BadRequest
from herd_node.protocol.routes import Route

#: kind of error -> type; the status is the error's own, but for those in `_STATUSES`.
_ERRORS = {
    "bad_request": "invalid_request_error",
    "forbidden": "permission_error",
    "model_not_found": "not_found_error",
    "not_found": "not_found_error",
    "method_not_allowed": "invalid_request_error",
    "too_large": "request_too_large",
    "saturated": "overloaded_error",
    "upstream_failed": "api_error",
    "timeout": "timeout_error",
    "rate_limited": "rate_limit_error",
}
#: By status, for what a backend refused.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
_STATUSES = {"saturated": 529}

#: Fields that a backend would read in its own way, or fail over, when they are of another type.
_FIELDS: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
    ("stream", bool, "a boolean"),
    ("max_tokens", int, "a whole number"),
    ("temperature", (int, float), "a number"),
    ("top_p", (int, float), "a number"),
    ("top_k", int, "a whole number"),
    ("stop_sequences", list, "a list of strings"),
    ("tool_choice", dict, "an object"),
    ("thinking", dict, "an object"),
    ("metadata", dict, "an object"),
)


def parse(route: Route, body: bytes) -> Parsed:
    """Read the head of a request. Raises BadRequest with one sentence."""
    head = base.read_object(body)
    value = head.value
    asked = base.model_names(value, "model", _missing_model)
    base.refuse_twins(head, "model")
    _check_fields(value)
    prompt = Prompt(cut=head.cut)
    tools = base.objects(value, "tools")
    if tools:
        prompt.value(tools)
    _read_system(value, prompt)
    messages = base.objects(value, "messages")
    if not messages:
        raise BadRequest("'messages' is required and must hold at least one message")
    for message in messages:
        _read_message(message, prompt)
        prompt.mark()
    asides = base.asides(value)
    return Parsed(
        asked=asked,
        stream=route.kind == "chat" and value.get("stream") is True,
        est_tokens=prompt.tokens,
        max_tokens=base.positive(value.get("max_tokens")),
        wanted_context_tokens=None,
        needs=base.needs(route, tools=bool(tools), images=bool(prompt.images)),
        prefixes=tuple(prompt.marks),
        buffered=bool(tools),
        user=asides.user,
        tags=asides.tags,
        model_key="model",
        fallback=asides.fallback,
    )


def _missing_model() -> ApiError:
    return BadRequest("model is required")


def _check_fields(value: dict[str, Any]) -> None:
    for key, kind, expected in _FIELDS:
        found = base.optional(value, key, kind, expected)
        if isinstance(found, bool) and kind is not bool:
            raise BadRequest(f"'{key}' must be {expected}, not a boolean")
    if value.get("max_tokens") is not None and value["max_tokens"] < 1:
        raise BadRequest("'max_tokens' must be at least 1")
    if not all(isinstance(text, str) for text in value.get("stop_sequences") or ()):
        raise BadRequest("'stop_sequences' must be a list of strings")


def _read_system(value: dict[str, Any], prompt: Prompt) -> None:
    """A text, or text blocks (each may carry `cache_control`, which is the backend's business)."""
    system = base.optional(value, "system", (str, list), "a string or a list of text blocks")
    if isinstance(system, str):
        prompt.text(system)
        return
    for block in system or ():
        if not isinstance(block, dict) or not isinstance(block.get("text"), str):
            raise BadRequest("'system' must be a string or a list of text blocks")
        prompt.text(block["text"])


def _read_message(message: dict[str, Any], prompt: Prompt) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise BadRequest(f"a message's 'role' must be a string, not {base.json_type(role)}")
    if isinstance(content, str):
        prompt.message(role, content)
    elif isinstance(content, list):
        prompt.text(role)
        for block in content:
            _read_block(block, prompt)
    else:
        raise BadRequest(
            f"a message's 'content' must be a string or a list of blocks, not {base.json_type(content)}"
        )


def _read_block(block: object, prompt: Prompt) -> None:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise BadRequest("a message's 'content' must be a string or a list of blocks with a 'type'")
    match block["type"]:
        case "text" | "thinking" as kind:
            text = block.get(kind)
            if not isinstance(text, str):
                raise BadRequest(f"a {kind} block's '{kind}' must be a string, not {base.json_type(text)}")
            prompt.text(text)
        case "image" | "document":
            _read_source(block, prompt)
        case "tool_result":
            _read_result(block.get("content"), prompt)
        case _:  # tool_use, and what the backends know and we do not
            prompt.value(block)


def _read_source(block: dict[str, Any], prompt: Prompt) -> None:
    source = block.get("source")
    if not isinstance(source, dict):
        raise BadRequest(f"the 'source' of an {block['type']} block must be an object")
    data = source.get("data", source.get("url"))
    reference = data if isinstance(data, str) else ""
    if block["type"] == "image":
        prompt.image(reference)
    elif source.get("type") == "text":
        prompt.text(reference)
    else:  # a file: what it costs, nobody knows before it is read
        prompt.text(reference[:256])


def _read_result(content: object, prompt: Prompt) -> None:
    """What a tool gave back: a text, blocks, or nothing."""
    if isinstance(content, str):
        prompt.text(content)
    elif isinstance(content, list):
        for block in content:
            _read_block(block, prompt)
    elif content is not None:
        raise BadRequest("a tool_result's 'content' must be a string or a list of blocks")


def status(error: ApiError) -> int:
    """Saturated is 529 here."""
    return _STATUSES.get(error.kind, error.status)


def error_body(error: ApiError, request_id: str | None) -> bytes:
    """`{"type": "error", "error": {type, message}, "request_id"}`."""
    return orjson.dumps({**_error_object(error), "request_id": request_id})


def error_record(error: ApiError) -> bytes:
    """The last event of a stream that broke: no `message_stop` follows it."""
    return b"event: error\ndata: " + orjson.dumps(_error_object(error)) + b"\n\n"


def _error_object(error: ApiError) -> dict[str, object]:
    kind = _ERRORS.get(error.kind) or _TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def judge(payload: bytes) -> Verdict:
    """What an event is. A block that begins a tool's call is content: the caller learns its name."""
    value = base.read_record(payload)
    if value is None:
        return Verdict.MALFORMED
    match value.get("type"):
        case "content_block_delta":
            delta = base.mapping(value.get("delta"))
            spoke = any(delta[key] for key in delta if key != "type")
            return Verdict.CONTENT if spoke else Verdict.SILENT
        case "message_stop":
            return Verdict.END
        case "error":
            return Verdict.ERROR
        case "content_block_start":
            begins_call = base.mapping(value.get("content_block")).get("type") == "tool_use"
            return Verdict.CONTENT if begins_call else Verdict.SILENT
        case "message_delta":
            return Verdict.CONTENT if _reason(value.get("delta")) else Verdict.SILENT
        case str():
            return Verdict.SILENT
    return Verdict.ERROR if value.get("error") else Verdict.MALFORMED  # llama-server's own shape


def ending(last: Sequence[bytes]) -> Ending:
    """How a stream ended, from its first event and its last ones (`message_delta`, `message_stop`).

    llama-server counts the prompt in `message_start`; what stands there on Ollama is a guess, and the count
    comes in `message_delta`.
    """
    values = [base.read_record(payload) for payload in last]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Ending("error", message=base.UNREADABLE)
    reason, usage = None, dict[str, Any]()
    for value in known:
        if value.get("type") == "message_start":
            usage |= base.mapping(base.mapping(value.get("message")).get("usage"))
        elif value.get("type") == "message_delta":
            reason = _reason(value.get("delta")) or reason
            usage |= base.mapping(value.get("usage"))
    if not known or known[-1].get("type") != "message_stop":
        return Ending("truncated", reason)
    if reason is None:
        return Ending("truncated", message="the node ended its answer without a stop_reason")
    return _counted("complete", reason, usage)


def _reason(said: object) -> str | None:
    reason = base.mapping(said).get("stop_reason")
    return reason if isinstance(reason, str) and reason else None


def _counted(how: How, reason: str | None, usage: dict[str, Any]) -> Ending:
    """`input_tokens` leaves out what was read from the prompt cache, and what was written to it."""
    prompt, completion = base.count(usage.get("input_tokens")), base.count(usage.get("output_tokens"))
    cached = base.count(usage.get("cache_read_input_tokens"))
    if prompt is not None:
        prompt += (cached or 0) + (base.count(usage.get("cache_creation_input_tokens")) or 0)
    return Ending(
        how,
        reason,
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        no_output=completion == 0 and reason is not None,
    )


def whole(route: Route, body: bytes) -> Ending:
    """How a non-streaming answer ended."""
    value = base.read_record(body)
    if value is None:
        return Ending("truncated", message="the node's answer is not a JSON object")
    if value.get("error") or value.get("type") == "error":
        return Ending("error", message=base.error_text(body))
    if route.kind == "count":
        counted = base.count(value.get("input_tokens"))
        return Ending("truncated" if counted is None else "complete", prompt_tokens=counted)
    if value.get("type") != "message" or _reason(value) is None:
        return Ending("truncated", message="the node's answer has no stop_reason")
    return _counted("complete", _reason(value), base.mapping(value.get("usage")))


def proper_end(last: Sequence[bytes]) -> bytes:
    """Never asked for: Ollama's stop on a repeated token cannot be told from a broken stream here."""
    del last
    return b""


def frame(payload: bytes) -> bytes:
    """One event as it stands in the stream; clients go by its name."""
    name = base.mapping(base.read_record(payload)).get("type")
    data = b"data: " + payload.replace(b"\n", b"\ndata: ") + b"\n\n"
    return (
        b"event: " + name.encode() + b"\n" + data if isinstance(name, str) and name.isidentifier() else data
    )


def guess(tokens: float) -> bytes:
    """The answer to a count of tokens that nobody could make."""
    return orjson.dumps({"input_tokens": max(1, round(tokens))})


ANTHROPIC = Dialect(
    "anthropic",
    "sse",
    b"text/event-stream",
    (b'"error"', b'"message_stop"'),
    parse,
    error_body,
    error_record,
    judge,
    ending,
    whole,
    proper_end,
    frame,
    status=status,
    keeps_first=True,
    event=b"content_block_delta",
    ping=b'event: ping\ndata: {"type": "ping"}\n\n',
    guess=guess,
)
