"""Ollama's messages and tools → OpenAI's. Pure.

The shapes differ in three places: images are bare base64 beside the text, a tool call's arguments are an
object instead of a string, and a tool's result names the tool instead of the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from herd_node.translate.base import ModelFacts, Refusal
from herd_node.translate.fields import Fields, wrong_type
from herd_node.translate.images import media_part

_STRUCT = "Alias"  # the name that Ollama's own complaints use for a message


class _OpenCalls:
    """Tool calls that wait for their result, so that results without an id find theirs."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, str]] = []
        self._made = 0

    def add(self, call_id: str, name: str) -> str:
        self._made += 1
        call_id = call_id or f"call_{self._made:08d}"
        self._waiting.append((call_id, name))
        return call_id

    def answer(self, call_id: str, name: str) -> str:
        for waiting in self._waiting:
            if call_id in ("", waiting[0]) and (call_id or name in ("", waiting[1])):
                self._waiting.remove(waiting)
                return waiting[0]
        return call_id or "call_00000000"


def chat_messages(messages: Sequence[object], facts: ModelFacts, asked: str) -> list[dict[str, object]]:
    """`asked` is the model's name as the caller wrote it."""
    open_calls = _OpenCalls()
    translated = []
    for message in messages:
        if not isinstance(message, dict):
            raise wrong_type(message, "ChatRequest.messages", "api.Message")
        translated.append(_message(Fields(message, _STRUCT), open_calls, facts, asked))
    return translated


def content(text: str, images: Sequence[object], facts: ModelFacts, asked: str) -> object:
    """A message's content: plain text, or parts when there are images."""
    if not images:
        return text
    parts: list[dict[str, object]] = [{"type": "text", "text": text}] if text else []
    for image in images:
        if not isinstance(image, str):
            raise wrong_type(image, f"{_STRUCT}.images", "api.ImageData")
        needed, part = media_part(image)
        if not facts.can(needed):
            kind = "image" if needed == "vision" else needed
            raise Refusal(400, f'"{asked}" does not support {kind} input')
        parts.append(part)
    return parts


def tool_definitions(tools: Sequence[object]) -> list[dict[str, object]]:
    """Tools as they came; what llama-server insists on and Ollama does not is filled in."""
    defined = []
    for tool in tools:
        if not isinstance(tool, dict):
            raise wrong_type(tool, "ChatRequest.tools", "api.Tool")
        function = Fields(tool, "Tool").mapping("function", "api.ToolFunction")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        defined.append({**tool, "type": "function", "function": {**function, "parameters": parameters}})
    return defined


def _message(fields: Fields, open_calls: _OpenCalls, facts: ModelFacts, asked: str) -> dict[str, object]:
    role = fields.text("role").lower()
    images = fields.items("images", "[]api.ImageData")
    message: dict[str, object] = {
        "role": role,
        "content": content(fields.text("content"), images, facts, asked),
    }
    thinking = fields.text("thinking")
    if thinking:
        message["reasoning_content"] = thinking
    calls = fields.items("tool_calls", "[]api.ToolCall")
    if calls:
        message["tool_calls"] = [_tool_call(call, open_calls) for call in calls]
    tool_name, call_id = fields.text("tool_name"), fields.text("tool_call_id")
    if role == "tool":
        message["tool_call_id"] = open_calls.answer(call_id, tool_name)
        if tool_name:
            message["name"] = tool_name
    return message


def _tool_call(call: object, open_calls: _OpenCalls) -> dict[str, object]:
    if not isinstance(call, dict):
        raise wrong_type(call, f"{_STRUCT}.tool_calls", "api.ToolCall")
    fields = Fields(call, "ToolCall")
    function = Fields(fields.mapping("function", "api.ToolCallFunction"), "ToolCallFunction")
    name = function.text("name")
    arguments = function.values.get("arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise Refusal(400, "Value looks like object, but can't find closing '}' symbol")
    return {
        "id": open_calls.add(fields.text("id"), name),
        "type": "function",
        "function": {"name": name, "arguments": orjson.dumps(arguments or {}).decode()},
    }
