"""A llama-server's stream → the one body that it would have sent, for callers who asked for no stream. Pure.

A llama-server whose client leaves goes on to the end unless it was streaming (docs/backends.md). The folded
body equals its own, but for ids and times, and for what its streams lack, as it holds text back while that
may become a stop string or a mark: log probabilities of all but the last of the tokens held back, and a mark
like `<think` that the length cut off.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import orjson

from herd_node.protocol.jsonedit import JsonEditError, find_top_level, replace_span
from herd_node.translate.base import Call, Reader, Truncated
from herd_node.translate.errors import error_status, honest_error
from herd_node.translate.events import Line, as_count, as_list, as_object, as_text, parse_event
from herd_node.translate.openings import message

KIND = "llama-server"


def fold(path: str, body: bytes, fields: Mapping[str, object]) -> Call | None:
    """The streaming call in place of this one; None when it streams already, or cannot."""
    make_reader = _READERS.get(path)
    if make_reader is None or fields.get("stream") is True:
        return None
    options = {"stream": b"true"}
    reader = make_reader()
    if isinstance(reader, ChatReader):
        options["stream_options"] = b'{"include_usage":true}'
        reader.opening = _opening(fields)
    elif isinstance(reader, MessagesReader):
        reader.model = str(fields.get("model", ""))
    return Call(path=path, body=_edited(body, fields, options), stream=False, sse=True, reader=reader)


def _opening(fields: Mapping[str, object]) -> str:
    """What the caller began himself: a whole answer has it in front, a stream goes on behind it."""
    last = as_object((as_list(fields.get("messages")) or [None])[-1])
    if last.get("role") != "assistant" or last.get("tool_calls"):
        return ""
    content = last.get("content")
    if isinstance(content, str):
        return content
    return "".join(as_text(as_object(part), "text") for part in as_list(content))


def _edited(body: bytes, fields: Mapping[str, object], options: Mapping[str, bytes]) -> bytes:
    """The body with these fields set and not another byte changed."""
    try:
        for name, value in options.items():
            span = find_top_level(body, name) if name in fields else None
            if span is not None:
                body = replace_span(body, span, value)
            else:
                start = body.index(b"{") + 1
                body = replace_span(body, (start, start), b'"%s":%s,' % (name.encode(), value))
    except JsonEditError:  # two of the same name: the last one counts, as it does for llama-server
        return orjson.dumps({**fields, **{name: orjson.loads(value) for name, value in options.items()}})
    return body


class _FoldReader(Reader):
    """Collects events; a subclass says which of them are the end and what they make."""

    def __init__(self) -> None:
        super().__init__()
        self._complete = False
        self._failed = b""

    def feed(self, payload: bytes, *, wall_s: float, elapsed_s: float) -> bytes:
        if self._complete or self._failed:
            return b""
        if payload.strip() == b"[DONE]":
            self._done()
            return b""
        event = parse_event(payload)
        if "error" in event:
            self.status, self._failed = honest_error(KIND, error_status(payload), payload)
        else:
            self._add(event)
        return b""

    def end(self, *, elapsed_s: float, wall_s: float) -> bytes:
        if self._failed:
            return self._failed
        if not self._complete:
            raise Truncated("the answer ended without a finish")
        return orjson.dumps(self._folded())

    def whole(self, status: int, body: bytes, *, elapsed_s: float) -> tuple[int, bytes]:
        return honest_error(KIND, status, body)

    def _done(self) -> None:
        """The mark at the end of the OpenAI streams that have one."""

    @abstractmethod
    def _add(self, event: Line) -> None: ...

    @abstractmethod
    def _folded(self) -> Line: ...


# ---- chat completions and text completions


class _Choice:
    """One choice as it grows: text is joined, lists are joined, of all else the last word counts."""

    def __init__(self) -> None:
        self.grown: dict[str, list[str]] = {}
        self.others: Line = {}
        self.tool_calls: dict[int, Line] = {}
        self.logprobs: list[object] = []
        self.finish: str = ""

    def grow(self, pieces: Line) -> None:
        for name, piece in pieces.items():
            if name == "tool_calls":
                for call in map(as_object, as_list(piece)):
                    self._grow_call(call)
            elif isinstance(piece, str) and name != "role":
                self.grown.setdefault(name, []).append(piece)
            elif isinstance(piece, list) and isinstance(self.others.get(name), list):
                self.others[name] = [*as_list(self.others[name]), *piece]
            elif piece is not None:
                self.others[name] = piece

    def text(self, name: str) -> str:
        return "".join(self.grown.get(name, ()))

    def _grow_call(self, piece: Line) -> None:
        call = self.tool_calls.setdefault(as_count(piece, "index"), {})
        function = as_object(call.setdefault("function", {}))
        for name, part in as_object(piece.get("function")).items():
            known = function.get(name)
            function[name] = known + part if isinstance(known, str) and isinstance(part, str) else part
        for name, part in piece.items():
            if name not in ("index", "function"):
                call[name] = part


class _Completions(_FoldReader):
    """What both have in common. Each choice has its own finish; `usage` and `timings` are the first one's."""

    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self._about: Line = {}
        self._choices: dict[int, _Choice] = {}
        self._counts: dict[int, Line] = {}
        self._finished = 0
        """The choice that finished last; a chunk without choices belongs to it."""

    def _done(self) -> None:
        self._complete = bool(self._choices) and all(choice.finish for choice in self._choices.values())

    def _add(self, event: Line) -> None:
        index = self._finished
        for given in map(as_object, as_list(event.get("choices"))):
            index = as_count(given, "index")
            choice = self._choices.setdefault(index, _Choice())
            self._grow(choice, given)
            choice.logprobs += as_list(as_object(given.get("logprobs")).get("content"))
            finish = as_text(given, "finish_reason")
            if finish:
                choice.finish, self._finished = finish, index
            self.content_started = self.content_started or bool(choice.grown or choice.tool_calls)
        for name, value in event.items():
            if name in ("usage", "timings"):
                self._counts.setdefault(index, {})[name] = value
            elif name not in ("choices", "object", "prompt_progress"):
                self._about[name] = value

    def _folded(self) -> Line:
        """In the order of llama-server's own body."""
        about, counts = dict(self._about), self._counts.get(min(self._choices), {})
        choices = [self._choice(index, self._choices[index]) for index in sorted(self._choices)]
        named = {name: about.pop(name, None) for name in ("created", "model", "system_fingerprint")}
        ends = {"usage": counts.get("usage"), "id": about.pop("id", None), "timings": counts.get("timings")}
        body: Line = {"choices": choices, **named, "object": self.kind, **ends}
        return {**{name: value for name, value in body.items() if value is not None}, **about}

    @abstractmethod
    def _grow(self, choice: _Choice, given: Line) -> None: ...

    @abstractmethod
    def _choice(self, index: int, choice: _Choice) -> Line: ...


class ChatReader(_Completions):
    kind = "chat.completion"
    opening = ""

    def _grow(self, choice: _Choice, given: Line) -> None:
        choice.grow(as_object(given.get("delta")))

    def _choice(self, index: int, choice: _Choice) -> Line:
        others = dict(choice.others)
        message: Line = {
            "role": others.pop("role", "assistant"),
            "content": self.opening + choice.text("content"),
        }
        message |= {name: choice.text(name) for name in choice.grown if name != "content"}
        if choice.tool_calls:
            message["tool_calls"] = [_tool_call(call) for _, call in sorted(choice.tool_calls.items())]
        made: Line = {"finish_reason": choice.finish, "index": index, "message": message | others}
        if choice.logprobs:
            made["logprobs"] = {"content": choice.logprobs}
        return made


def _tool_call(call: Line) -> Line:
    ordered: Line = {name: call[name] for name in ("type", "function", "id") if name in call}
    return {**ordered, **call}


class TextReader(_Completions):
    kind = "text_completion"

    def _grow(self, choice: _Choice, given: Line) -> None:
        choice.grow({"text": given.get("text")})

    def _choice(self, index: int, choice: _Choice) -> Line:
        logprobs = {"content": choice.logprobs} if choice.logprobs else None
        text = choice.text("text")
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": choice.finish}


# ---- responses and messages


class ResponsesReader(_FoldReader):
    """The last event holds the whole response."""

    def __init__(self) -> None:
        super().__init__()
        self._response: Line = {}

    def _add(self, event: Line) -> None:
        kind = as_text(event, "type")
        self.content_started = self.content_started or kind.endswith(".delta")
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            self._response = as_object(event.get("response"))
            self._complete = True

    def _folded(self) -> Line:
        """Thoughts have their status in the body only."""
        output = [
            {"status": "completed", **as_object(item)} for item in as_list(self._response.get("output"))
        ]
        return {"completed_at": self._response.get("created_at"), **self._response, "output": output}


class MessagesReader(_FoldReader):
    """Blocks grow by their deltas; the tokens and the reason of the stop come at the end."""

    model = ""
    """As it was asked for: a stream may lack the event that names it."""

    def __init__(self) -> None:
        super().__init__()
        self._message: Line = {}
        self._blocks: dict[int, Line] = {}
        self._inputs: dict[int, list[str]] = {}

    def _add(self, event: Line) -> None:
        index = as_count(event, "index")
        match event.get("type"):
            case "message_start":
                self._message = as_object(event.get("message"))
            case "content_block_start":
                self._blocks[index] = as_object(event.get("content_block"))
            case "content_block_delta":
                self.content_started = True
                self._grow(index, as_object(event.get("delta")))
            case "message_delta":
                usage = as_object(self._message.get("usage")) | as_object(event.get("usage"))
                self._message = self._message | as_object(event.get("delta")) | {"usage": usage}
            case "message_stop":
                self._complete = True

    def _grow(self, index: int, delta: Line) -> None:
        block = self._blocks.setdefault(index, {})
        if delta.get("type") == "input_json_delta":
            self._inputs.setdefault(index, []).append(as_text(delta, "partial_json"))
            return
        for name in ("text", "thinking", "signature"):
            if name in delta:
                block[name] = as_text(block, name) + as_text(delta, name)

    def _folded(self) -> Line:
        for index, pieces in self._inputs.items():
            try:
                self._blocks[index]["input"] = orjson.loads("".join(pieces) or "{}")
            except orjson.JSONDecodeError:
                self._blocks[index]["input"] = {}
        known = self._message if "id" in self._message else {**message(self.model, "msg_0"), **self._message}
        return {**known, "content": [block for _, block in sorted(self._blocks.items())]}


_READERS: Mapping[str, Callable[[], Reader]] = {
    "/v1/chat/completions": ChatReader,
    "/v1/completions": TextReader,
    "/v1/responses": ResponsesReader,
    "/v1/messages": MessagesReader,
}
