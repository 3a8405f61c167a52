"""The rows of the route table that both programs serve: what a client may send on to a node.

The router's own table (`herd.web.routes`) is made of these rows and its own; the gateway's allow-list is
made of these rows alone, so a path that is not here never reaches a backend.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Dialect = Literal["openai", "ollama", "anthropic", "fleet"]
Kind = Literal["chat", "completion", "generate", "embedding", "show", "list", "status", "manage", "page"]
Who = Literal["anyone", "lan", "loopback", "admin"]


class Route(NamedTuple):
    """One row: everything that any part of either program knows about a URL.

    `model_at` says where the model name stands: "body" (top-level field `model`), "path" (the rest of the
    path), or "" (the call names no model). `needs` are words a model's capabilities must contain.
    `who` is the least principal that may call it (`herd.web.admit`).
    """

    methods: tuple[str, ...]
    path: str
    dialect: Dialect
    kind: Kind
    model_at: Literal["body", "path", ""] = "body"
    body: Literal["whole", "none"] = "whole"
    needs: frozenset[str] = frozenset()
    who: Who = "lan"


_COMPLETION = frozenset({"completion"})
_EMBEDDING = frozenset({"embedding"})

#: Calls that are forwarded to one node, each in the caller's own dialect.
FORWARDED: tuple[Route, ...] = (
    Route(("POST",), "/v1/chat/completions", "openai", "chat", needs=_COMPLETION),
    Route(("POST",), "/v1/completions", "openai", "completion", needs=_COMPLETION),
    Route(("POST",), "/v1/embeddings", "openai", "embedding", needs=_EMBEDDING),
    Route(("POST",), "/api/chat", "ollama", "chat", needs=_COMPLETION),
    Route(("POST",), "/api/generate", "ollama", "generate", needs=_COMPLETION),
    Route(("POST",), "/api/embed", "ollama", "embedding", needs=_EMBEDDING),
    Route(("POST",), "/api/embeddings", "ollama", "embedding", needs=_EMBEDDING),
    Route(("POST",), "/api/show", "ollama", "show"),
)

FORWARDED_BY_PATH: dict[str, Route] = {route.path: route for route in FORWARDED}
