"""The least OpenAI-compatible server: a list of models, chat, completions, embeddings, and nothing else."""

from __future__ import annotations

import orjson

from tests.fakes.llama_dialect import EMBEDDING, NOT_FOUND, LlamaDialect
from tests.fakes.model import Generation, Reply

PATHS = ("/v1/chat/completions", "/v1/completions", *EMBEDDING)


class PlainDialect(LlamaDialect):
    """Answers as a llama-server does where it answers at all, but shows nothing of one."""

    kind = "openai"
    stops_when_left = True
    closes_after_stream = False

    def headers(self, content_type: str) -> list[tuple[str, str]]:
        return [("Content-Type", content_type)] if content_type else []

    def get(self, method: str, path: str) -> Reply:
        if path != "/v1/models":
            return NOT_FOUND
        listed = orjson.loads(super().get(method, path).body)
        return Reply(200, "application/json", orjson.dumps({"object": "list", "data": listed["data"]}))

    def post(self, path: str, body: bytes) -> Reply | Generation:
        return super().post(path, body) if path in PATHS else NOT_FOUND
