"""/api/generate with a prompt that is text already: `raw`, `suffix`, `template`, `context`. Pure.

raw        the prompt as it is                                      → /completion
suffix     both sides of the gap                                    → /infill
template   the caller's Go template, rendered here (gotemplate.py)  → /completion
context    the tokens of the talk so far, turned back into text,
           then the model's own template for what is new            → /detokenize, /apply-template

On a server that speaks the plain OpenAI dialect all text goes to /v1/completions, and `context` is refused:
its tokens cannot be read there. What llama-server answered gets its own `context` for the next turn, if the
prompt was not raw: /apply-template and /tokenize, asked once the answer is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import orjson

from herd_node.translate.base import Answer, Call, ModelFacts, Question, Refusal
from herd_node.translate.events import Source, as_object, native_piece, text_piece
from herd_node.translate.fields import Fields, wrong_type
from herd_node.translate.gotemplate import Template
from herd_node.translate.responses import (
    INFILL_PATH,
    ContextOf,
    GenerationReader,
    Manner,
    generate_line,
)
from herd_node.translate.thoughts import Thoughts

COMPLETION_PATH = "/completion"
OPENAI_COMPLETION_PATH = "/v1/completions"

Made = Call | Answer
Json = dict[str, object]


class Common(NamedTuple):
    """What every request to generate has, checked."""

    sampling: Json
    schema: Json | None
    think: Json
    """`chat_template_kwargs` and `reasoning_effort`, where they have something to say."""
    top_logprobs: int | None
    """None: no log probabilities."""
    unload: bool

    @property
    def template_kwargs(self) -> Json:
        return as_object(self.think.get("chat_template_kwargs"))


class TextPrompt:
    """One request of that kind. Raises Refusal, here and in its steps."""

    def __init__(self, fields: Fields, common: Common, facts: ModelFacts, asked: str) -> None:
        self._fields = fields
        self._common = common
        self._facts = facts
        self._asked = asked
        if fields.items("images", "[]api.ImageData"):
            raise Refusal(
                400, '"images" do not go with "raw", "suffix", "template" or "context" on this node'
            )

    # ---- the four kinds

    def raw(self) -> Call:
        return self._completion(self._fields.text("prompt"), keeps_context=False)

    def suffix(self) -> Call:
        prompt, suffix = self._fields.text("prompt"), self._fields.text("suffix")
        if self._facts.flavour == "openai":
            return self._call(OPENAI_COMPLETION_PATH, {"prompt": prompt, "suffix": suffix}, text_piece)
        return self._call(INFILL_PATH, {"input_prefix": prompt, "input_suffix": suffix}, native_piece)

    def rendered(self) -> Made | Question[Made]:
        """The prompt by the caller's template or the model's own, behind the text of the context."""
        context = self._fields.items("context", "[]int")
        written = self._fields.text("template")
        for token in context:
            if isinstance(token, bool) or not isinstance(token, int):
                raise wrong_type(token, "GenerateRequest.context", "int")
        if context and self._facts.flavour == "openai":
            raise Refusal(400, '"context" cannot be read by this node\'s backend; use /api/chat')
        prompt = self._by_template(written) if written else None
        if not context:
            return self._completion(prompt or "", keeps_context=True)
        body = orjson.dumps({"model": self._facts.upstream_id, "tokens": context})
        return Question("/detokenize", body, lambda status, said: self._behind(status, said, prompt))

    # ---- the steps

    def _by_template(self, written: str) -> str:
        system, prompt = self._fields.text("system"), self._fields.text("prompt")
        think = self._fields.values.get("think")
        return Template(written).generate(
            system,
            prompt,
            think=bool(self._common.template_kwargs.get("enable_thinking")),
            think_is_set=think is not None,
        )

    def _behind(self, status: int, body: bytes, prompt: str | None) -> Made | Question[Made]:
        before = _text_in(body, "content")
        if status != 200 or before is None:
            raise Refusal(400, '"context" holds tokens that this model does not have')
        if prompt is not None:
            return self._completion(before + prompt, keeps_context=True)

        def then(status: int, body: bytes) -> Made:
            rendered = _text_in(body, "prompt")
            if status != 200 or rendered is None:
                raise Refusal(400, "the model's chat template cannot render this prompt")
            return self._completion(before + rendered, keeps_context=True)

        messages = plain_messages(self._fields)
        return Question(
            "/apply-template", template_body(self._facts, messages, self._common.template_kwargs), then
        )

    def _completion(self, prompt: str, *, keeps_context: bool) -> Call:
        if self._facts.flavour == "openai":
            return self._call(OPENAI_COMPLETION_PATH, {"prompt": prompt}, text_piece, prompt)
        context_of = context_behind(self._facts, prompt) if keeps_context else None
        return self._call(COMPLETION_PATH, {"prompt": prompt}, native_piece, prompt, context_of)

    def _call(
        self,
        path: str,
        prompt_fields: Json,
        source: Source,
        prompt: str | None = None,
        context_of: ContextOf | None = None,
    ) -> Call:
        stream = self._fields.flag("stream") is not False
        thinks = prompt is not None and self._common.template_kwargs.get("enable_thinking") is True
        manner = Manner(
            line=generate_line,
            stream=stream,
            path=path,
            source=source,
            top_logprobs=self._common.top_logprobs,
            thoughts=Thoughts(prompt) if thinks and prompt is not None else None,
            context_of=context_of,
        )
        upstream = {
            "model": self._facts.upstream_id,
            "stream": True,
            **prompt_fields,
            **self._common.sampling,
            **self._extras(),
        }
        reader = GenerationReader(self._asked, manner)
        body = orjson.dumps(upstream)
        return Call(path=path, body=body, stream=stream, sse=True, reader=reader, unload=self._common.unload)

    def _extras(self) -> Json:
        extras: Json = {}
        if self._facts.flavour == "openai":
            extras["stream_options"] = {"include_usage": True}
            if self._common.schema is not None:
                extras["response_format"] = schema_format(self._common.schema)
            if self._common.top_logprobs is not None:
                extras["logprobs"] = self._common.top_logprobs
            return extras
        if self._common.schema is not None:
            extras["json_schema"] = self._common.schema
        if self._common.top_logprobs is not None:
            extras["n_probs"] = max(1, self._common.top_logprobs)
        return extras


def plain_messages(fields: Fields) -> list[Json]:
    """System and user, as a chat template wants them."""
    system: list[Json] = (
        [{"role": "system", "content": fields.text("system")}] if fields.text("system") else []
    )
    return [*system, {"role": "user", "content": fields.text("prompt")}]


def schema_format(schema: Json) -> Json:
    """`json_object` is not enforced by llama-server; a schema is."""
    return {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}


def template_body(facts: ModelFacts, messages: list[Json], template_kwargs: Json) -> bytes:
    kwargs = {"chat_template_kwargs": template_kwargs} if template_kwargs else {}
    return orjson.dumps({"model": facts.upstream_id, "messages": messages, **kwargs})


def context_behind(facts: ModelFacts, prompt: str) -> ContextOf:
    """The tokens of a prompt that is known and of what was said to it."""

    def context_of(said: str, keep: Callable[[list[object]], None]) -> Question[None]:
        def then(status: int, body: bytes) -> None:
            keep(_tokens_in(status, body))

        # without the mark at the beginning of a text: it would come twice in the next turn
        marks = {"add_special": False, "parse_special": True}
        asked = {"model": facts.upstream_id, "content": prompt + said, **marks}
        return Question("/tokenize", orjson.dumps(asked), then)

    return context_of


def context_of_chat(facts: ModelFacts, messages: list[Json], template_kwargs: Json) -> ContextOf:
    """The same when llama-server rendered the prompt itself: it is asked how."""

    def context_of(said: str, keep: Callable[[list[object]], None]) -> Question[None]:
        def then(status: int, body: bytes) -> Question[None] | None:
            prompt = _text_in(body, "prompt")
            if status != 200 or prompt is None:
                return None
            return context_behind(facts, prompt)(said, keep)

        return Question("/apply-template", template_body(facts, messages, template_kwargs), then)

    return context_of


def _tokens_in(status: int, body: bytes) -> list[object]:
    tokens = _parsed(body).get("tokens")
    return tokens if status == 200 and isinstance(tokens, list) else []


def _text_in(body: bytes, name: str) -> str | None:
    text = _parsed(body).get(name)
    return text if isinstance(text, str) else None


def _parsed(body: bytes) -> Json:
    try:
        return as_object(orjson.loads(body))
    except orjson.JSONDecodeError:
        return {}
