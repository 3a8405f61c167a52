"""What OpenAI's dialect offers beside text: rerank, images, transcriptions. Their answers never stream.

Only the head of a request is read; what a backend makes of the rest is its own business.
"""

from __future__ import annotations

from typing import Any

from herd.dialects import base, openai
from herd.dialects.base import Asides, Ending, Parsed, Prompt
from herd.errors import BadRequest
from herd_node.protocol import forms, names
from herd_node.protocol.routes import Route


def parse(route: Route, body: bytes) -> Parsed:
    """Read the head of a JSON request. Raises BadRequest with one sentence."""
    head = base.read_object(body)
    value = head.value
    asked = base.model_names(value, "model", openai.missing_model)
    base.refuse_twins(head, "model")
    base.optional(value, "stream", bool, "a boolean")
    prompt = Prompt(cut=head.cut)
    _READERS[route.kind](value, prompt)
    return _parsed(route, asked, prompt, base.asides(value))


def parse_form(route: Route, content_type: bytes, body: forms.Body) -> tuple[Parsed, tuple[int, int]]:
    """The same of a multipart form, and where the model's name stands. Raises BadRequest."""
    try:
        form = forms.read_form(content_type, body)
    except forms.FormError as error:
        raise BadRequest(str(error)) from error
    field = form.fields.get("model")
    if field is None or not field.value:
        raise openai.missing_model()
    if not names.is_model_name(field.value):
        raise BadRequest("invalid model name")
    if "file" not in form.files:
        raise BadRequest("'file' is required")
    return _parsed(route, (field.value,), Prompt(), Asides()), (field.start, field.end)


def _parsed(route: Route, asked: tuple[str, ...], prompt: Prompt, asides: Asides) -> Parsed:
    return Parsed(
        asked=asked,
        stream=False,
        est_tokens=prompt.tokens,
        max_tokens=1 if route.kind == "rerank" else None,
        wanted_context_tokens=None,
        needs=route.needs,
        prefixes=(),
        buffered=False,
        user=asides.user,
        tags=asides.tags,
        model_key="model",
        fallback=asides.fallback,
    )


def _read_rerank(value: dict[str, Any], prompt: Prompt) -> None:
    """Each document is read beside the query; they never make one prompt."""
    query = base.optional(value, "query", str, "a string")
    if query is None:
        raise BadRequest("'query' is required")
    documents = base.optional(value, "documents", list, "a list")
    if not documents:
        raise BadRequest("'documents' is required and must hold at least one document")
    for document in documents:
        text = document.get("text") if isinstance(document, dict) else document
        if not isinstance(text, str):
            raise BadRequest("'documents' must be a list of strings or of objects with a 'text'")
        prompt.text(query)
        prompt.text(text)
    top_n = base.optional(value, "top_n", int, "a whole number")
    if top_n is not None and top_n < 0:
        raise BadRequest("'top_n' must not be negative")


def _read_image(value: dict[str, Any], prompt: Prompt) -> None:
    text = base.optional(value, "prompt", str, "a string")
    if not text:
        raise BadRequest("'prompt' is required")
    prompt.text(text)
    base.optional(value, "n", int, "a whole number")
    base.optional(value, "size", str, "a string")


_READERS = {"rerank": _read_rerank, "image": _read_image}


def whole(route: Route, body: bytes) -> Ending:
    """How an answer ended. A transcription may be plain text, subtitles or events."""
    value = base.read_record(body)
    if value is None:
        if route.kind == "transcription" and body:
            return Ending("complete")
        return Ending("truncated", message="the node's answer is not a JSON object")
    if value.get("error"):
        return Ending("error", message=base.error_text(body))
    if route.kind == "transcription":
        said = isinstance(value.get("text"), str)
        return Ending("complete" if said else "truncated", message=None if said else "the answer has no text")
    listed = value.get("results" if route.kind == "rerank" else "data")
    if not isinstance(listed, list):
        return Ending("truncated", message="the node's answer has no list of results")
    usage = base.mapping(value.get("usage"))
    return Ending("complete", prompt_tokens=base.count(usage.get("prompt_tokens")))


SERVICES = openai.OPENAI._replace(parse=parse, whole=whole)
