"""What becomes of each kind of request on each kind of backend: the table of docs/compatibility.md.

Every cell is asserted by tests/router/test_compatibility_table.py, which sends the row's request through a
router and an agent to a fake of that kind, and looks at what the fake was asked. After a change of a cell:

    python -m tests.compatibility

writes the table into the page; tests/test_docs.py fails while the page has another one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
BEGIN, END = "<!-- made by python -m tests.compatibility -->", "<!-- to here -->"
KINDS = ("ollama", "llama-server", "openai")
HEADINGS = ("Ollama", "llama.cpp", "other OpenAI-compatible server")

_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
_IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_PNG}"}}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
_TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
_HI = [{"role": "user", "content": "hi"}]


class Row(NamedTuple):
    """`cells` are one a kind. `model` is put into `fields` by the test, as the kind's own."""

    path: str
    what: str
    fields: dict[str, Any]
    cells: tuple[str, str, str]
    method: str = "POST"
    model: str = "chat"
    """Which of the kind's models: chat, embed, rank; or "" for none."""


def refused(status: int) -> str:
    """By the router or the agent; nothing of it reached the backend."""
    return f"refused ({status})"


def backends(status: int) -> str:
    """Passed, and refused by the backend; its answer came back."""
    return f"passed; the backend's {status}"


def translated(path: str) -> str:
    return f"translated to `{path}`"


PASSED = "passed"
FOLDED = "passed, as a stream"
LOADED_CONTEXT = "passed with the loaded one"
BY_NODE = "answered by the agent"
DONE = "done by the agent"
ESTIMATED = "estimated by the router"
BACKENDS_400 = backends(400)
REFUSED, LACKING = refused(400), refused(501)
AS_CHAT = translated("/v1/chat/completions")
AS_PROMPT = translated("/v1/completions")
AS_EMBEDDINGS = translated("/v1/embeddings")

ROWS: tuple[Row, ...] = (
    Row("/v1/chat/completions", "", {"messages": _HI}, (PASSED, FOLDED, PASSED)),
    Row("/v1/chat/completions", "`stream`", {"messages": _HI, "stream": True}, (PASSED, PASSED, PASSED)),
    Row(
        "/v1/chat/completions",
        "`tools`",
        {"messages": _HI, "tools": _TOOLS, "stream": True},
        (PASSED, PASSED, PASSED),
    ),
    Row(
        "/v1/chat/completions",
        "an image",
        {"messages": [{"role": "user", "content": [_IMAGE]}], "stream": True},
        (PASSED, PASSED, PASSED),
    ),
    Row(
        "/v1/chat/completions",
        "`response_format`",
        {
            "messages": _HI,
            "response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}},
            "stream": True,
        },
        (PASSED, PASSED, PASSED),
    ),
    Row(
        "/v1/chat/completions",
        "fields that nobody knows",
        {"messages": _HI, "nobody_knows": [1.0, "ü"], "stream": True},
        (PASSED, PASSED, PASSED),
    ),
    Row(
        "/v1/chat/completions",
        "a field of the wrong type that the router does not read",
        {"messages": _HI, "max_tokens": "many", "stream": True},
        (BACKENDS_400, BACKENDS_400, BACKENDS_400),
    ),
    Row("/v1/completions", "", {"prompt": "hi"}, (PASSED, FOLDED, PASSED)),
    Row("/v1/completions", "`stream`", {"prompt": "hi", "stream": True}, (PASSED, PASSED, PASSED)),
    Row(
        "/v1/completions",
        "several prompts",
        {"prompt": ["hi", "ho"], "stream": True},
        (PASSED, PASSED, PASSED),
    ),
    Row(
        "/v1/completions",
        "`suffix`",
        {"prompt": "hi", "suffix": "ho", "stream": True},
        (PASSED, PASSED, PASSED),
    ),
    Row("/v1/embeddings", "", {"input": ["hi", "ho"]}, (PASSED, PASSED, PASSED), model="embed"),
    Row("/v1/responses", "", {"input": "hi"}, (PASSED, FOLDED, LACKING)),
    Row("/v1/responses", "`stream`", {"input": "hi", "stream": True}, (PASSED, PASSED, LACKING)),
    Row(
        "/v1/responses",
        "`previous_response_id`",
        {"input": "hi", "previous_response_id": "r1"},
        (REFUSED, REFUSED, REFUSED),
    ),
    Row(
        "/v1/rerank", "", {"query": "hi", "documents": ["hi", "ho"]}, (LACKING, PASSED, LACKING), model="rank"
    ),
    Row("/rerank", "", {"query": "hi", "documents": ["hi", "ho"]}, (LACKING, PASSED, LACKING), model="rank"),
    Row("/v1/audio/transcriptions", "a form", {}, (PASSED, LACKING, LACKING)),
    Row("/v1/images/generations", "", {"prompt": "a tree"}, (LACKING, LACKING, LACKING)),
    Row("/v1/messages", "", {"max_tokens": 9, "messages": _HI}, (PASSED, FOLDED, LACKING)),
    Row(
        "/v1/messages",
        "`stream`",
        {"max_tokens": 9, "messages": _HI, "stream": True},
        (PASSED, PASSED, LACKING),
    ),
    Row(
        "/v1/messages",
        "`tools`",
        {"max_tokens": 9, "messages": _HI, "tools": [{"name": "look", "input_schema": {}}], "stream": True},
        (PASSED, PASSED, LACKING),
    ),
    Row(
        "/v1/messages",
        "without `max_tokens`",
        {"messages": _HI, "stream": True},
        (BACKENDS_400, PASSED, LACKING),
    ),
    Row("/v1/messages/count_tokens", "", {"messages": _HI}, (ESTIMATED, PASSED, ESTIMATED)),
    Row("/api/chat", "", {"messages": _HI}, (PASSED, AS_CHAT, AS_CHAT)),
    Row("/api/chat", "`stream: false`", {"messages": _HI, "stream": False}, (PASSED, AS_CHAT, AS_CHAT)),
    Row("/api/chat", "`tools`", {"messages": _HI, "tools": _TOOLS}, (PASSED, AS_CHAT, AS_CHAT)),
    Row(
        "/api/chat",
        "an image (PNG, JPEG)",
        {"messages": [{"role": "user", "content": "hi", "images": [_PNG]}]},
        (PASSED, AS_CHAT, AS_CHAT),
    ),
    Row(
        "/api/chat",
        "an image that is none",
        {"messages": [{"role": "user", "content": "hi", "images": ["aGk="]}]},
        (PASSED, REFUSED, REFUSED),
    ),
    Row(
        "/api/chat",
        "`format`: `json` or a schema",
        {"messages": _HI, "format": _SCHEMA},
        (PASSED, AS_CHAT, AS_CHAT),
    ),
    Row("/api/chat", "`format: xml`", {"messages": _HI, "format": "xml"}, (BACKENDS_400, REFUSED, REFUSED)),
    Row("/api/chat", "`think`", {"messages": _HI, "think": True}, (PASSED, AS_CHAT, AS_CHAT)),
    Row("/api/chat", "`think`: a level", {"messages": _HI, "think": "low"}, (PASSED, AS_CHAT, AS_CHAT)),
    Row(
        "/api/chat",
        "`logprobs`",
        {"messages": _HI, "logprobs": True, "top_logprobs": 2},
        (PASSED, AS_CHAT, AS_CHAT),
    ),
    Row(
        "/api/chat",
        "`options`",
        {"messages": _HI, "options": {"temperature": 0.5, "num_predict": 5, "seed": 1}},
        (PASSED, AS_CHAT, AS_CHAT),
    ),
    Row(
        "/api/chat",
        "an option of the wrong type",
        {"messages": _HI, "options": {"top_k": "many"}},
        (BACKENDS_400, REFUSED, REFUSED),
    ),
    Row(
        "/api/chat",
        "an option that nobody knows",
        {"messages": _HI, "options": {"nobody_knows": 1}},
        (PASSED, AS_CHAT, AS_CHAT),
    ),
    Row(
        "/api/chat",
        "`num_ctx` up to the context that is loaded",
        {"messages": _HI, "options": {"num_ctx": 1024}},
        (LOADED_CONTEXT, AS_CHAT, AS_CHAT),
    ),
    Row(
        "/api/chat",
        "`num_ctx` beyond the context of the server",
        {"messages": _HI, "options": {"num_ctx": 4096}},
        (PASSED, REFUSED, AS_CHAT),
    ),
    Row("/api/chat", "`keep_alive: 5m`", {"messages": _HI, "keep_alive": "5m"}, (PASSED, AS_CHAT, AS_CHAT)),
    Row(
        "/api/chat",
        "`keep_alive` that is no duration",
        {"messages": _HI, "keep_alive": "soon"},
        (PASSED, REFUSED, REFUSED),
    ),
    Row("/api/chat", "no messages: load", {"messages": []}, (PASSED, BY_NODE, BY_NODE)),
    Row(
        "/api/chat",
        "no messages, `keep_alive: 0`: unload",
        {"messages": [], "keep_alive": 0},
        (PASSED, BY_NODE, BY_NODE),
    ),
    Row("/api/generate", "", {"prompt": "hi"}, (PASSED, AS_CHAT, AS_CHAT)),
    Row("/api/generate", "`system`", {"prompt": "hi", "system": "Be brief."}, (PASSED, AS_CHAT, AS_CHAT)),
    Row(
        "/api/generate",
        "`raw`",
        {"prompt": "hi", "raw": True},
        (PASSED, translated("/completion"), AS_PROMPT),
    ),
    Row(
        "/api/generate",
        "`suffix`",
        {"prompt": "hi", "suffix": "ho"},
        (PASSED, translated("/infill"), AS_PROMPT),
    ),
    Row(
        "/api/generate",
        "`template`",
        {"prompt": "hi", "template": "{{ .Prompt }}"},
        (PASSED, translated("/completion"), AS_PROMPT),
    ),
    Row(
        "/api/generate",
        "`context`",
        {"prompt": "hi", "context": [104, 105]},
        (PASSED, translated("/completion"), REFUSED),
    ),
    Row(
        "/api/generate",
        "an image (PNG, JPEG)",
        {"prompt": "hi", "images": [_PNG]},
        (PASSED, AS_CHAT, AS_CHAT),
    ),
    Row(
        "/api/generate",
        "an image beside `raw`",
        {"prompt": "hi", "raw": True, "images": [_PNG]},
        (PASSED, REFUSED, REFUSED),
    ),
    Row(
        "/api/generate",
        "`_debug_render_only`",
        {"prompt": "hi", "_debug_render_only": True},
        (PASSED, REFUSED, REFUSED),
    ),
    Row("/api/embed", "", {"input": ["hi", "ho"]}, (PASSED, AS_EMBEDDINGS, AS_EMBEDDINGS), model="embed"),
    Row(
        "/api/embed",
        "`dimensions`",
        {"input": "hi", "dimensions": 8},
        (PASSED, AS_EMBEDDINGS, AS_EMBEDDINGS),
        model="embed",
    ),
    Row("/api/embed", "nothing to embed", {"input": []}, (PASSED, BY_NODE, BY_NODE), model="embed"),
    Row("/api/embeddings", "", {"prompt": "hi"}, (PASSED, AS_EMBEDDINGS, AS_EMBEDDINGS), model="embed"),
    Row("/api/show", "", {}, (PASSED, BY_NODE, BY_NODE)),
    Row("/api/pull", "", {"node_id": "NODE"}, (PASSED, LACKING, LACKING)),
    Row("/api/push", "", {"node_id": "NODE"}, (PASSED, LACKING, LACKING)),
    Row(
        "/api/create",
        "`from`",
        {"model": "made", "from": "MODEL", "node_id": "NODE"},
        (PASSED, LACKING, LACKING),
        model="",
    ),
    Row(
        "/api/copy",
        "",
        {"source": "MODEL", "destination": "copied", "node_id": "NODE"},
        (PASSED, LACKING, LACKING),
        model="",
    ),
    Row(
        "/api/blobs/sha256:0000000000000000000000000000000000000000000000000000000000000000",
        "",
        {},
        (PASSED, LACKING, LACKING),
        method="HEAD",
        model="",
    ),
    Row(
        "/api/delete",
        "",
        {"model": "copied", "node_id": "NODE"},
        (PASSED, LACKING, LACKING),
        method="DELETE",
        model="",
    ),
    Row("/dashboard/api/load", "", {"node_id": "NODE"}, (DONE, LACKING, LACKING)),
    Row("/dashboard/api/unload", "", {"node_id": "NODE"}, (DONE, LACKING, LACKING)),
)


def table(rows: Sequence[Row] = ROWS) -> str:
    """The page's table."""
    lines = [
        "| request | " + " | ".join(HEADINGS) + " |",
        "|---" * (len(HEADINGS) + 1) + "|",
        *(f"| {title(row)} | " + " | ".join(row.cells) + " |" for row in rows),
    ]
    return "\n".join(lines)


def title(row: Row) -> str:
    method = "" if row.method == "POST" else f"{row.method} "
    path = row.path.replace("0" * 64, "…")
    return f"`{method}{path}`" + (f": {row.what}" if row.what else "")


def in_page(text: str) -> str:
    """The page with the table between its marks."""
    marks = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    assert len(marks.findall(text)) == 1
    return marks.sub(lambda _: f"{BEGIN}\n\n{table()}\n\n{END}", text)


if __name__ == "__main__":
    PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
