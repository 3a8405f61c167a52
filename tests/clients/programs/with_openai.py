"""The vendor's own client for OpenAI's dialect."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai

from tests.clients.programs.base import ASK, ENDLESS, PICK, WEATHER, WORDS, Called, Colour, Missed, missed

#: The client folds streams of strict tools only.
TOOLS: Any = [{"type": "function", "function": WORDS["tool"] | {"strict": True}}]
NUMBERS: Any = {"type": "json_schema", "json_schema": {"name": "Numbers", "schema": WORDS["numbers"]}}


class Here:
    def __init__(self, url: str) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._completions = self._client.chat.completions

    def chat(self, model: str) -> str:
        answer = self._completions.create(model=model, messages=ASK, max_tokens=WORDS["max_tokens"])
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        response = self._client.responses.create(
            model=model, input=WORDS["ask"], max_output_tokens=WORDS["max_tokens"]
        )
        assert response.output_text
        assert response.usage.output_tokens > 0
        return answer.choices[0].message.content or ""

    def stream(self, model: str) -> list[str]:
        chunks = list(
            self._completions.create(
                model=model,
                messages=ASK,
                max_tokens=WORDS["max_tokens"],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert chunks[-1].usage is not None
        assert any(chunk.choices and chunk.choices[0].finish_reason for chunk in chunks)
        # not `responses.stream`, which wants numbered events; llama-server's have none
        events = list(
            self._client.responses.create(
                model=model, input=WORDS["ask"], max_output_tokens=WORDS["max_tokens"], stream=True
            )
        )
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == "".join(deltas)
        return [chunk.choices[0].delta.content for chunk in chunks if _says(chunk)]

    def tools(self, model: str) -> Called:
        asked = {"model": model, "tools": TOOLS, "max_tokens": WORDS["tool_max_tokens"], "temperature": 0}
        with self._completions.stream(messages=WEATHER, **asked) as stream:
            choice = stream.get_final_completion().choices[0]
        assert choice.finish_reason == "tool_calls"
        call = choice.message.tool_calls[0]
        result = {"role": "tool", "tool_call_id": call.id, "content": WORDS["tool_says"]}
        told = [*WEATHER, choice.message, result]
        asked["max_tokens"] = WORDS["max_tokens"]
        then = self._completions.create(messages=told, **asked).choices[0].message.content
        return Called(call.function.name, json.loads(call.function.arguments), then)

    def embeddings(self, model: str) -> list[list[float]]:
        answer = self._client.embeddings.create(model=model, input=WORDS["texts"])
        return [one.embedding for one in answer.data]

    def structured(self, model: str) -> dict[str, Any]:
        answer = self._completions.parse(
            model=model,
            messages=PICK,
            response_format=Colour,
            max_tokens=WORDS["schema_max_tokens"],
            temperature=0,
        )
        return answer.choices[0].message.parsed.model_dump()

    def models(self) -> list[str]:
        listed = [model.id for model in self._client.models.list()]
        assert self._client.models.retrieve(listed[0]).id == listed[0]
        return listed

    def unknown(self) -> Missed:
        try:
            self._completions.create(model=WORDS["unknown"], messages=ASK)
        except openai.APIStatusError as error:
            return missed(error, error.status_code, error.code)
        raise AssertionError("answered")

    def begin(self, model: str) -> Callable[[], None]:
        stream = self._completions.create(
            model=model,
            messages=ENDLESS,
            max_tokens=WORDS["endless_max_tokens"],
            stream=True,
            response_format=NUMBERS,
        )
        next(chunk for chunk in stream if _says(chunk))
        return stream.close


def _says(chunk: Any) -> bool:
    return bool(chunk.choices and chunk.choices[0].delta.content)
