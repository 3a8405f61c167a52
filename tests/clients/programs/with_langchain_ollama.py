"""LangChain over Ollama's dialect; it always streams. It lists its models only when one is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ollama
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from pydantic import ValidationError

from tests.clients.programs.base import WORDS, Called, Colour, Missed, missed


@tool
def get_weather(city: str) -> str:
    """Weather for a city"""
    return WORDS["tool_says"]


class Here:
    def __init__(self, url: str) -> None:
        self._url = url

    def _chat(self, model: str, num_predict: int = WORDS["max_tokens"], **more: Any) -> ChatOllama:
        return ChatOllama(model=model, base_url=self._url, num_predict=num_predict, **more)

    def chat(self, model: str) -> str:
        message = self._chat(model).invoke(WORDS["ask"])
        assert message.usage_metadata["output_tokens"] > 0
        assert OllamaLLM(model=model, base_url=self._url, num_predict=4).invoke("The sky is")
        return message.text

    def stream(self, model: str) -> list[str]:
        return [chunk.text for chunk in self._chat(model).stream(WORDS["ask"]) if chunk.text]

    def tools(self, model: str) -> Called:
        able = self._chat(model, WORDS["tool_max_tokens"], temperature=0).bind_tools([get_weather])
        asked = [HumanMessage(WORDS["weather"])]
        said = able.invoke(asked)
        call = said.tool_calls[0]
        result: ToolMessage = get_weather.invoke(call)
        return Called(call["name"], call["args"], able.invoke([*asked, said, result]).text)

    def embeddings(self, model: str) -> list[list[float]]:
        return OllamaEmbeddings(model=model, base_url=self._url).embed_documents(WORDS["texts"])

    def structured(self, model: str) -> dict[str, Any]:
        chat = self._chat(model, WORDS["schema_max_tokens"], temperature=0)
        return chat.with_structured_output(Colour).invoke(WORDS["pick"]).model_dump()

    def models(self) -> list[str]:
        """It tells them only to whom names one that is not there."""
        try:
            self._chat(WORDS["unknown"], validate_model_on_init=True)
        except ValidationError as error:
            told = error.errors()[0]["msg"]
        listed = told.partition("Available local models: ")[2].split(", ")
        self._chat(listed[0], validate_model_on_init=True)
        return listed

    def unknown(self) -> Missed:
        try:
            self._chat(WORDS["unknown"]).invoke(WORDS["ask"])
        except ollama.ResponseError as error:
            return missed(error, error.status_code, error.error)
        raise AssertionError("answered")

    def begin(self, model: str) -> Callable[[], None]:
        chat = self._chat(model, WORDS["endless_max_tokens"], format=WORDS["numbers"])
        stream = chat.stream(WORDS["endless"])
        next(chunk for chunk in stream if chunk.text)
        return stream.close
