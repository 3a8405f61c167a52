"""The rows of the route table that both programs serve: what a client may send on to a node.

The router's own table (`herd.web.routes`) is made of these rows and its own; the gateway's allow-list is
made of these rows alone, so a path that is not here never reaches a backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Dialect = Literal["openai", "ollama", "anthropic", "fleet"]
Kind = Literal[
    "chat", "completion", "generate", "embedding", "responses", "rerank", "transcription", "image",
    "count", "show", "list", "status", "manage", "page",
]  # fmt: skip
Who = Literal["anyone", "lan", "loopback", "admin"]
Verb = Literal["pull", "push", "create", "copy", "delete", "blobs", "load", "unload"]


class Route(NamedTuple):
    """One row: everything that any part of either program knows about a URL.

    `model_at` says where the model name stands: "body" (top-level field `model`), "form" (the field of a
    multipart form), "path" (the rest of the path), or "" (the call names no model). A "spooled" body is kept
    in a temporary file once it is large. `needs` are words a model's capabilities must contain; one that is
    a path is an endpoint that its backend must offer. `who` is the least principal that may call it
    (`herd.web.admit`).
    """

    methods: tuple[str, ...]
    path: str
    dialect: Dialect
    kind: Kind
    model_at: Literal["body", "form", "path", ""] = "body"
    body: Literal["whole", "spooled", "none"] = "whole"
    needs: frozenset[str] = frozenset()
    who: Who = "lan"


_COMPLETION = frozenset({"completion"})
_EMBEDDING = frozenset({"embedding"})

#: Endpoints that not every backend has, and who does. An agent tries each of them once, and says in its beats
#: which of them its backend offers (docs/protocol.md §3, docs/compatibility.md).
OFFERED_BY: dict[str, str] = {
    "/v1/messages": "an Ollama or a llama-server that is new enough for Anthropic's dialect",
    "/v1/messages/count_tokens": "a llama-server that is new enough for Anthropic's dialect",
    "/v1/responses": "an Ollama or a llama-server that is new enough",
    "/v1/rerank": "a llama-server started with --reranking, or another server with that endpoint,",
    "/v1/audio/transcriptions": "an Ollama or a llama-server with a model that takes audio",
    "/v1/images/generations": "an OpenAI-compatible server that makes images",
}


def _offered(path: str, *more: str) -> frozenset[str]:
    assert path in OFFERED_BY
    return frozenset({path, *more})


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
    Route(("POST",), "/v1/responses", "openai", "responses", needs=_offered("/v1/responses", "completion")),
    Route(("POST",), "/v1/rerank", "openai", "rerank", needs=_offered("/v1/rerank")),
    Route(("POST",), "/rerank", "openai", "rerank", needs=_offered("/v1/rerank")),
    Route(
        ("POST",), "/v1/audio/transcriptions", "openai", "transcription", "form", "spooled",
        needs=_offered("/v1/audio/transcriptions"),
    ),
    Route(("POST",), "/v1/images/generations", "openai", "image", needs=_offered("/v1/images/generations")),
    Route(("POST",), "/v1/messages", "anthropic", "chat", needs=_offered("/v1/messages", "completion")),
    Route(
        ("POST",), "/v1/messages/count_tokens", "anthropic", "count",
        needs=_offered("/v1/messages/count_tokens", "completion"),
    ),
)  # fmt: skip

FORWARDED_BY_PATH: dict[str, Route] = {route.path: route for route in FORWARDED}


#: The endpoint that a backend must offer for a path; for a path that is not here every backend of the dialect
#: has it.
ENDPOINT_BY_PATH: Mapping[str, str] = {
    route.path: word for route in FORWARDED for word in route.needs if word.startswith("/")
}


_BLOBS = "/api/blobs/"

#: Calls that manage the models of one node, by what they do (docs/protocol.md §4). All but the last two are
#: Ollama's own; those are only for the router and the agent, whatever the backend calls it.
MANAGED: Mapping[Verb, Route] = {
    "pull": Route(("POST",), "/api/pull", "ollama", "manage", who="admin"),
    "push": Route(("POST",), "/api/push", "ollama", "manage", who="admin"),
    "create": Route(("POST",), "/api/create", "ollama", "manage", who="admin"),
    "copy": Route(("POST",), "/api/copy", "ollama", "manage", "", who="admin"),
    "delete": Route(("DELETE",), "/api/delete", "ollama", "manage", who="admin"),
    "blobs": Route(("HEAD", "POST"), _BLOBS + "{digest}", "ollama", "manage", "", "spooled", who="admin"),
    "load": Route(("POST",), "/herd/v1/load", "ollama", "manage", who="admin"),
    "unload": Route(("POST",), "/herd/v1/unload", "ollama", "manage", who="admin"),
}
_VERBS_BY_PATH: dict[str, Verb] = {route.path: verb for verb, route in MANAGED.items()}


def managing(path: str) -> Verb | None:
    """What a call to this path does, if it manages models."""
    if path.startswith(_BLOBS) and path.count("/") == _BLOBS.count("/") and len(path) > len(_BLOBS):
        return "blobs"
    verb = _VERBS_BY_PATH.get(path)
    return None if verb == "blobs" else verb
