"""A backend's stream → Ollama's lines, or one folded object. Pure.

payload          role chunk, ping        → nothing
                 content, thinking       → one line, `done: false`
                 pieces of a tool call   → collected
                 error                   → `{"error": …}`; nothing more is sent
                 finish                  → remembered, with timings and usage
[DONE] or the end of the body            → the tool calls whole, then the `done: true` line
the end of the body without a finish     → Truncated
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import orjson

from herd_node.translate.base import Question, Reader, Truncated
from herd_node.translate.errors import error_answer, in_band_error
from herd_node.translate.events import (
    Line,
    Piece,
    Source,
    as_count,
    as_list,
    as_object,
    as_text,
    chat_piece,
    parse_event,
)
from herd_node.translate.moments import Stamps, nanoseconds
from herd_node.translate.names import full_name
from herd_node.translate.thoughts import Said, Thoughts

INFILL_PATH = "/infill"

Dialect = Callable[[str, str, str, str, list[Line]], Line]
"""(model, created_at, text, thinking, tool calls) → the line up to `done`, its keys in Ollama's order."""

ContextOf = Callable[[str, Callable[[list[object]], None]], Question[None]]
"""(what was said, where to put the tokens) → the question for the tokens of prompt and answer."""


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
        for piece in map(as_object, as_list(pieces)):
            index, function = as_count(piece, "index"), as_object(piece.get("function"))
            part = self._parts.setdefault(index, {"id": "", "name": "", "arguments": ""})
            part["id"] = as_text(piece, "id") or part["id"]
            part["name"] += as_text(function, "name")
            part["arguments"] += as_text(function, "arguments")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How an answer is read and written; what differs between the ways to generate."""

    line: Dialect
    stream: bool
    path: str = "/v1/chat/completions"
    source: Source = chat_piece
    top_logprobs: int | None = None
    """How many likelier tokens the caller wants beside each; None: no logprobs at all."""
    thoughts: Thoughts | None = None
    context_of: ContextOf | None = None


class GenerationReader(Reader):
    """Reads what is always a stream; writes lines, or folds them when the caller did not ask for a stream."""

    def __init__(self, model: str, manner: Manner) -> None:
        super().__init__()
        self._model = model
        self._manner = manner
        self._stream = manner.stream
        self._line, self._source, self._top_logprobs = manner.line, manner.source, manner.top_logprobs
        self._keeps = not manner.stream or manner.context_of is not None
        self._stamps = Stamps()
        self._newline = orjson.OPT_APPEND_NEWLINE if manner.stream else 0
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._logprobs: list[Line] = []
        self._tool_calls = _ToolCalls()
        self._finish: str | None = None
        self._timings: Line = {}
        self._usage: Line = {}
        self._context: list[object] = []
        self._held: Said | None = None
        self._over = False

    def feed(self, payload: bytes, *, wall_s: float, elapsed_s: float) -> bytes:
        if self._over:
            return b""
        if payload.strip() == b"[DONE]":
            waits = self._finish is None or self._manner.context_of is not None
            return b"" if waits else self._last(wall_s, elapsed_s)
        chunk = parse_event(payload)
        if "error" in chunk:
            return self._broken_off(payload)
        return self._take(self._source(chunk), wall_s)

    def question(self) -> Question[None] | None:
        context_of = self._manner.context_of
        if context_of is None or self._over or self._finish is None:
            return None
        said = "".join(self._texts) + self._rest().text
        return context_of(said, self._context.extend)

    def end(self, *, elapsed_s: float, wall_s: float) -> bytes:
        if self._over:
            return b""
        if self._finish is None:
            raise Truncated("the answer ended without a finish")
        return self._last(wall_s, elapsed_s)

    def whole(self, status: int, body: bytes, *, elapsed_s: float) -> tuple[int, bytes]:
        if self._manner.path == INFILL_PATH and status == 501:
            return 400, orjson.dumps({"error": f"{full_name(self._model)} does not support insert"})
        return error_answer(status, body, self._manner.path)

    def _take(self, piece: Piece, wall_s: float) -> bytes:
        self._finish = piece.finish or self._finish
        self._timings = piece.timings or self._timings
        self._usage = piece.usage or self._usage
        if piece.tool_calls:
            self.content_started = True
            self._tool_calls.add(piece.tool_calls)
        if piece.logprobs and self._top_logprobs is not None:
            entries = map(as_object, piece.logprobs)
            self._logprobs += [_logprob(entry, self._top_logprobs) for entry in entries]
        text, thought = piece.text, piece.thought
        if self._manner.thoughts is not None and text:
            text, thought = self._manner.thoughts.feed(text)
        return self._say(text, thought, wall_s) if text or thought else b""

    def _say(self, text: str, thought: str, wall_s: float, calls: list[Line] | None = None) -> bytes:
        self._hear(text, thought)
        if not self._stream:
            return b""
        line = self._dialect_line(text, thought, calls or [], wall_s)
        line["done"] = False
        self._add_logprobs(line)
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)

    def _hear(self, text: str, thought: str) -> None:
        """Keeps what must be whole in the end; a stream's own text only when its tokens are asked for."""
        if not (text or thought):
            return
        self.content_started = True
        if self._keeps:
            self._texts.append(text)
            self._thoughts.append(thought)

    def _rest(self) -> Said:
        """What was held back until the end; the same however often it is asked for."""
        if self._held is None:
            self._held = Said("", "") if self._manner.thoughts is None else self._manner.thoughts.rest()
        return self._held

    def _dialect_line(self, text: str, thought: str, calls: list[Line], wall_s: float) -> Line:
        return self._line(self._model, self._stamps.rfc3339(wall_s), text, thought, calls)

    def _add_logprobs(self, line: Line) -> None:
        if self._logprobs:
            line["logprobs"], self._logprobs = self._logprobs, []

    def _last(self, wall_s: float, elapsed_s: float) -> bytes:
        self._over = True
        calls, broken = self._tool_calls.whole()
        text, thought = self._rest()
        text += broken
        out = self._say(text, thought, wall_s, calls) if calls or text or thought else b""
        if self._stream:
            line = self._dialect_line("", "", [], wall_s)
        else:
            line = self._dialect_line("".join(self._texts), "".join(self._thoughts), calls, wall_s)
        line["done"] = True
        line["done_reason"] = "length" if self._finish == "length" else "stop"
        if self._context:
            line["context"] = self._context
        line |= self._counters(elapsed_s)
        self._add_logprobs(line)
        return out + orjson.dumps(line, option=self._newline)

    def _counters(self, elapsed_s: float) -> Line:
        """Ollama leaves out what is zero."""
        timings, usage = self._timings, self._usage
        prompt = as_count(timings, "cache_n") + as_count(timings, "prompt_n")
        counters = {
            "total_duration": nanoseconds(self.load_s + elapsed_s),
            "load_duration": nanoseconds(self.load_s),
            "prompt_eval_count": prompt or as_count(usage, "prompt_tokens"),
            "prompt_eval_duration": _nanoseconds_of(timings, "prompt_ms"),
            "eval_count": as_count(timings, "predicted_n") or as_count(usage, "completion_tokens"),
            "eval_duration": _nanoseconds_of(timings, "predicted_ms"),
        }
        return {name: value for name, value in counters.items() if value}

    def _broken_off(self, payload: bytes) -> bytes:
        self._over = True
        status, message = in_band_error(payload)
        if not (self._stream and self.content_started):
            self.status = status
        return orjson.dumps({"error": message}, option=self._newline)


def _logprob(entry: Line, top: int) -> Line:
    """In Ollama's shape: without the token's id, and with no more likelier tokens than were asked for."""
    shaped = {name: entry[name] for name in ("token", "logprob", "bytes") if entry.get(name) is not None}
    likelier = [_logprob(one, 0) for one in map(as_object, as_list(entry.get("top_logprobs"))[:top])]
    if likelier:
        shaped["top_logprobs"] = likelier
    return shaped


def _nanoseconds_of(values: Line, name_ms: str) -> int:
    value = values.get(name_ms)
    return round(value * 1e6) if isinstance(value, (int, float)) else 0
