"""One Ollama request in, one upstream call out. Pure.

1. The body is an object and names a model.
2. Types are checked as Ollama checks them; what llama-server cannot do yet is refused by name.
3. Nothing to generate (no prompt, no messages): answered here, the model is always loaded.
4. The rest becomes a streaming chat completion, also for a caller that wants one object: a llama-server
   whose client leaves stops only if it was streaming (docs/backends.md).
"""

from __future__ import annotations

import orjson

from herd_node.translate.base import JSON, Answer, Call, ModelFacts, Refusal
from herd_node.translate.embeddings import translate_embed, translate_embeddings
from herd_node.translate.fields import Fields, parse_object
from herd_node.translate.messages import chat_messages, content, tool_definitions
from herd_node.translate.moments import keep_alive_s, rfc3339
from herd_node.translate.options import sampling_fields
from herd_node.translate.responses import Dialect, GenerationReader, chat_line, generate_line
from herd_node.translate.show import show_answer

CHAT_PATH = "/v1/chat/completions"

_THINK_LEVELS = ("high", "medium", "low", "max")
_THINK_CHOICES = '"high", "medium", "low", "max", true, or false'
FIELDS_FOR_LATER = ("raw", "suffix", "template", "context", "logprobs", "_debug_render_only")


def translate(path: str, body: bytes, facts: ModelFacts, *, wall_s: float = 0.0) -> Call | Answer:
    """`path` is the caller's (`/api/chat`, ...); `wall_s` dates an answer made here. Raises Refusal."""
    match path:
        case "/api/chat":
            return _chat(body, facts, wall_s)
        case "/api/generate":
            return _generate(body, facts, wall_s)
        case "/api/embed":
            return translate_embed(Fields(parse_object(body, "EmbedRequest"), "EmbedRequest"), facts)
        case "/api/embeddings":
            fields = Fields(parse_object(body, "EmbeddingRequest"), "EmbeddingRequest")
            return translate_embeddings(fields, facts)
        case "/api/show":
            return show_answer(Fields(parse_object(body, "ShowRequest"), "ShowRequest"), facts)
        case _:
            raise Refusal(404, f"{path} is not served by llama.cpp nodes")


def _chat(body: bytes, facts: ModelFacts, wall_s: float) -> Call | Answer:
    fields = Fields(parse_object(body, "ChatRequest"), "ChatRequest")
    asked = fields.text("model")
    if not asked:
        raise Refusal(400, "model is required")
    messages = fields.items("messages", "[]api.Message")
    tools = fields.items("tools", "api.Tools")
    upstream = _common(fields, facts, asked)
    if not messages:
        return _loaded(fields, asked, wall_s, chat_line)
    if tools and not facts.can("tools"):
        raise Refusal(400, f"{_full_name(asked)} does not support tools")
    upstream["messages"] = chat_messages(messages, facts, asked)
    if tools:
        upstream["tools"] = tool_definitions(tools)
    return _call(upstream, fields, asked, chat_line)


def _generate(body: bytes, facts: ModelFacts, wall_s: float) -> Call | Answer:
    fields = Fields(parse_object(body, "GenerateRequest"), "GenerateRequest")
    asked = fields.text("model")
    if not asked:
        raise Refusal(404, "model '' not found")
    prompt, system = fields.text("prompt"), fields.text("system")
    images = fields.items("images", "[]api.ImageData")
    upstream = _common(fields, facts, asked)
    if not prompt:
        return _loaded(fields, asked, wall_s, generate_line)
    messages: list[dict[str, object]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content(prompt, images, facts, asked)})
    upstream["messages"] = messages
    return _call(upstream, fields, asked, generate_line)


def _common(fields: Fields, facts: ModelFacts, asked: str) -> dict[str, object]:
    """What chat and generate share; every field is checked, also those without effect here."""
    _refuse_later_fields(fields)
    for name in ("stream", "truncate", "shift"):
        fields.flag(name)
    keep_alive_s(fields.values.get("keep_alive"))
    return {
        "model": facts.upstream_id,
        "stream": True,
        **_think(fields.values.get("think"), facts, asked),
        **_format(fields.values.get("format")),
        **sampling_fields(fields.mapping("options", "map[string]interface {}"), facts),
    }


def _refuse_later_fields(fields: Fields) -> None:
    if not 0 <= fields.whole_number("top_logprobs") <= 20:
        raise Refusal(400, "top_logprobs must be between 0 and 20")
    for name in FIELDS_FOR_LATER:
        if fields.values.get(name):
            raise Refusal(400, f'"{name}" is not supported yet on llama.cpp nodes')


def _think(think: object, facts: ModelFacts, asked: str) -> dict[str, object]:
    """Unset means on where the model can."""
    if think is not None and not isinstance(think, (bool, str)):
        raise Refusal(400, f"think must be a boolean or string ({_THINK_CHOICES})")
    if isinstance(think, str) and think not in _THINK_LEVELS:
        raise Refusal(400, f'invalid think value: "{think}" (must be {_THINK_CHOICES})')
    if not facts.can("thinking"):
        if think:
            raise Refusal(400, f'"{asked}" does not support thinking')
        return {}
    fields: dict[str, object] = {"chat_template_kwargs": {"enable_thinking": think is not False}}
    if isinstance(think, str):
        fields["reasoning_effort"] = think
    return fields


def _format(wanted: object) -> dict[str, object]:
    """`json_object` is not enforced by llama-server; a schema is."""
    if wanted is None or wanted == "":
        return {}
    if wanted == "json":
        wanted = {"type": "object"}
    if not isinstance(wanted, dict):
        quoted = orjson.dumps(orjson.dumps(wanted).decode()).decode()
        raise Refusal(400, f'invalid format: {quoted}; expected "json" or a valid JSON Schema object')
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "schema", "schema": wanted}}}


def _loaded(fields: Fields, asked: str, wall_s: float, line: Dialect) -> Answer:
    if keep_alive_s(fields.values.get("keep_alive")) == 0:
        raise Refusal(400, f'"{asked}" cannot be unloaded: a llama.cpp node keeps its model')
    made = line(asked, rfc3339(wall_s), "", "", [])
    return Answer(
        status=200,
        body=orjson.dumps({**made, "done": True, "done_reason": "load"}),
        content_type=JSON,
    )


def _call(upstream: dict[str, object], fields: Fields, asked: str, line: Dialect) -> Call:
    stream = fields.flag("stream") is not False
    reader = GenerationReader(asked, line, stream=stream)
    return Call(path=CHAT_PATH, body=orjson.dumps(upstream), stream=stream, sse=True, reader=reader)


def _full_name(asked: str) -> str:
    """`registry.ollama.ai/library/x:latest`, as Ollama spells a name in full."""
    tagged = asked if ":" in asked.rpartition("/")[2] else f"{asked}:latest"
    missing = {0: "registry.ollama.ai/library/", 1: "registry.ollama.ai/"}
    return missing.get(tagged.count("/"), "") + tagged
