"""The OpenAI dialect: chat completions, text completions, embeddings (docs/backends.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from herd.dialects import base
from herd.dialects.base import Dialect, Ending, How, Parsed, Prompt, Verdict
from herd.errors import ApiError, BadRequest
from herd_node.protocol.routes import Route

_DONE = b"[DONE]"
#: What llama-server sends between the answers to several prompts.
_NOTHING = b"null"
#: What the records of a stream are called.
_CHUNKS = ("chat.completion.chunk", "text_completion")

#: kind of error -> (type, code); the status is the error's own.
_ERRORS: dict[str, tuple[str, str | None]] = {
    "bad_request": ("invalid_request_error", None),
    "forbidden": ("permission_error", None),
    "model_not_found": ("invalid_request_error", "model_not_found"),
    "not_found": ("invalid_request_error", None),
    "method_not_allowed": ("invalid_request_error", None),
    "too_large": ("invalid_request_error", "request_too_large"),
    "saturated": ("server_error", "overloaded"),
    "upstream_failed": ("server_error", "upstream_failed"),
    "timeout": ("server_error", "timeout"),
    "rate_limited": ("rate_limit_error", None),
    "not_offered": ("invalid_request_error", "not_offered"),
}


def parse(route: Route, body: bytes) -> Parsed:
    """Read the head of a request. Raises BadRequest with one sentence."""
    head = base.read_object(body)
    value = head.value
    asked = base.model_names(value, "model", missing_model)
    base.refuse_twins(head, "model")
    stream = base.optional(value, "stream", bool, "a boolean")
    prompt = Prompt(cut=head.cut)
    _READERS[route.kind](value, prompt)
    tools = base.objects(value, "tools")
    limit = base.positive(value.get("max_completion_tokens")) or base.positive(value.get("max_tokens"))
    embedding, asides = route.kind == "embedding", base.asides(value)
    return Parsed(  # by place, at half the cost
        asked,
        bool(stream) and not embedding,
        prompt.tokens,
        1 if embedding else limit,
        None,
        base.needs(route, tools=bool(tools), images=bool(prompt.images)),
        tuple(prompt.marks),
        bool(tools) or value.get("response_format") is not None,
        asides.user,
        asides.tags,
        "model",
        (),
        asides.fallback,
    )


def missing_model() -> ApiError:
    return BadRequest("you must provide a model parameter")


def _read_chat(value: dict[str, Any], prompt: Prompt) -> None:
    messages = base.objects(value, "messages")
    if value.get("messages") is None:  # none at all is for the backend to judge: llama-server takes it
        raise BadRequest("'messages' is required")
    if value.get("tools"):
        prompt.value(value["tools"])
    if value.get("response_format"):
        prompt.value(value["response_format"])
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) and not message.get("tool_calls"):
            prompt.said(str(message.get("role")), content)
        else:
            _read_message(message, content, prompt)
            prompt.mark()


def _read_message(message: dict[str, Any], content: object, prompt: Prompt) -> None:
    role = str(message.get("role"))
    if isinstance(content, str):
        prompt.message(role, content)
    elif isinstance(content, list):
        prompt.text(role)
        for part in content:
            _read_part(part, prompt)
    elif content is None:
        prompt.text(role)
    else:
        raise BadRequest(f"a message's 'content' must be a string or a list, not {base.json_type(content)}")
    if message.get("tool_calls"):
        prompt.value(message["tool_calls"])


def _read_part(part: object, prompt: Prompt) -> None:
    if not isinstance(part, dict):
        raise BadRequest("a message's 'content' must be a string or a list of objects")
    text = part.get("text")
    if isinstance(text, str):
        prompt.text(text)
    image = part.get("image_url")
    if image is not None:
        url = image.get("url") if isinstance(image, dict) else image
        prompt.image(url if isinstance(url, str) else "")


def _read_completion(value: dict[str, Any], prompt: Prompt) -> None:
    text = base.optional(value, "prompt", (str, list), "a string or a list")
    if text is None:
        raise BadRequest("'prompt' is required")
    if isinstance(text, str):
        prompt.blocks(text)
    else:
        _read_list(text, "prompt", prompt)
    suffix = base.optional(value, "suffix", str, "a string")
    if suffix:
        prompt.text(suffix)


def _read_embedding(value: dict[str, Any], prompt: Prompt) -> None:
    given = base.optional(value, "input", (str, list), "a string or a list")
    if given is None:
        raise BadRequest("'input' is required")
    if isinstance(given, str):
        prompt.text(given)
    else:
        _read_list(given, "input", prompt)


def _read_list(given: list[Any], key: str, prompt: Prompt) -> None:
    """Texts, tokens, lists of tokens; llama-server takes a mixture, and objects with a text."""
    for item in given:
        if isinstance(item, str):
            prompt.text(item)
        elif isinstance(item, int | list | dict) and not isinstance(item, bool):
            prompt.value(item)
        else:
            raise BadRequest(f"'{key}' must be a string, a list of strings or a list of tokens")


_READERS = {"chat": _read_chat, "completion": _read_completion, "embedding": _read_embedding}


def error_body(error: ApiError, request_id: str | None) -> bytes:
    """`{"error": {message, type, param, code}}`."""
    del request_id
    return orjson.dumps({"error": error_object(error)})


def error_record(error: ApiError) -> bytes:
    """The last record of a stream that broke: no `[DONE]` follows it."""
    return b"data: " + orjson.dumps({"error": error_object(error)}) + b"\n\n"


def error_object(error: ApiError) -> dict[str, object]:
    kind, code = _ERRORS.get(error.kind, (_type_by_status(error.status), None))
    return {"message": error.message, "type": kind, "param": None, "code": code}


def _type_by_status(status: int) -> str:
    if status == 404:
        return "not_found_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def judge(payload: bytes) -> Verdict:
    """What a record is."""
    if payload == _DONE:
        return Verdict.END
    if payload == _NOTHING:
        return Verdict.SILENT
    value = base.read_record(payload)
    if value is None:
        return Verdict.MALFORMED
    if value.get("error") or value.get("object") == "error":
        return Verdict.ERROR
    choices = value.get("choices")
    if not isinstance(choices, list):
        return Verdict.MALFORMED
    verdict = Verdict.SILENT
    for choice in choices:
        if not isinstance(choice, dict):
            return Verdict.MALFORMED
        if _speaks(choice):
            verdict = Verdict.CONTENT
    return verdict


def _speaks(choice: dict[str, Any]) -> bool:
    if choice.get("finish_reason") or choice.get("text"):
        return True
    for key, said in base.mapping(choice.get("delta")).items():  # noqa: SIM110 - a generator costs more
        if said and key != "role":
            return True
    return False


def ending(last: Sequence[bytes]) -> Ending:
    """How a stream ended, from its last records (finish, usage, `[DONE]`)."""
    usage = timings = finish = None
    value: dict[str, Any] = {}
    for payload in last:
        if payload in (_DONE, _NOTHING):
            continue
        record = base.read_record(payload)
        if record is None:
            return Ending("error", message=base.UNREADABLE)
        value = record
        usage, timings = value.get("usage") or usage, value.get("timings") or timings
        finish = next(filter(None, _finishes(value)), finish)
    if not last or last[-1] != _DONE:
        # Ollama's own stop on a repeated token ends here too; a runner that died says so by an empty model
        # in its last chunk (docs/backends.md).
        by_repeat = value.get("object") in _CHUNKS and value.get("model")
        return Ending("repeat_abort" if by_repeat and not finish else "truncated", finish)
    if finish is None:
        return Ending("truncated", message="the node ended its answer without a finish_reason")
    return _counted("complete", finish, usage, timings)


def _finishes(value: dict[str, Any]) -> list[str | None]:
    """Why each of the choices ended; None for one that did not."""
    choices = value.get("choices")
    found: list[str | None] = []
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            reason = choice.get("finish_reason")
            found.append(reason if isinstance(reason, str) and reason else None)
    return found


def _counted(how: How, finish: str | None, usage: object, timings: object) -> Ending:
    usage = base.mapping(usage)
    prompt, completion = base.count(usage.get("prompt_tokens")), base.count(usage.get("completion_tokens"))
    cached = None
    if "prompt_tokens_details" in usage:
        cached = base.count(base.mapping(usage["prompt_tokens_details"]).get("cached_tokens"))
    prefill_ms = decode_ms = None
    if timings is not None:  # llama-server's
        timings = base.mapping(timings)
        if "cache_n" in timings:
            cached = base.count(timings["cache_n"])
        if prompt is None and (uncached := base.count(timings.get("prompt_n"))) is not None:
            prompt = uncached + (cached or 0)
        if "completion_tokens" not in usage:
            completion = base.count(timings.get("predicted_n"))
        prefill_ms = base.milliseconds(timings.get("prompt_ms"))
        decode_ms = base.milliseconds(timings.get("predicted_ms"))
    no_output = completion == 0 and finish is not None  # embeddings have none, and no finish_reason
    return Ending(how, finish, prompt, cached, completion, prefill_ms, decode_ms, None, no_output)


def whole(route: Route, body: bytes) -> Ending:
    """How a non-streaming answer ended."""
    value = base.read_record(body)
    if value is None:
        return Ending("truncated", message="the node's answer is not a JSON object")
    if value.get("error") or value.get("object") == "error":
        return Ending("error", message=base.error_text(body))
    if route.kind == "embedding":
        how: How = "complete" if isinstance(value.get("data"), list) else "truncated"
        return _counted(how, None, value.get("usage"), value.get("timings"))
    reasons = _finishes(value)
    if not reasons or None in reasons:
        return Ending("truncated", message="the node's answer has no finish_reason")
    return _counted("complete", reasons[0], value.get("usage"), value.get("timings"))


def proper_end(last: Sequence[bytes]) -> bytes:
    """A finish chunk and `[DONE]`, made after the last chunk that came."""
    value = base.mapping(base.read_record(last[-1]))
    said: dict[str, object] = {"text": ""} if value.get("object") == "text_completion" else {"delta": {}}
    value["choices"] = [{"index": 0, **said, "finish_reason": "stop"}]
    value.pop("usage", None)
    return frame(orjson.dumps(value)) + frame(_DONE)


def progress(route: Route, model: str, text: str, wall_s: float) -> bytes:
    """A chunk before the backend's first one, with text where reasoning stands."""
    if route.kind != "chat":
        return b""
    delta = {"role": "assistant", "reasoning_content": text}
    chunk = {
        "id": "chatcmpl-waiting",
        "object": _CHUNKS[0],
        "created": int(wall_s),
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }
    return frame(orjson.dumps(chunk))


def frame(payload: bytes) -> bytes:
    """One record as it stands in the stream."""
    return b"data: " + payload.replace(b"\n", b"\ndata: ") + b"\n\n"


OPENAI = Dialect(
    "openai",
    "sse",
    b"text/event-stream",
    (b'"error"',),
    parse,
    error_body,
    error_record,
    judge,
    ending,
    whole,
    proper_end,
    frame,
    ping=b": ping\n\n",
    progress=progress,
    error_type=dict,
)
