"""LangChain over OpenAI's dialect. It lists no models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.clients.programs.base import WORDS, Called, Colour, Missed, missed

NUMBERS: Any = {"type": "json_schema", "json_schema": {"name": "Numbers", "schema": WORDS["numbers"]}}


@tool
def get_weather(city: str) -> str:
    """Weather for a city"""
    return WORDS["tool_says"]


class Here:
    def __init__(self, url: str) -> None:
        self._where: Any = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}

    def _chat(self, model: str, max_tokens: int = WORDS["max_tokens"], **more: Any) -> ChatOpenAI:
        return ChatOpenAI(model=model, max_tokens=max_tokens, **self._where, **more)

    def chat(self, model: str) -> str:
        message = self._chat(model).invoke(WORDS["ask"])
        assert message.usage_metadata["output_tokens"] > 0
        return message.text

    def stream(self, model: str) -> list[str]:
        chunks = list(self._chat(model, stream_usage=True).stream(WORDS["ask"]))
        assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 0
        return [chunk.text for chunk in chunks if chunk.text]

    def tools(self, model: str) -> Called:
        able = self._chat(model, WORDS["tool_max_tokens"], temperature=0).bind_tools([get_weather])
        asked = [HumanMessage(WORDS["weather"])]
        said = able.invoke(asked)
        call = said.tool_calls[0]
        result: ToolMessage = get_weather.invoke(call)
        return Called(call["name"], call["args"], able.invoke([*asked, said, result]).text)

    def embeddings(self, model: str) -> list[list[float]]:
        # the length check would fetch a vocabulary, and send its numbers instead of text
        embedder = OpenAIEmbeddings(model=model, check_embedding_ctx_length=False, **self._where)
        return embedder.embed_documents(WORDS["texts"])

    def structured(self, model: str) -> dict[str, Any]:
        chat = self._chat(model, WORDS["schema_max_tokens"], temperature=0)
        return chat.with_structured_output(Colour).invoke(WORDS["pick"]).model_dump()

    def unknown(self) -> Missed:
        try:
            self._chat(WORDS["unknown"]).invoke(WORDS["ask"])
        except openai.APIStatusError as error:
            return missed(error, error.status_code, error.code)
        raise AssertionError("answered")

    def begin(self, model: str) -> Callable[[], None]:
        stream = self._chat(model, WORDS["endless_max_tokens"]).stream(
            WORDS["endless"], response_format=NUMBERS
        )
        next(chunk for chunk in stream if chunk.text)
        return stream.close
