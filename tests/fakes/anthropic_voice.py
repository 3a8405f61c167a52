"""Anthropic's dialect as Ollama and as llama-server speak it: `/v1/messages`, in recorded shapes."""

from __future__ import annotations

from typing import Any

from tests.fakes.model import JSON_UTF8, FakeModel, Token, Usage, answers_a_tool, count_words, dumps

PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
_REASONS = {"stop": "end_turn", "length": "max_tokens"}


def event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + dumps({"type": kind, **fields}) + b"\n\n"


def prompt_words(asked: dict[str, Any]) -> int:
    """Without the names of roles and types, which no template writes."""
    return count_words([asked.get("system"), asked.get("messages"), asked.get("tools")]) + 10


def tool_of(asked: dict[str, Any], model: FakeModel) -> str | None:
    tools = asked.get("tools")
    calls = tools and "tools" in model.capabilities and not answers_a_tool(asked.get("messages"))
    return tools[0]["name"] if calls else None


class AnthropicVoice:
    """`kind` decides about the small differences: ids, usage, empty fields, how an error ends a stream."""

    def __init__(self, kind: str, model: str, tool: str | None, prompt_tokens: int) -> None:
        self._ollama = kind == "ollama"
        self._model = model
        self._tool = tool
        self._prompt_tokens = prompt_tokens
        self._index = -1
        self._thinks = False
        self.stream_headers = (("Content-Type", "text/event-stream"),)
        head = ("Cache-Control", "no-cache") if self._ollama else ("X-Accel-Buffering", "no")
        self.stream_headers = (head, *self.stream_headers)
        self.whole_type = "application/json" if self._ollama else JSON_UTF8

    # ---- stream

    def opening(self) -> bytes:
        message: dict[str, Any] = {"id": self._id(), "type": "message", "role": "assistant"}
        if self._ollama:  # the count is a guess
            usage = {"input_tokens": self._prompt_tokens // 2, "output_tokens": 0}
            return event(
                "message_start", message={**message, "model": self._model, "content": [], "usage": usage}
            )
        usage = {"cache_read_input_tokens": 0, "input_tokens": self._prompt_tokens, "output_tokens": 0}
        said = {
            "content": [],
            "model": self._model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return event("message_start", message={**message, **said})

    def token(self, token: Token) -> bytes:
        out = b"" if self._index >= 0 and self._thinks == token.thought else self._begin(token.thought)
        kind = "thinking" if token.thought else "text"
        delta = {"type": f"{kind}_delta", kind: token.text}
        return out + event("content_block_delta", index=self._index, delta=delta)

    def last(self, usage: Usage) -> list[bytes]:
        opening = self.opening() if self._index < 0 else b""
        tool = [opening + self._call()] if self._tool else []
        start = b"" if self._tool else opening
        close = event("content_block_stop", index=self._index) if self._index >= 0 else b""
        counts: dict[str, Any] = {"output_tokens": usage.completion_tokens}
        delta: dict[str, Any] = {"stop_reason": self._reason(usage)}
        if self._ollama:
            counts = {"input_tokens": usage.prompt_tokens, **counts}
        else:
            delta["stop_sequence"] = None
        end = event("message_delta", delta=delta, **({} if usage.hidden else {"usage": counts}))
        return [*tool, start + close + end + event("message_stop")]

    def error(self, message: str) -> bytes:
        """Ollama says nothing, and the stream ends without its end; llama-server has OpenAI's shape."""
        if self._ollama:
            return b""
        return (
            b"data: " + dumps({"error": {"code": 500, "message": message, "type": "server_error"}}) + b"\n\n"
        )

    def malformed(self) -> bytes:
        return b'event: content_block_delta\ndata: {"type":"content_blo\n\n'

    # ---- whole

    def whole(self, tokens: list[Token], usage: Usage) -> bytes:
        thought = "".join(token.text for token in tokens if token.thought)
        content: list[dict[str, Any]] = [{"type": "thinking", "thinking": thought}] if thought else []
        text = "".join(token.text for token in tokens if not token.thought)
        content += [{"type": "text", "text": text}] if text else []
        if self._tool:
            content.append(
                {"type": "tool_use", "id": "call_fake0001", "name": self._tool, "input": {"city": "Oslo"}}
            )
        head = {"id": self._id(), "type": "message", "role": "assistant"}
        counts = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
        if self._ollama:  # an empty answer is null there
            said = {"model": self._model, "content": content or None, "stop_reason": self._reason(usage)}
            return dumps({**head, **said, "usage": counts}, newline=True)
        said = {"content": content, "model": self._model, "stop_reason": self._reason(usage)}
        counts = {"cache_read_input_tokens": 0, **counts}
        return dumps({**head, **said, "stop_sequence": None, "usage": counts})

    # ----

    def _begin(self, thought: bool) -> bytes:
        close = event("content_block_stop", index=self._index) if self._index >= 0 else b""
        self._index += 1
        self._thinks = thought
        kind = "thinking" if thought else "text"
        return close + event("content_block_start", index=self._index, content_block={"type": kind, kind: ""})

    def _call(self) -> bytes:
        self._index += 1
        block = {"type": "tool_use", "id": "call_fake0001", "name": self._tool, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": '{"city":"Oslo"}'}
        return event("content_block_start", index=self._index, content_block=block) + event(
            "content_block_delta", index=self._index, delta=delta
        )

    def _reason(self, usage: Usage) -> str:
        return "tool_use" if self._tool else _REASONS[usage.finish]

    def _id(self) -> str:
        return "msg_918a63a38645724838e15c72" if self._ollama else "chatcmpl-KNQHQBfZC1B6weiNwIVZLffWmFntIppo"
