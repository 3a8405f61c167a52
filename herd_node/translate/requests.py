"""One Ollama request in, one upstream call out. Pure."""

from __future__ import annotations

from herd_node.translate.base import Answer, Call, ModelFacts


def translate(path: str, body: bytes, facts: ModelFacts) -> Call | Answer:
    """`path` is the caller's (`/api/chat`, ...). Raises Refusal."""
    raise NotImplementedError
