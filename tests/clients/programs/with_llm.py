"""`llm` with its plugin for Ollama, as a library. Where its plugin looks is said by OLLAMA_HOST alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from typing import Any

import llm
import ollama
from llm_ollama.models.chat import OllamaChatModel

from tests.clients.programs.base import WORDS, Called, Missed, missed


def get_weather(city: str) -> str:
    """Weather for a city"""
    return WORDS["tool_says"]


class Here:
    def __init__(self, url: str) -> None:
        pass

    def chat(self, model: str) -> str:
        answer = _model(model).prompt(WORDS["ask"], num_predict=WORDS["max_tokens"], stream=False)
        said = answer.text()
        assert answer.usage().output > 0
        return said

    def stream(self, model: str) -> list[str]:
        return [
            piece for piece in _model(model).prompt(WORDS["ask"], num_predict=WORDS["max_tokens"]) if piece
        ]

    def tools(self, model: str) -> Called:
        options = {"num_predict": WORDS["tool_max_tokens"], "temperature": 0}
        chain = _model(model).chain(WORDS["weather"], tools=[get_weather], options=options)
        asked, then = islice(chain.responses(), 2)
        call = asked.tool_calls()[0]
        return Called(call.name, call.arguments, then.text())

    def embeddings(self, model: str) -> list[list[float]]:
        embedder = llm.get_embedding_model(f"ollama/{model}")
        return [list(one) for one in embedder.embed_multi(WORDS["texts"])]

    def structured(self, model: str) -> dict[str, Any]:
        options = {"num_predict": WORDS["schema_max_tokens"], "temperature": 0}
        return json.loads(_model(model).prompt(WORDS["pick"], schema=WORDS["schema"], **options).text())

    def models(self) -> list[str]:
        talk = {model.model_id for model in llm.get_models()}
        embed = {model.model_id for model in llm.get_embedding_models()}
        ours = [name.removeprefix("ollama/") for name in talk | embed if name.startswith("ollama/")]
        return sorted(ours)

    def unknown(self) -> Missed:
        """By its list `llm` knows without asking; a model that has gone since is asked for."""
        name = WORDS["unknown"]
        try:
            _model(name)
        except llm.UnknownModelError:
            gone = OllamaChatModel(model_id=f"ollama/{name}", ollama_name=name, capabilities=["completion"])
        try:
            gone.prompt(WORDS["ask"]).text()
        except ollama.ResponseError as error:
            return missed(error, error.status_code, error.error)
        raise AssertionError("answered")

    def begin(self, model: str) -> Callable[[], None]:
        stream = iter(_model(model).prompt(WORDS["endless"], schema=WORDS["numbers"]))
        next(piece for piece in stream if piece)
        return stream.close


def _model(name: str) -> llm.Model:
    return llm.get_model(f"ollama/{name}")
