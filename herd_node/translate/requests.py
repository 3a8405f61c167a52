"""One Ollama request in, one upstream call out. Pure.

1. The body is an object and names a model.
2. Types are checked as Ollama checks them; what the backend cannot do is refused by name.
3. Nothing to generate (no prompt, no messages): answered here, loading and unloading are the gateway's.
4. A prompt that is text already (raw, suffix, template, context): prompts.py.
5. The rest becomes a streaming chat completion, also for a caller that wants one object: a llama-server
   whose client leaves stops only if it was streaming (docs/backends.md).
"""

from __future__ import annotations

import orjson

from herd_node.translate.base import JSON, Answer, Call, ModelFacts, Question, Refusal
from herd_node.translate.embeddings import translate_embed, translate_embeddings
from herd_node.translate.fields import Fields, parse_object
from herd_node.translate.messages import chat_messages, content, tool_definitions
from herd_node.translate.moments import keep_alive_s, rfc3339
from herd_node.translate.names import full_name
from herd_node.translate.options import sampling_fields
from herd_node.translate.prompts import (
    Common,
    Json,
    Made,
    TextPrompt,
    context_of_chat,
    plain_messages,
    schema_format,
)
from herd_node.translate.responses import Dialect, GenerationReader, Manner, chat_line, generate_line
from herd_node.translate.show import show_answer

CHAT_PATH = "/v1/chat/completions"

_THINK_LEVELS = ("high", "medium", "low", "max")
_THINK_CHOICES = '"high", "medium", "low", "max", true, or false'
REFUSED_FIELDS = ("_debug_render_only",)
#: Fields that make a prompt text of the caller's own.
TEXT_FIELDS = ("raw", "suffix", "template", "context")


def translate(
    path: str, body: bytes, facts: ModelFacts, *, wall_s: float = 0.0
) -> Call | Answer | Question[Made]:
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
    common = _common(fields, facts, asked)
    if not messages:
        return _nothing_to_say(common, facts, asked, wall_s, chat_line)
    if tools and not facts.can("tools"):
        raise Refusal(400, f"{full_name(asked)} does not support tools")
    upstream: Json = {"messages": chat_messages(messages, facts, asked)}
    if tools:
        upstream["tools"] = tool_definitions(tools)
    manner = Manner(
        line=chat_line, stream=fields.flag("stream") is not False, top_logprobs=common.top_logprobs
    )
    return _chat_call(upstream, common, facts, asked, manner)


def _generate(body: bytes, facts: ModelFacts, wall_s: float) -> Made | Question[Made]:
    fields = Fields(parse_object(body, "GenerateRequest"), "GenerateRequest")
    asked = fields.text("model")
    if not asked:
        raise Refusal(404, "model '' not found")
    # 1. checks
    prompt, system = fields.text("prompt"), fields.text("system")
    raw, suffix, template = fields.flag("raw"), fields.text("suffix"), fields.text("template")
    context = fields.items("context", "[]int")
    images = fields.items("images", "[]api.ImageData")
    common = _common(fields, facts, asked)
    if raw and (template or system or context):
        raise Refusal(400, "raw mode does not support template, system, or context")
    if not prompt:
        return _nothing_to_say(common, facts, asked, wall_s, generate_line)
    # 2. text of the caller's own
    if raw or suffix or template or context:
        text = TextPrompt(fields, common, facts, asked)
        if raw:
            return text.raw()
        return text.suffix() if suffix else text.rendered()
    # 3. a chat of system and user
    messages = plain_messages(fields)
    messages[-1]["content"] = content(prompt, images, facts, asked)
    keeps_context = facts.flavour == "llama.cpp" and not images
    manner = Manner(
        line=generate_line,
        stream=fields.flag("stream") is not False,
        top_logprobs=common.top_logprobs,
        context_of=context_of_chat(facts, messages, common.template_kwargs) if keeps_context else None,
    )
    return _chat_call({"messages": messages}, common, facts, asked, manner)


def _common(fields: Fields, facts: ModelFacts, asked: str) -> Common:
    """Every field is checked, also those without effect here."""
    for name in REFUSED_FIELDS:
        if fields.values.get(name):
            raise Refusal(400, f'"{name}" is not supported on this node')
    for name in ("stream", "truncate", "shift", "raw"):
        fields.flag(name)
    top_logprobs = fields.whole_number("top_logprobs")
    if not 0 <= top_logprobs <= 20:
        raise Refusal(400, "top_logprobs must be between 0 and 20")
    unload = keep_alive_s(fields.values.get("keep_alive")) == 0
    return Common(
        sampling=sampling_fields(fields.mapping("options", "map[string]interface {}"), facts),
        schema=_schema(fields.values.get("format")),
        think=_think(fields.values.get("think"), facts, asked),
        top_logprobs=top_logprobs if fields.flag("logprobs") else None,
        unload=unload and facts.unloads,
    )


def _think(think: object, facts: ModelFacts, asked: str) -> Json:
    """Unset means on where the model can; a server of which little is known is then left alone."""
    if think is not None and not isinstance(think, (bool, str)):
        raise Refusal(400, f"think must be a boolean or string ({_THINK_CHOICES})")
    if isinstance(think, str) and think not in _THINK_LEVELS:
        raise Refusal(400, f'invalid think value: "{think}" (must be {_THINK_CHOICES})')
    if not facts.can("thinking"):
        if think:
            raise Refusal(400, f'"{asked}" does not support thinking')
        return {}
    if facts.flavour == "openai":
        if isinstance(think, str):
            return {"reasoning_effort": "high" if think == "max" else think}
        return {} if think is None else {"chat_template_kwargs": {"enable_thinking": think}}
    effort = {"reasoning_effort": think} if isinstance(think, str) else {}
    return {"chat_template_kwargs": {"enable_thinking": think is not False}, **effort}


def _schema(wanted: object) -> Json | None:
    if wanted is None or wanted == "":
        return None
    if wanted == "json":
        return {"type": "object"}
    if not isinstance(wanted, dict):
        quoted = orjson.dumps(orjson.dumps(wanted).decode()).decode()
        raise Refusal(400, f'invalid format: {quoted}; expected "json" or a valid JSON Schema object')
    return wanted


def _nothing_to_say(common: Common, facts: ModelFacts, asked: str, wall_s: float, line: Dialect) -> Answer:
    """Loads, or unloads. A backend that keeps its model says `load` to both: that is how it stands then."""
    made = line(asked, rfc3339(wall_s), "", "", [])
    reason = "unload" if common.unload else "load"
    body = orjson.dumps({**made, "done": True, "done_reason": reason})
    return Answer(status=200, body=body, content_type=JSON, unload=common.unload)


def _chat_call(upstream: Json, common: Common, facts: ModelFacts, asked: str, manner: Manner) -> Call:
    fields: Json = {
        "model": facts.upstream_id,
        "stream": True,
        **common.think,
        **common.sampling,
        **upstream,
    }
    if common.schema is not None:
        fields["response_format"] = schema_format(common.schema)
    if common.top_logprobs is not None:
        fields["logprobs"] = True
        if facts.flavour == "llama.cpp" or common.top_logprobs:
            fields["top_logprobs"] = max(1, common.top_logprobs)
    if facts.flavour == "openai":
        fields["stream_options"] = {"include_usage": True}
    return Call(
        path=CHAT_PATH,
        body=orjson.dumps(fields),
        stream=manner.stream,
        sse=True,
        reader=GenerationReader(asked, manner),
        unload=common.unload,
    )
