"""A llama-server chat stream → Ollama's lines, or one folded object. Pure.

payload          role chunk, ping        → nothing
                 content, thinking       → one line, `done: false`
                 pieces of a tool call   → collected
                 error                   → `{"error": …}`; nothing more is sent
                 finish_reason           → remembered, with `timings`
[DONE] or the end of the body            → the tool calls whole, then the `done: true` line
the end of the body without a finish     → Truncated
"""

from __future__ import annotations

from collections.abc import Callable

import orjson

from herd_node.translate.base import Reader, Truncated
from herd_node.translate.errors import error_answer, in_band_error
from herd_node.translate.moments import nanoseconds, rfc3339

Line = dict[str, object]
Dialect = Callable[[str, str, str, str, list[Line]], Line]
"""(model, created_at, text, thinking, tool calls) → the line up to `done`, its keys in Ollama's order."""


def chat_line(model: str, created_at: str, text: str, thinking: str, tool_calls: list[Line]) -> Line:
    message: Line = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if tool_calls:
        message["tool_calls"] = tool_calls
    return {"model": model, "created_at": created_at, "message": message}


def generate_line(model: str, created_at: str, text: str, thinking: str, tool_calls: list[Line]) -> Line:
    line: Line = {"model": model, "created_at": created_at, "response": text}
    if thinking:
        line["thinking"] = thinking
    return line


class _ToolCalls:
    """Pieces of tool calls by index."""

    def __init__(self) -> None:
        self._parts: dict[int, dict[str, str]] = {}

    def add(self, pieces: object) -> None:
        for piece in map(_object, pieces if isinstance(pieces, list) else ()):
            index, function = _count(piece, "index"), _object(piece.get("function"))
            part = self._parts.setdefault(index, {"id": "", "name": "", "arguments": ""})
            part["id"] = _text(piece, "id") or part["id"]
            part["name"] += _text(function, "name")
            part["arguments"] += _text(function, "arguments")

    def whole(self) -> tuple[list[Line], str]:
        """The calls, and the text of those whose arguments never became an object (cut by the length)."""
        calls: list[Line] = []
        broken = ""
        for _, part in sorted(self._parts.items()):
            try:
                arguments = orjson.loads(part["arguments"] or "{}")
            except orjson.JSONDecodeError:
                arguments = None
            if not isinstance(arguments, dict):
                broken += part["arguments"]
                continue
            function = {"index": len(calls), "name": part["name"], "arguments": arguments}
            calls.append({"id": part["id"] or f"call_{len(calls):08d}", "function": function})
        return calls, broken


class GenerationReader(Reader):
    """Reads `/v1/chat/completions`, always streamed; writes lines, or folds them when `stream` is False."""

    def __init__(self, model: str, dialect: Dialect, *, stream: bool) -> None:
        super().__init__()
        self._model = model
        self._dialect = dialect
        self._stream = stream
        self._newline = orjson.OPT_APPEND_NEWLINE if stream else 0
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._tool_calls = _ToolCalls()
        self._finish: str | None = None
        self._timings: Line = {}
        self._usage: Line = {}
        self._over = False

    def feed(self, payload: bytes, *, wall_s: float, elapsed_s: float) -> bytes:
        if self._over:
            return b""
        if payload.strip() == b"[DONE]":
            return self._last(wall_s, elapsed_s) if self._finish is not None else b""
        chunk = _parse(payload)
        if "error" in chunk:
            return self._broken_off(payload)
        return self._chunk(chunk, wall_s)

    def end(self, *, elapsed_s: float, wall_s: float) -> bytes:
        if self._over:
            return b""
        if self._finish is None:
            raise Truncated("the answer ended without a finish")
        return self._last(wall_s, elapsed_s)

    def whole(self, status: int, body: bytes, *, elapsed_s: float) -> tuple[int, bytes]:
        return error_answer(status, body, "/v1/chat/completions")

    def _chunk(self, chunk: Line, wall_s: float) -> bytes:
        self._timings = _object(chunk.get("timings")) or self._timings
        self._usage = _object(chunk.get("usage")) or self._usage
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices:
            return b""
        choice = _object(choices[0])
        self._finish = _text(choice, "finish_reason") or self._finish
        delta = _object(choice.get("delta"))
        if delta.get("tool_calls"):
            self.content_started = True
            self._tool_calls.add(delta["tool_calls"])
        text, thought = _text(delta, "content"), _text(delta, "reasoning_content")
        return self._say(text, thought, wall_s) if text or thought else b""

    def _say(self, text: str, thought: str, wall_s: float, calls: list[Line] | None = None) -> bytes:
        self.content_started = True
        if not self._stream:
            self._texts.append(text)
            self._thoughts.append(thought)
            return b""
        line = self._dialect(self._model, rfc3339(wall_s), text, thought, calls or [])
        return orjson.dumps({**line, "done": False}, option=orjson.OPT_APPEND_NEWLINE)

    def _last(self, wall_s: float, elapsed_s: float) -> bytes:
        self._over = True
        calls, broken = self._tool_calls.whole()
        out = self._say(broken, "", wall_s, calls) if calls or broken else b""
        if self._stream:
            line = self._dialect(self._model, rfc3339(wall_s), "", "", [])
        else:
            text, thought = "".join(self._texts), "".join(self._thoughts)
            line = self._dialect(self._model, rfc3339(wall_s), text, thought, calls)
        line["done"] = True
        line["done_reason"] = "length" if self._finish == "length" else "stop"
        line |= self._counters(elapsed_s)
        return out + orjson.dumps(line, option=self._newline)

    def _counters(self, elapsed_s: float) -> Line:
        """Ollama leaves out what is zero."""
        timings, usage = self._timings, self._usage
        prompt = _count(timings, "cache_n") + _count(timings, "prompt_n") or _count(usage, "prompt_tokens")
        counters = {
            "total_duration": nanoseconds(elapsed_s),
            "load_duration": nanoseconds(self.load_s),
            "prompt_eval_count": prompt,
            "prompt_eval_duration": _nanoseconds_of(timings, "prompt_ms"),
            "eval_count": _count(timings, "predicted_n") or _count(usage, "completion_tokens"),
            "eval_duration": _nanoseconds_of(timings, "predicted_ms"),
        }
        return {name: value for name, value in counters.items() if value}

    def _broken_off(self, payload: bytes) -> bytes:
        self._over = True
        status, message = in_band_error(payload)
        if not (self._stream and self.content_started):
            self.status = status
        return orjson.dumps({"error": message}, option=self._newline)


def _parse(payload: bytes) -> Line:
    try:
        chunk = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise Truncated("the answer turned into something that is not JSON") from None
    if not isinstance(chunk, dict):
        raise Truncated("the answer turned into something that is not a chunk")
    return chunk


def _object(value: object) -> Line:
    return value if isinstance(value, dict) else {}


def _text(values: Line, name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""


def _count(values: Line, name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) else 0


def _nanoseconds_of(values: Line, name_ms: str) -> int:
    value = values.get(name_ms)
    return round(value * 1e6) if isinstance(value, (int, float)) else 0
