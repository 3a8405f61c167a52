"""`/v1/responses` as Ollama and as llama-server speak it, and the answers of what never streams."""

from __future__ import annotations

from typing import Any

import orjson

from tests.fakes.model import JSON_UTF8, Token, Usage, dumps
from tests.fakes.recordings import recording

PATH = "/v1/responses"
_ITEM = "msg_391089"


class ResponsesVoice:
    """Events in the recorded order; llama-server numbers nothing and has its timings beside the response."""

    def __init__(self, kind: str, model: str) -> None:
        self._ollama = kind == "ollama"
        self._model = model
        self._sequence = 0
        self._text = ""
        head = ("Cache-Control", "no-cache") if self._ollama else ("X-Accel-Buffering", "no")
        self.stream_headers = (head, ("Content-Type", "text/event-stream"))
        self.whole_type = "application/json" if self._ollama else JSON_UTF8

    def opening(self) -> bytes:
        response = self._response("in_progress", None) | {"output": []}
        if not self._ollama:
            response = {"id": "resp_1", "object": "response", "status": "in_progress"}
        item = {"content": [], "id": _ITEM, "role": "assistant", "status": "in_progress", "type": "message"}
        logprobs = {"annotations": [], "logprobs": []} if self._ollama else {}
        part = {"type": "output_text", **logprobs, "text": ""}
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._event("response.output_item.added", item=item)
            + self._event("response.content_part.added", item_id=_ITEM, part=part)
        )

    def token(self, token: Token) -> bytes:
        self._text += token.text
        return self._event("response.output_text.delta", item_id=_ITEM, delta=token.text)

    def last(self, usage: Usage) -> list[bytes]:
        opening = b"" if self._sequence else self.opening()
        (item,) = self._output()
        done = (
            self._event("response.output_text.done", item_id=_ITEM, text=self._text)
            + self._event("response.content_part.done", item_id=_ITEM, part=item["content"][0])
            + self._event("response.output_item.done", item=item)
        )
        response = self._response("completed", None if usage.hidden else usage)
        return [opening + done, self._event("response.completed", response=response)]

    def whole(self, tokens: list[Token], usage: Usage) -> bytes:
        self._text = "".join(token.text for token in tokens)
        return dumps(self._response("completed", None if usage.hidden else usage), newline=self._ollama)

    def error(self, message: str) -> bytes:
        """Ollama says nothing, and the stream ends without its end."""
        if self._ollama:
            return b""
        return (
            b"data: " + dumps({"error": {"code": 500, "message": message, "type": "server_error"}}) + b"\n\n"
        )

    def malformed(self) -> bytes:
        return b'event: response.output_text.delta\ndata: {"type":"resp\n\n'

    def _event(self, kind: str, **fields: Any) -> bytes:
        if self._ollama:
            fields |= {"sequence_number": self._sequence, "output_index": 0, "content_index": 0}
        self._sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + dumps({"type": kind, **fields}) + b"\n\n"

    def _output(self) -> list[dict[str, Any]]:
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": self._text}
        return [
            {"type": "message", "status": "completed", "id": _ITEM, "content": [part], "role": "assistant"}
        ]

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        name = "ollama/v1-responses" if self._ollama else "llamacpp/responses"
        response: dict[str, Any] = orjson.loads(recording(name).body)
        response |= {"model": self._model, "status": status, "output": self._output(), "usage": None}
        if usage is not None:
            response["usage"] = {
                "input_tokens": usage.prompt_tokens,
                "output_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            }
        return response


class OneAnswer:
    """What is answered at once and never streams."""

    stream_headers = ()

    def __init__(self, body: bytes, whole_type: str = JSON_UTF8) -> None:
        self._body = body
        self.whole_type = whole_type

    def opening(self) -> bytes:
        return b""

    def token(self, token: Token) -> bytes:
        return b""

    def last(self, usage: Usage) -> list[bytes]:
        return []

    def whole(self, tokens: list[Token], usage: Usage) -> bytes:
        return self._body

    def error(self, message: str) -> bytes:
        return b""

    def malformed(self) -> bytes:
        return b""
