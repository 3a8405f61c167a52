"""The fake's Ollama: lists, show, chat, generate, embed, the OpenAI paths, in recorded shapes and words."""

from __future__ import annotations

import base64
import struct
from datetime import UTC, datetime
from typing import Any

import orjson

from tests.fakes import endpoints
from tests.fakes.model import (
    JSON_UTF8,
    FakeModel,
    Generation,
    Refused,
    Reply,
    Token,
    Usage,
    answers_a_tool,
    count_words,
    dumps,
    make_tokens,
    sse,
    structured_tokens,
    vector,
)
from tests.fakes.ollama_store import BLOBS, MANAGED, Lines, Store
from tests.fakes.recordings import recording

VERSION = "0.99.0"
NO_EMBEDDINGS = "This server does not support embeddings. Start it with `--embeddings`"
RUNNER_DEFAULTS = {
    "num_batch": 512,
    "num_gpu": -1,
    "main_gpu": 0,
    "use_mmap": False,
    "num_thread": 0,
    "draft_num_predict": 4,
}
THINK_LEVELS = ("high", "medium", "low", "max")
GENERATING = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions")
EMBEDDING = ("/api/embed", "/api/embeddings", "/v1/embeddings")
_POST_ONLY = (*GENERATING, *EMBEDDING, "/api/show", *MANAGED)
_GET_ONLY = ("/", "/api/version", "/api/tags", "/api/ps", "/v1/models")
_UNKNOWN_PATH = Reply(404, "text/plain", b"404 page not found")
_WRONG_METHOD = Reply(405, "text/plain", b"405 method not allowed", (("Allow", "GET, HEAD"),))


def stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "123Z"


def canonical(name: str) -> str:
    short = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return short if ":" in short.rpartition("/")[2] else f"{short}:latest"


def refuse(path: str, status: int, message: str, *, early: bool = False) -> Refused:
    """`early`: before the OpenAI layer of /v1 has begun; only the head and the newline differ."""
    if path == endpoints.MESSAGES:
        return Refused(_anthropic_error(status, message, JSON_UTF8 if early else "application/json"))
    if not path.startswith("/v1"):
        return Refused(Reply(status, JSON_UTF8, dumps({"error": message})))
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
    error = {"message": message, "type": kind, "param": None, "code": None}
    content_type = JSON_UTF8 if early else "application/json"
    return Refused(Reply(status, content_type, dumps({"error": error}, newline=not early)))


def _anthropic_error(status: int, message: str, content_type: str) -> Reply:
    kinds = {400: "invalid_request_error", 404: "not_found_error", 503: "overloaded_error"}
    error = {"type": kinds.get(status, "api_error"), "message": message}
    body = {"type": "error", "error": error, "request_id": "req_977189a1d7923e5431b694fd"}
    return Reply(status, content_type, dumps(body))


class NdjsonVoice:
    """/api/chat and /api/generate."""

    stream_headers = (("Content-Type", "application/x-ndjson"),)
    whole_type = JSON_UTF8

    def __init__(self, model: str, *, chat: bool) -> None:
        self._model = model
        self._chat = chat
        self._calls: list[dict[str, Any]] = []

    def opening(self) -> bytes:
        return b""

    def call_tool(self, name: str) -> None:
        function = {"index": 0, "name": name, "arguments": {"city": "Oslo"}}
        self._calls = [{"id": "call_fake0001", "function": function}]

    def token(self, token: Token) -> bytes:
        text, thinking = ("", token.text) if token.thought else (token.text, "")
        return self._line(text, thinking, [], {"done": False})

    def last(self, usage: Usage) -> list[bytes]:
        calls = [self._line("", "", self._calls, {"done": False})] if self._calls else []
        return [*calls, self._line("", "", [], self._ending(usage))]

    def whole(self, tokens: list[Token], usage: Usage) -> bytes:
        text = "".join(token.text for token in tokens if not token.thought)
        thinking = "".join(token.text for token in tokens if token.thought)
        return self._line(text, thinking, self._calls, self._ending(usage)).rstrip(b"\n")

    def error(self, message: str) -> bytes:
        return dumps({"error": message}, newline=True)

    def malformed(self) -> bytes:
        return b'{"model":"broken\n'

    def _line(self, text: str, thinking: str, calls: list[dict[str, Any]], rest: dict[str, Any]) -> bytes:
        extra: dict[str, Any] = {"thinking": thinking} if thinking else {}
        if self._chat:
            extra |= {"tool_calls": calls} if calls else {}
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, **extra}}
        else:
            said = {"response": text, **extra}
        return dumps({"model": self._model, "created_at": stamp(), **said, **rest}, newline=True)

    def _ending(self, usage: Usage) -> dict[str, Any]:
        context = {} if self._chat or usage.hidden else {"context": [1, 2, 3]}
        counters = {
            "total_duration": int(usage.total_s * 1e9),
            "load_duration": int(usage.load_s * 1e9) + 1000,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": int(usage.prompt_s * 1e9),
            "eval_count": usage.completion_tokens,
            "eval_duration": int(usage.decode_s * 1e9),
        }
        shown = {} if usage.hidden else {name: value for name, value in counters.items() if value}
        return {"done": True, "done_reason": usage.finish, **context, **shown}


class OpenAIVoice:
    """/v1/chat/completions and /v1/completions of Ollama."""

    stream_headers = (("Content-Type", "text/event-stream"),)
    whole_type = "application/json"

    def __init__(self, model: str, *, chat: bool, include_usage: bool) -> None:
        self._model = model
        self._chat = chat
        self._include_usage = include_usage
        self._first = True
        self._calls: list[dict[str, Any]] = []

    def opening(self) -> bytes:
        return b""

    def call_tool(self, name: str) -> None:
        function = {"name": name, "arguments": '{"city":"Oslo"}'}
        self._calls = [{"id": "call_fake0001", "index": 0, "type": "function", "function": function}]

    def token(self, token: Token) -> bytes:
        role = {"role": "assistant"} if self._first else {}
        self._first = False
        if not self._chat:
            return self._chunk([{"text": token.text, "index": 0, "finish_reason": None}])
        said = {"content": "", "reasoning": token.text} if token.thought else {"content": token.text}
        return self._chunk([{"index": 0, "delta": {**role, **said}, "finish_reason": None}])

    def last(self, usage: Usage) -> list[bytes]:
        content: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        called = []
        if self._calls:
            said = {"role": "assistant", "content": "", "tool_calls": self._calls}
            called = [self._chunk([{"index": 0, "delta": said, "finish_reason": None}])]
        records = self._chunk([{"index": 0, **content, "finish_reason": self._finish(usage)}])
        if self._include_usage and not usage.hidden:
            records += self._chunk([], usage)
        return [*called, records + b"data: [DONE]\n\n"]

    def whole(self, tokens: list[Token], usage: Usage) -> bytes:
        text = "".join(token.text for token in tokens if not token.thought)
        said: dict[str, Any] = {"text": text}
        if self._chat:
            calls = {"tool_calls": self._calls} if self._calls else {}
            said = {"message": {"role": "assistant", "content": text, **calls}}
        choice = {"index": 0, **said, "finish_reason": self._finish(usage)}
        answer = self._base("chat.completion" if self._chat else "text_completion", [choice])
        return dumps(answer if usage.hidden else {**answer, "usage": _usage(usage)}, newline=True)

    def error(self, message: str) -> bytes:
        """Ollama loses errors in the middle: one empty chunk, and neither finish nor [DONE]."""
        self._model = ""
        return self._chunk(
            [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
        )

    def malformed(self) -> bytes:
        return b'data: {"id":"broken\n\n'

    def _finish(self, usage: Usage) -> str:
        return "tool_calls" if self._calls else usage.finish

    def _base(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": "chatcmpl-149" if self._chat else "cmpl-134",
            "object": kind,
            "created": int(datetime.now(UTC).timestamp()),
            "model": self._model,
            "system_fingerprint": "fp_ollama",
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        base = self._base("chat.completion.chunk" if self._chat else "text_completion", choices)
        return sse(base if usage is None else {**base, "usage": _usage(usage)})


def _usage(usage: Usage) -> dict[str, int]:
    total = usage.prompt_tokens + usage.completion_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
    }


class OllamaDialect:
    kind = "ollama"
    head_early = False  # no byte before the first token
    stops_when_left = True  # also when not streaming
    closes_after_stream = False
    idle_s = None

    def __init__(self, models: list[FakeModel], tokens: int) -> None:
        self.models = models
        self.tokens = tokens
        self.lacks: frozenset[str] = frozenset()
        """Paths of `endpoints` that an older version does not have."""
        self.content_type = ""
        """Of the request in work: a form cannot be read without it."""
        self.store = Store(models)

    def headers(self, content_type: str) -> list[tuple[str, str]]:
        date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        return [("Content-Type", content_type), ("Date", date)]

    def admit(self, method: str, path: str, headers: dict[str, str]) -> Reply | None:
        self.content_type = headers.get("content-type", "")
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        plain = host.strip("[]").replace(".", "").replace(":", "")
        if not (plain.isdigit() or host.endswith(("localhost", ".local", ".internal", "]")) or not host):
            return Reply(403, "", b"")
        origin = headers.get("origin", "http://localhost")
        if not origin.startswith(("http://localhost", "http://127.0.0.1", "https://localhost", "app://")):
            return Reply(403, "", b"")
        return None

    def get(self, method: str, path: str) -> Reply:
        if method == "HEAD" and path.startswith(BLOBS):
            return self.store.head_blob(path.removeprefix(BLOBS))
        if path in _POST_ONLY:
            return _WRONG_METHOD._replace(headers=(("Allow", "POST"),))
        if path == "/":
            return Reply(200, "text/plain; charset=utf-8", b"Ollama is running")
        if path == "/api/version":
            return Reply(200, JSON_UTF8, dumps({"version": VERSION}))
        if path == "/api/tags":
            return Reply(200, JSON_UTF8, dumps({"models": [self._tag(model) for model in self.models]}))
        if path == "/api/ps":
            loaded = [self._ps(model) for model in self.models if model.loaded]
            return Reply(200, JSON_UTF8, dumps({"models": loaded}))
        if path == "/v1/models":
            data = [_openai_model(model) for model in self.models] or None
            return Reply(200, "application/json", dumps({"object": "list", "data": data}, newline=True))
        return _UNKNOWN_PATH

    def delete(self, path: str, body: bytes) -> Reply:
        if path != "/api/delete":
            return _WRONG_METHOD if path in (*_GET_ONLY, *_POST_ONLY) else _UNKNOWN_PATH
        return self.store.delete(body)

    def post(self, path: str, body: bytes) -> Reply | Generation | Lines:
        if path.startswith(BLOBS):
            return self.store.post_blob(path.removeprefix(BLOBS), body)
        if path in endpoints.OF_OLLAMA and path not in self.lacks:
            return self._endpoint(path, body)
        if path not in _POST_ONLY:
            return _WRONG_METHOD if path in _GET_ONLY else _UNKNOWN_PATH
        asked = _parse(path, body)
        if path in MANAGED:
            return self.store.manage(path, asked)
        if path == "/api/show":
            return self._show(asked)
        model = self._find(path, asked)
        if path in EMBEDDING:
            return self._embed(path, asked, model)
        if path.startswith("/v1"):
            return self._openai(path, asked, model)
        return self._generate(path, asked, model)

    def _endpoint(self, path: str, body: bytes) -> Reply | Generation:
        """Those that not every backend has."""
        if path == endpoints.TRANSCRIPTIONS:
            fields = endpoints.form_fields(self.content_type, body)
            if isinstance(fields, str):
                raise refuse(path, 400, fields, early=True)
            return endpoints.transcription(self._find(path, fields), self.content_type, body)
        asked = _parse(path, body)
        model = self._find(path, asked)
        if path == endpoints.RESPONSES:
            return endpoints.response("ollama", asked["model"], model, asked, self.tokens)
        if not isinstance(asked.get("max_tokens"), int) or asked["max_tokens"] < 1:
            raise refuse(path, 400, "max_tokens is required and must be positive", early=True)
        if not asked.get("messages"):
            raise refuse(path, 400, "messages is required")
        if asked.get("tools") and "tools" not in model.capabilities:
            name = canonical(asked["model"])
            raise refuse(path, 400, f"registry.ollama.ai/library/{name} does not support tools")
        return endpoints.message("ollama", asked["model"], model, asked, self.tokens)

    def wrong_type(self, path: str) -> Reply:
        return refuse(path, 400, "json: cannot unmarshal string into Go struct field of type int").reply

    def missing(self, path: str) -> Reply:
        return refuse(path, 404, "model 'gone' not found").reply

    def queue_full(self, path: str) -> Reply:
        text = "server busy, please try again.  maximum pending requests exceeded"
        return refuse(path, 503, text).reply

    def error(self, path: str, message: str) -> Reply:
        return refuse(path, 500, message).reply

    # ---- lists

    def _details(self) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": "gguf",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": "134.52M",
            "quantization_level": "F16",
        }

    def _tag(self, model: FakeModel) -> dict[str, Any]:
        sizes = {"context_length": model.context_train_tokens, "embedding_length": model.embedding_length}
        return {
            "name": model.name,
            "model": model.name,
            "modified_at": "2026-11-23T03:03:14.450113255Z",
            "size": model.size_bytes,
            "digest": model.digest,
            "details": {**self._details(), **sizes},
            "capabilities": list(model.capabilities),
        }

    def _ps(self, model: FakeModel) -> dict[str, Any]:
        return {
            "name": model.name,
            "model": model.name,
            "size": 0,
            "digest": model.digest,
            "details": self._details(),
            "expires_at": "2319-01-01T00:00:00.123456789Z",
            "size_vram": 0,
            "context_length": model.loaded_context,
        }

    def _show(self, asked: dict[str, Any]) -> Reply:
        name = asked.get("model") or asked.get("name")
        if not name:
            raise refuse("/api/show", 400, "model is required")
        model = self._by_name(str(name))
        if model is None:
            raise refuse("/api/show", 404, f"model '{canonical(str(name))}' not found")
        shown = orjson.loads(recording("ollama/show").body)
        was = "b18569bab4327d6f48e8619aedb5d6150ff69b16f0f923f10b79427307a16072"
        shown["modelfile"] = (
            shown["modelfile"].replace(was, model.weights).replace("smollm2:135m", model.name)
        )
        shown["model_info"]["llama.context_length"] = model.context_train_tokens
        shown["capabilities"] = list(model.capabilities)
        return Reply(200, JSON_UTF8, dumps(shown))

    # ---- inference

    def _by_name(self, name: str) -> FakeModel | None:
        wanted = canonical(name)
        return next((model for model in self.models if canonical(model.name) == wanted), None)

    def _find(self, path: str, asked: dict[str, Any]) -> FakeModel:
        name = asked.get("model") or ""
        if not name and path not in ("/api/generate", "/api/embed"):
            raise refuse(path, 400, "model is required")
        model = self._by_name(name) if name else None
        if model is None and path in ("/api/embed", "/api/embeddings") and name:
            raise refuse(path, 404, f'model "{name}" not found, try pulling it first')
        if model is None:
            raise refuse(path, 404, f"model '{name}' not found")
        return model

    def _embed(self, path: str, asked: dict[str, Any], model: FakeModel) -> Reply | Generation:
        if "embedding" not in model.capabilities:
            raise refuse(path, 500 if path == "/api/embeddings" else 501, NO_EMBEDDINGS)
        given = asked.get("prompt" if path == "/api/embeddings" else "input")
        texts = given if isinstance(given, list) else [given] if given else []
        if not all(isinstance(text, str) for text in texts):
            raise refuse(path, 400, "invalid input type")
        if path == "/api/embed" and not texts:
            return Reply(200, JSON_UTF8, dumps({"model": asked["model"], "embeddings": []}))
        voice = EmbeddingVoice(path, asked, texts, model.embedding_length)
        return Generation(model, voice, False, [], Usage(count_words(texts)), *_load_options(asked))

    def _generate(self, path: str, asked: dict[str, Any], model: FakeModel) -> Reply | Generation:
        chat = path == "/api/chat"
        if "completion" not in model.capabilities:
            word = "chat" if chat else "generate"
            raise refuse(path, 400, f'"{asked["model"]}" does not support {word}')
        _check(path, asked, model)
        voice = NdjsonVoice(asked["model"], chat=chat)
        if not asked.get("messages" if chat else "prompt"):
            return self._preload(asked, model, voice)
        options = asked.get("options") or {}
        tokens, finish = make_tokens(self.tokens, options.get("num_predict"))
        if asked.get("format"):
            tokens, finish = structured_tokens(asked["format"], options.get("num_predict"))
        if "thinking" in model.capabilities and asked.get("think") is not False:
            tokens = [Token("thought0000 ", thought=True), *tokens]
        if asked.get("tools") and not answers_a_tool(asked.get("messages")):
            voice.call_tool(asked["tools"][0]["function"]["name"])
            tokens, finish = [], "stop"
        usage = Usage(count_words(asked.get("messages") or asked.get("prompt")) + 10, finish=finish)
        stream = asked.get("stream") is not False
        return Generation(model, voice, stream, tokens, usage, *_load_options(asked))

    def _preload(self, asked: dict[str, Any], model: FakeModel, voice: NdjsonVoice) -> Reply | Generation:
        if asked.get("keep_alive") == 0:
            model.loaded = False
            return Reply(200, JSON_UTF8, voice.whole([], Usage(0, finish="unload", hidden=True)))
        usage = Usage(0, finish="load", hidden=True)
        return Generation(model, voice, False, [], usage, *_load_options(asked))

    def _openai(self, path: str, asked: dict[str, Any], model: FakeModel) -> Generation:
        include = bool((asked.get("stream_options") or {}).get("include_usage"))
        voice = OpenAIVoice(asked["model"], chat=path.startswith("/v1/chat"), include_usage=include)
        tokens, finish = make_tokens(self.tokens, asked.get("max_tokens"))
        wanted = asked.get("response_format") or {}
        if wanted.get("type") in ("json_object", "json_schema"):
            schema = (wanted.get("json_schema") or {}).get("schema")
            tokens, finish = structured_tokens(schema, asked.get("max_tokens"))
        calls = asked.get("tools") and "tools" in model.capabilities
        if calls and not answers_a_tool(asked.get("messages")):
            voice.call_tool(asked["tools"][0]["function"]["name"])
            tokens, finish = [], "stop"
        usage = Usage(count_words(asked.get("messages") or asked.get("prompt")) + 10, finish=finish)
        return Generation(model, voice, asked.get("stream") is True, tokens, usage)


class EmbeddingVoice:
    stream_headers = ()
    whole_type = JSON_UTF8

    def __init__(self, path: str, asked: dict[str, Any], texts: list[str], length: int) -> None:
        self._path = path
        self._model = asked["model"]
        self._encoding = asked.get("encoding_format")
        self._vectors = [vector(text, asked.get("dimensions") or length) for text in texts]
        self.whole_type = "application/json" if path.startswith("/v1") else JSON_UTF8

    def whole(self, tokens: list[Token], usage: Usage) -> bytes:
        if self._path == "/api/embeddings":
            return dumps({"embedding": self._vectors[0] if self._vectors else []})
        if self._path == "/api/embed":
            times = {"total_duration": int(usage.total_s * 1e9) + 1, "load_duration": 1000}
            counted = {**times, "prompt_eval_count": usage.prompt_tokens}
            return dumps(
                {"model": self._model, "embeddings": self._vectors, **({} if usage.hidden else counted)}
            )
        packed = self._encoding == "base64"
        data = [
            {"object": "embedding", "embedding": _packed(one) if packed else one, "index": index}
            for index, one in enumerate(self._vectors)
        ]
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        return dumps({"object": "list", "data": data, "model": self._model, "usage": counts}, newline=True)

    def opening(self) -> bytes:
        return b""

    def token(self, token: Token) -> bytes:
        return b""

    def last(self, usage: Usage) -> list[bytes]:
        return []

    def error(self, message: str) -> bytes:
        return b""

    def malformed(self) -> bytes:
        return b""


def _packed(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _parse(path: str, body: bytes) -> dict[str, Any]:
    go_type = {"/api/chat": "ChatRequest", "/api/generate": "GenerateRequest"}.get(path, "Request")
    if not body:
        raise refuse(path, 400, "missing request body", early=True)
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise refuse(path, 400, "unexpected EOF", early=True) from None
    if not isinstance(asked, dict):
        raise refuse(path, 400, f"json: cannot unmarshal array into Go value of type api.{go_type}")
    messages = asked.get("messages", [])
    if not isinstance(messages, list | None):
        where = "Go struct field ChatRequest.messages of type []api.Message"
        raise refuse(path, 400, f"json: cannot unmarshal string into {where}")
    return asked


def _check(path: str, asked: dict[str, Any], model: FakeModel) -> None:
    think = asked.get("think")
    if isinstance(think, str) and think not in THINK_LEVELS:
        levels = '"high", "medium", "low", "max", true, or false'
        raise refuse(path, 400, f'invalid think value: "{think}" (must be {levels})')
    if think and "thinking" not in model.capabilities:
        raise refuse(path, 400, f'"{asked["model"]}" does not support thinking')
    if asked.get("tools") and "tools" not in model.capabilities:
        raise refuse(
            path, 400, f"registry.ollama.ai/library/{canonical(asked['model'])} does not support tools"
        )
    for name in ("num_ctx", "num_predict", "seed", "top_k"):
        value = (asked.get("options") or {}).get(name)
        if value is not None and not isinstance(value, int | float):
            raise refuse(path, 500, f'option "{name}" must be of type integer')
    if isinstance(asked.get("format"), str) and asked["format"] not in ("", "json"):
        quoted = dumps(dumps(asked["format"]).decode()).decode()
        raise refuse(path, 500, f'invalid format: {quoted}; expected "json" or a valid JSON Schema object')


def _load_options(asked: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """num_ctx, and what else of the runner is not as it would be by itself."""
    options = asked.get("options") or {}
    others = {name: options[name] for name in RUNNER_DEFAULTS if options.get(name) is not None}
    return options.get("num_ctx"), {n: value for n, value in others.items() if value != RUNNER_DEFAULTS[n]}


def _openai_model(model: FakeModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 1795402994, "owned_by": "library"}
