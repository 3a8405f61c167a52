"""What not every backend has: Anthropic's dialect, responses, rerank, transcriptions. For both fakes.

Words and shapes are recorded where there is a recording, and tried on a real llama.cpp where there is none.
"""

from __future__ import annotations

from typing import Any

import orjson

from herd_node.protocol.forms import FormError, read_form
from tests.fakes import anthropic_voice, responses_voice
from tests.fakes.anthropic_voice import AnthropicVoice, prompt_words, tool_of
from tests.fakes.model import FakeModel, Generation, Reply, Token, Usage, count_words, dumps, make_tokens
from tests.fakes.recordings import recording
from tests.fakes.responses_voice import OneAnswer, ResponsesVoice

MESSAGES, COUNT = anthropic_voice.PATH, anthropic_voice.COUNT_PATH
RESPONSES = responses_voice.PATH
RERANK = ("/v1/rerank", "/rerank")
TRANSCRIPTIONS = "/v1/audio/transcriptions"
OF_LLAMA = (MESSAGES, COUNT, RESPONSES, *RERANK, TRANSCRIPTIONS)
OF_OLLAMA = (MESSAGES, RESPONSES, TRANSCRIPTIONS)
#: Those that hold a slot.
WORKING = (MESSAGES, RESPONSES, *RERANK, TRANSCRIPTIONS)


def message(kind: str, name: str, model: FakeModel, asked: dict[str, Any], wanted: int) -> Generation:
    """`name` is what the answer calls the model."""
    tokens, finish = make_tokens(wanted, asked.get("max_tokens"))
    if "thinking" in model.capabilities:
        tokens = [Token("thought0000 ", thought=True), *tokens]
    tool = tool_of(asked, model)
    words = prompt_words(asked)
    voice = AnthropicVoice(kind, name, tool, words)
    usage = Usage(words, finish=finish)
    return Generation(model, voice, asked.get("stream") is True, [] if tool else tokens, usage)


def response(kind: str, name: str, model: FakeModel, asked: dict[str, Any], wanted: int) -> Generation:
    tokens, _ = make_tokens(wanted, asked.get("max_output_tokens"))
    usage = Usage(count_words([asked.get("instructions"), asked.get("input")]) + 10)
    return Generation(model, ResponsesVoice(kind, name), asked.get("stream") is True, tokens, usage)


def ranking(name: str, model: FakeModel, asked: dict[str, Any]) -> Generation:
    """The more words of the query a document holds, the better."""
    texts = [one["text"] if isinstance(one, dict) else one for one in asked["documents"]]
    words = set(str(asked["query"]).split())
    scores = [len(words & set(text.split())) / max(1, len(words)) for text in texts]
    rows = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
    rows.sort(key=lambda row: -row["relevance_score"])
    tokens = count_words(texts)
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"model": name, "object": "list", "usage": counts, "results": rows[: asked.get("top_n")]}
    return Generation(model, OneAnswer(dumps(answer)), False, [], Usage(tokens))


def transcription(model: FakeModel, content_type: str, body: bytes) -> Generation:
    """Says how many bytes it heard."""
    mark = body.find(b"\r\n\r\n", body.find(b"filename=")) + 4
    heard = body.find(b"\r\n--" + body[2 : body.find(b"\r\n")], mark) - mark
    answer = OneAnswer(dumps({"text": f"{heard} bytes"}), "application/json")
    assert read_form(content_type.encode(), body)
    return Generation(model, answer, False, [], Usage(1))


def form_fields(content_type: str, body: bytes) -> dict[str, str] | str:
    """The fields, or what is wrong with the form."""
    if not content_type.startswith("multipart/form-data"):
        said = orjson.loads(recording("ollama/v1-audio-text-model").body)
        return str(said["error"]["message"])
    try:
        form = read_form(content_type.encode(), body)
    except FormError as error:
        return f"failed to parse multipart form: {error}"
    return {name: field.value for name, field in form.fields.items()}


def rerank_is_off() -> Reply:
    off = recording("llamacpp/rerank-not-enabled")
    return Reply(off.status, off.headers["content-type"], off.body)
