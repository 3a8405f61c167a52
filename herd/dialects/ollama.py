"""The Ollama dialect: chat, generate, embed, embeddings, show (docs/backends.md)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from herd.dialects import base
from herd.dialects.base import Dialect, Ending, How, Parsed, Prompt, Verdict
from herd.errors import ApiError, BadRequest, ModelNotFound
from herd.request import Fallback, LoadOptions
from herd_node.protocol.routes import Route

#: Options that belong to the runner and not to the request, beside num_ctx, and their types.
_LOAD_OPTIONS: dict[str, type] = {
    "num_batch": int,
    "num_gpu": int,
    "main_gpu": int,
    "use_mmap": bool,
    "num_thread": int,
    "draft_num_predict": int,
}
#: Ollama raises a smaller num_ctx to this.
_LEAST_CONTEXT_TOKENS = 4

_THINK_LEVELS = frozenset({"low", "medium", "high", "max"})
#: Fields of generate that hold a model's own tokens, or its template.
_FOR_ONE_MODEL = ("raw", "context", "template", "suffix")
#: What a duration of nothing is made of.
_NO_TIME = frozenset("+-0.nuµμmsh")


def parse(route: Route, body: bytes) -> Parsed:
    """Read the head of a request. Raises BadRequest (or ModelNotFound, as Ollama does) with one sentence."""
    head = base.read_object(body)
    value = head.value
    key = _key_of_model(route, value)
    asked = base.model_names(value, key, lambda: _missing_model(route))
    base.refuse_twins(head, key)
    stream = base.optional(value, "stream", bool, "a boolean")
    options = base.optional(value, "options", dict, "an object") or {}
    prompt = Prompt(cut=head.cut)
    _READERS[route.path](value, prompt)
    tools, think = base.objects(value, "tools"), value.get("think")
    thinking = think is True or (isinstance(think, str) and think in _THINK_LEVELS)
    asides = base.asides(value)
    return Parsed(  # by place, at half the cost
        asked,
        stream is not False and route.kind in ("chat", "generate"),
        prompt.tokens,
        1 if route.kind == "embedding" else base.positive(options.get("num_predict")),
        _context(options.get("num_ctx")),
        base.needs(route, tools=bool(tools), images=bool(prompt.images), thinking=thinking),
        tuple(prompt.marks),
        bool(tools) or bool(value.get("format")),
        asides.user,
        asides.tags,
        key,
        _load_options(options) if options else (),
        _fallback_of(route, value, asides.fallback),
    )


def _context(value: object) -> int | None:
    """Ollama takes any number, and cuts its fraction off; anything else it refuses itself."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return max(_LEAST_CONTEXT_TOKENS, int(value))


def _load_options(options: dict[str, Any]) -> LoadOptions:
    """Those that are there, by name. Null is absent; of a wrong type it is Ollama that must say so."""
    return tuple(
        (name, options[name]) for name, kind in _LOAD_OPTIONS.items() if type(options.get(name)) is kind
    )


def _fallback_of(route: Route, value: dict[str, Any], fallback: Fallback) -> Fallback:
    """What loads or unloads a model means that one. What is written for one, or unloads it afterwards, may go
    to the caller's other models, and to none that it did not name."""
    kind = route.kind
    if kind not in ("chat", "generate"):
        return fallback
    if not value.get("messages" if kind == "chat" else "prompt"):
        return "none"
    for_one_model = kind == "generate" and any(map(value.get, _FOR_ONE_MODEL))
    if fallback != "none" and (for_one_model or _is_zero(value.get("keep_alive"))):
        return "chain"
    return fallback


def _is_zero(keep_alive: object) -> bool:
    """A duration of nothing: `0`, `"0"`, `"0s"`, `"0m0s"`."""
    if isinstance(keep_alive, str):
        return "0" in keep_alive and _NO_TIME.issuperset(keep_alive)
    return isinstance(keep_alive, int | float) and not isinstance(keep_alive, bool) and keep_alive == 0


def _key_of_model(route: Route, value: dict[str, Any]) -> str:
    """`model`, or the old `name` of show where there is no model: `MODEL` is one to Ollama."""
    if route.kind != "show" or "name" not in value or value.get("model") is not None:
        return "model"
    return "model" if any(key != "model" and key.casefold() == "model" for key in value) else "name"


def _missing_model(route: Route) -> ApiError:
    if route.path in ("/api/generate", "/api/embed"):
        return ModelNotFound("model '' not found")
    return BadRequest("model is required")


def _read_chat(value: dict[str, Any], prompt: Prompt) -> None:
    messages = base.objects(value, "messages")
    if value.get("tools"):
        prompt.value(value["tools"])
    if value.get("format"):
        prompt.value(value["format"])
    for message in messages:
        role, content = str(message.get("role")), base.optional(message, "content", str, "a string") or ""
        if not message.get("tool_calls") and message.get("images") is None:
            prompt.said(role, content)
            continue
        prompt.message(role, content)
        if message.get("tool_calls"):
            prompt.value(message["tool_calls"])
        _read_images(message, prompt)
        prompt.mark()


def _read_generate(value: dict[str, Any], prompt: Prompt) -> None:
    for key in ("system", "template", "suffix"):
        text = base.optional(value, key, str, "a string")
        if text:
            prompt.text(text)
    if value.get("format"):
        prompt.value(value["format"])
    _read_images(value, prompt)
    prompt.blocks(base.optional(value, "prompt", str, "a string") or "")


def _read_images(value: dict[str, Any], prompt: Prompt) -> None:
    for image in base.optional(value, "images", list, "a list") or ():
        if not isinstance(image, str):
            raise BadRequest(f"'images' must be a list of base64 strings; it holds {base.json_type(image)}")
        prompt.image(image)


def _read_embed(value: dict[str, Any], prompt: Prompt) -> None:
    given = value.get("input")
    if given is None:
        return
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("invalid input type")
    for text in texts:
        prompt.text(text)


def _read_embeddings(value: dict[str, Any], prompt: Prompt) -> None:
    prompt.text(base.optional(value, "prompt", str, "a string") or "")


def _read_show(value: dict[str, Any], prompt: Prompt) -> None:
    base.optional(value, "verbose", bool, "a boolean")


_READERS = {
    "/api/chat": _read_chat,
    "/api/generate": _read_generate,
    "/api/embed": _read_embed,
    "/api/embeddings": _read_embeddings,
    "/api/show": _read_show,
}


def error_body(error: ApiError, request_id: str | None) -> bytes:
    """`{"error": "text"}`."""
    del request_id
    return orjson.dumps({"error": _sentence(error)})


def _sentence(error: ApiError) -> str:
    """Clients know a missing model by Ollama's very words."""
    if isinstance(error, ModelNotFound) and error.model is not None:
        return f"model '{error.model}' not found"
    return error.message


def error_record(error: ApiError) -> bytes:
    """The last line of a stream that broke: no `done` line follows it."""
    return orjson.dumps({"error": error.message}) + b"\n"


def judge(payload: bytes) -> Verdict:
    """What a line is."""
    value = base.read_record(payload)
    if value is None:
        return Verdict.MALFORMED
    if value.get("error"):
        return Verdict.ERROR
    if value.get("done") is True:
        return Verdict.END
    message = value.get("message")
    source = message if isinstance(message, dict) else value
    spoke = any(source.get(key) for key in ("content", "thinking", "tool_calls", "response"))
    return Verdict.CONTENT if spoke else Verdict.SILENT


def ending(last: Sequence[bytes]) -> Ending:
    """How a stream ended: complete means a line with `done: true`."""
    if not last:
        return Ending("truncated")
    value = base.read_record(last[-1])
    if value is None:
        return Ending("error", message=base.UNREADABLE)
    if _is_over(value):
        return _counted("complete", value)
    return Ending("repeat_abort")


def _counted(how: How, value: dict[str, Any]) -> Ending:
    reason = value.get("done_reason")
    reason = reason if isinstance(reason, str) and reason else None
    completion = base.count(value.get("eval_count"))
    prompt = base.count(value.get("prompt_eval_count"))
    if completion is None and prompt is not None and reason not in ("load", "unload", None):
        completion = 0  # Ollama leaves zero counters out
    return Ending(
        how,
        reason,
        prompt_tokens=prompt,
        completion_tokens=completion,
        prefill_ms=base.milliseconds(value.get("prompt_eval_duration"), 1e-6),
        decode_ms=base.milliseconds(value.get("eval_duration"), 1e-6),
        load_ms=base.milliseconds(value.get("load_duration"), 1e-6),
        no_output=completion == 0,
    )


def whole(route: Route, body: bytes) -> Ending:
    """How a non-streaming answer ended. `done: false` is Ollama's stop on a repeated token."""
    value = base.read_record(body)
    if value is None:
        return Ending("truncated", message="the node's answer is not a JSON object")
    if value.get("error"):
        return Ending("error", message=base.error_text(body))
    if route.kind == "show":
        return Ending("complete")
    if route.kind == "embedding":
        known = isinstance(value.get("embeddings", value.get("embedding")), list)
        return _counted("complete" if known else "truncated", {**value, "done_reason": None})
    if _is_over(value):
        return _counted("complete", value)
    if value.get("done") is False:
        return Ending("repeat_abort", "stop")
    return Ending("truncated", message="the node's answer has no 'done'")


def _is_over(value: dict[str, Any]) -> bool:
    """A prompt that was only rendered (`_debug_render_only`) is over, though nothing is said to be done."""
    return value.get("done") is True or bool(value.get("_debug_info"))


def progress(route: Route, model: str, text: str, wall_s: float) -> bytes:
    """A line before the backend's first one, with text where thoughts stand."""
    at = datetime.fromtimestamp(wall_s, UTC).isoformat().replace("+00:00", "Z")
    line: dict[str, object] = {"model": model, "created_at": at}
    if route.kind == "chat":
        line["message"] = {"role": "assistant", "content": "", "thinking": text}
    else:
        line |= {"response": "", "thinking": text}
    return frame(orjson.dumps({**line, "done": False}))


def proper_end(last: Sequence[bytes]) -> bytes:
    """A done line made after the last line that came."""
    value = base.mapping(base.read_record(last[-1]))
    final: dict[str, object] = {"model": value.get("model"), "created_at": value.get("created_at")}
    if "message" in value:
        final["message"] = {"role": "assistant", "content": ""}
    else:
        final["response"] = ""
    return frame(orjson.dumps({**final, "done": True, "done_reason": "stop"}))


def frame(payload: bytes) -> bytes:
    """One record as it stands in the stream."""
    return payload + b"\n"


OLLAMA = Dialect(
    "ollama",
    "ndjson",
    b"application/x-ndjson",
    (b'"error"', b'"done":true', b'"done": true'),
    parse,
    error_body,
    error_record,
    judge,
    ending,
    whole,
    proper_end,
    frame,
    error_type=str,
    progress=progress,
)
