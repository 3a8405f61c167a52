"""The requests that are compared: read from `corpus/*.jsonl`, one file an endpoint, one row a request.

A row has `name`, `from` (where its shape comes from) and one of
    body       JSON, written with Python's default spacing
    raw        the text itself, where spelling matters (numbers, whitespace, twice the same key)
    recording  a recorded exchange of `tests/golden/`: its request, and its answer from the fake
and perhaps
    on         the backends it is sent to; default: the fake Ollama
    fill       {mark: [text, times]}: what stands for the mark, so that large bodies are small here
    answer     {status, type, text, every, cut}: what the fake says. `every`: bytes a chunk, 0: one chunk,
               absent: a record a chunk; `cut`: no end of the body
Where the caller chooses and a row does not say `stream`, it is sent both ways: the field is put in first. Not
so where an answer is given or a refusal was recorded: the fake knows it by the bytes of this one request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.fakes.recordings import recording

FOLDER = Path(__file__).parent / "corpus"
PATHS = {
    "api-chat": "/api/chat",
    "api-embed": "/api/embed",
    "api-embeddings": "/api/embeddings",
    "api-generate": "/api/generate",
    "api-show": "/api/show",
    "v1-chat-completions": "/v1/chat/completions",
    "v1-completions": "/v1/completions",
    "v1-count-tokens": "/v1/messages/count_tokens",
    "v1-embeddings": "/v1/embeddings",
    "v1-messages": "/v1/messages",
    "v1-responses": "/v1/responses",
}
#: Endpoints that stream when asked to, and those that stream unless told not to.
_ON_REQUEST = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})
_BY_DEFAULT = frozenset({"/api/chat", "/api/generate"})


class Canned(NamedTuple):
    """What the fake answers to one request, byte for byte."""

    status: int
    content_type: str
    pieces: tuple[bytes, ...]
    whole: bool = True
    """False: the body has no end."""


class Case(NamedTuple):
    """One request as it is sent. `answer`: the fake's, where a row or a recording has one."""

    row: str
    way: str
    backend: str
    path: str
    body: bytes
    answer: Canned | None

    @property
    def id(self) -> str:
        return f"{self.backend}: {self.row} {self.way}"


def read() -> list[Case]:
    """Every request of the corpus, in the order of the files."""
    return [case for stem in PATHS for row in _rows(stem) for case in _cases(stem, row)]


def _rows(stem: str) -> list[dict[str, Any]]:
    lines = (FOLDER / f"{stem}.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def _cases(stem: str, row: dict[str, Any]) -> Iterator[Case]:
    path, body = PATHS[stem], _body(row)
    canned = _canned(row)
    for backend in row.get("on", ["ollama"]):
        for way, sent in [("as it is", body)] if _is_alone(row, canned) else _ways(path, body):
            answer = canned if sent == body and backend == "ollama" else None
            yield Case(f"{stem}/{row['name']}", way, backend, path, sent, answer)


def _is_alone(row: dict[str, Any], canned: Canned | None) -> bool:
    refused = canned is not None and canned.status >= 400
    return "answer" in row or refused


def _body(row: dict[str, Any]) -> bytes:
    if "recording" in row:
        return recording(row["recording"]).request_body
    text: str = row["raw"] if "raw" in row else json.dumps(row["body"], ensure_ascii=False)
    for mark, (filling, times) in row.get("fill", {}).items():
        text = text.replace(mark, filling * times)
    return text.encode("utf-8", "surrogateescape")


def _ways(path: str, body: bytes) -> list[tuple[str, bytes]]:
    if path not in _ON_REQUEST | _BY_DEFAULT or b'"stream"' in body or not body.startswith(b'{"'):
        return [("as it is", body)]
    if path in _BY_DEFAULT:
        return [("whole", b'{"stream": false, ' + body[1:]), ("stream", body)]
    return [("whole", body), ("stream", b'{"stream": true, ' + body[1:])]


def _canned(row: dict[str, Any]) -> Canned | None:
    if "recording" in row:
        recorded = recording(row["recording"])
        content_type = recorded.headers["content-type"]
        pieces = _by_record(recorded.body, content_type)
        return Canned(recorded.status, content_type, pieces, recorded.complete)
    if "answer" not in row:
        return None
    answer = row["answer"]
    data, every = answer["text"].encode("utf-8", "surrogateescape"), answer.get("every")
    if every is None:
        pieces = _by_record(data, answer["type"])
    else:
        pieces = tuple(data[at : at + (every or len(data))] for at in range(0, len(data), every or len(data)))
    return Canned(answer["status"], answer["type"], pieces, not answer.get("cut", False))


def _by_record(data: bytes, content_type: str) -> tuple[bytes, ...]:
    """As Ollama writes: a record a chunk."""
    ends = {"text/event-stream": b"\n\n", "application/x-ndjson": b"\n"}
    end = ends.get(content_type.partition(";")[0])
    if end is None:
        return (data,)
    parts = data.split(end)
    return tuple(part + end for part in parts[:-1]) + ((parts[-1],) if parts[-1] else ())
