"""Ollama's own client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ollama

from tests.clients.programs.base import ASK, ENDLESS, PICK, WEATHER, WORDS, Called, Colour, Missed, missed

TOOLS: Any = [{"type": "function", "function": WORDS["tool"]}]


class Here:
    def __init__(self, url: str) -> None:
        self._client = ollama.Client(host=url)

    def chat(self, model: str) -> str:
        answer = self._client.chat(model, messages=ASK, options={"num_predict": WORDS["max_tokens"]})
        assert answer.done
        assert answer.model == model
        said = self._client.generate(model, prompt="The sky is", options={"num_predict": 4})
        assert said.response
        return answer.message.content or ""

    def stream(self, model: str) -> list[str]:
        options = {"num_predict": WORDS["max_tokens"]}
        lines = list(self._client.chat(model, messages=ASK, stream=True, options=options))
        assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
        assert lines[-1].eval_count
        return [line.message.content for line in lines if line.message.content]

    def tools(self, model: str) -> Called:
        options = {"num_predict": WORDS["tool_max_tokens"], "temperature": 0}
        message = self._client.chat(model, messages=WEATHER, tools=TOOLS, options=options).message
        call = message.tool_calls[0].function
        result = {"role": "tool", "tool_name": call.name, "content": WORDS["tool_says"]}
        told = [*WEATHER, message, result]
        options["num_predict"] = WORDS["max_tokens"]
        then = self._client.chat(model, messages=told, tools=TOOLS, options=options).message.content
        return Called(call.name, dict(call.arguments), then)

    def embeddings(self, model: str) -> list[list[float]]:
        alone = self._client.embeddings(model, prompt=WORDS["texts"][0])
        together = self._client.embed(model, input=WORDS["texts"])
        assert len(alone.embedding) == len(together.embeddings[0])
        return [list(one) for one in together.embeddings]

    def structured(self, model: str) -> dict[str, Any]:
        options = {"num_predict": WORDS["schema_max_tokens"], "temperature": 0}
        schema = Colour.model_json_schema()
        answer = self._client.chat(model, messages=PICK, format=schema, options=options)
        return Colour.model_validate_json(answer.message.content).model_dump()

    def models(self) -> list[str]:
        listed = [model.model for model in self._client.list().models]
        loaded = {model.model for model in self._client.ps().models}
        assert loaded
        assert loaded <= set(listed)
        for name in listed:
            assert self._client.show(name).capabilities
        return listed

    def unknown(self) -> Missed:
        try:
            self._client.chat(WORDS["unknown"], messages=ASK)
        except ollama.ResponseError as error:
            return missed(error, error.status_code, error.error)
        raise AssertionError("answered")

    def begin(self, model: str) -> Callable[[], None]:
        stream = self._client.chat(model, messages=ENDLESS, stream=True, format=WORDS["numbers"])
        next(line for line in stream if line.message.content)
        return stream.close
