"""The vendor's own client for Anthropic's dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anthropic

from tests.clients.programs.base import ASK, WEATHER, WORDS, Called, Missed, missed

_TOOL = WORDS["tool"]
TOOLS: Any = [
    {"name": _TOOL["name"], "description": _TOOL["description"], "input_schema": _TOOL["parameters"]}
]
#: The client has no argument for it any more.
COLD = {"temperature": 0}
STORY: Any = [{"role": "user", "content": WORDS["story"]}]


class Here:
    def __init__(self, url: str) -> None:
        self._client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)

    def chat(self, model: str) -> str:
        message = self._client.messages.create(
            model=model, messages=ASK, max_tokens=WORDS["max_tokens"], system="Be brief."
        )
        assert message.usage.output_tokens > 0
        counted = self._client.messages.count_tokens(model=model, messages=ASK)
        assert counted.input_tokens > 0
        return "".join(block.text for block in message.content)

    def stream(self, model: str) -> list[str]:
        asked = {"model": model, "messages": ASK, "max_tokens": WORDS["max_tokens"]}
        with self._client.messages.stream(**asked) as stream:
            pieces = list(stream.text_stream)
            final = stream.get_final_message()
        assert final.content[0].text == "".join(pieces)
        assert final.stop_reason in ("end_turn", "max_tokens")
        return pieces

    def tools(self, model: str) -> Called:
        asked = {"model": model, "tools": TOOLS, "max_tokens": WORDS["tool_max_tokens"], "extra_body": COLD}
        with self._client.messages.stream(messages=WEATHER, **asked) as stream:
            message = stream.get_final_message()
        assert message.stop_reason == "tool_use"
        call = next(block for block in message.content if block.type == "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": WORDS["tool_says"]}
        told = [
            *WEATHER,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ]
        asked["max_tokens"] = WORDS["max_tokens"]
        then = self._client.messages.create(messages=told, **asked)
        return Called(call.name, call.input, "".join(block.text for block in then.content))

    def models(self) -> list[str]:
        listed = [model.id for model in self._client.models.list()]
        assert self._client.models.retrieve(listed[0]).id == listed[0]
        return listed

    def unknown(self) -> Missed:
        try:
            self._client.messages.create(model=WORDS["unknown"], messages=ASK, max_tokens=9)
        except anthropic.APIStatusError as error:
            return missed(error, error.status_code, error.body["error"]["type"])
        raise AssertionError("answered")

    def begin(self, model: str) -> Callable[[], None]:
        stream = self._client.messages.create(
            model=model,
            messages=STORY,
            max_tokens=WORDS["endless_max_tokens"],
            extra_body=COLD,
            stream=True,
        )
        next(event for event in stream if event.type == "content_block_delta")
        return stream.close
