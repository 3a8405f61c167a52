"""The fake's llama-server (one model, single mode): health, props, slots, lists and the OpenAI paths."""

from __future__ import annotations

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
    count_words,
    dumps,
    make_tokens,
    sse,
    vector,
)
from tests.fakes.recordings import recording

GENERATING = ("/v1/chat/completions", "/v1/completions", "/completion", "/infill")
EMBEDDING = ("/v1/embeddings",)
_PUBLIC = ("/health", "/v1/health")  # in older builds the model list too
_COMMON = [("Server", "llama.cpp"), ("Access-Control-Allow-Origin", "")]
_FINGERPRINT = "b1-7e4c0a9"
_PHYSICAL_BATCH_TOKENS = 512


def handler_error(status: int, message: str, kind: str, **extra: object) -> Reply:
    return Reply(
        status, JSON_UTF8, dumps({"error": {"code": status, "message": message, "type": kind, **extra}})
    )


def middleware_error(status: int, message: str, kind: str) -> Reply:
    return Reply(status, JSON_UTF8, dumps({"error": {"message": message, "type": kind, "code": status}}))


NOT_FOUND = middleware_error(404, "File Not Found", "not_found_error")
LOADING = middleware_error(503, "Loading model", "unavailable_error")


class OpenAIVoice:
    stream_headers = (("X-Accel-Buffering", "no"), ("Content-Type", "text/event-stream"))
    whole_type = JSON_UTF8

    def __init__(
        self, model: str, *, chat: bool, include_usage: bool, tool: str | None, top_logprobs: int | None
    ) -> None:
        self._model = model
        self._chat = chat
        self._include_usage = include_usage
        self._tool = tool
        self._top_logprobs = top_logprobs

    def opening(self) -> bytes:
        return self._delta({"role": "assistant", "content": None}) if self._chat else b""

    def token(self, token: Token) -> bytes:
        logprobs = self._logprobs([token])
        if self._chat:
            said = {"reasoning_content" if token.thought else "content": token.text}
            return self._delta(said, **({} if logprobs is None else {"logprobs": logprobs}))
        return self._chunk([{"text": token.text, "index": 0, "logprobs": logprobs, "finish_reason": None}])

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self._top_logprobs is None or not tokens:
            return None
        return {"content": [logprob_of(token, self._top_logprobs) for token in tokens]}

    def last(self, usage: Usage) -> list[bytes]:
        records = self._tool_pieces() if self._tool else []
        timings = {} if usage.hidden else {"timings": _timings(usage)}
        counts = {} if usage.hidden else {"usage": _usage(usage)}
        finish = "tool_calls" if self._tool else usage.finish
        if not self._chat:
            final = [{"text": "", "index": 0, "logprobs": None, "finish_reason": finish}]
            return [self._chunk(final, **counts, **timings), b"data: [DONE]\n\n"]
        final = [{"finish_reason": finish, "index": 0, "delta": {}}]
        if self._include_usage:
            records.append(self._chunk(final) + self._chunk([], **counts, **timings))
        else:
            records.append(self._chunk(final, **timings))
        return [*records, b"data: [DONE]\n\n"]

    def whole(self, tokens: list[Token], usage: Usage) -> bytes:
        text = "".join(token.text for token in tokens if not token.thought)
        logprobs = self._logprobs(tokens)
        said: dict[str, Any] = {
            "text": text,
            "index": 0,
            "logprobs": logprobs,
            "finish_reason": usage.finish,
        }
        if self._chat:
            thought = "".join(token.text for token in tokens if token.thought)
            reasoning = {"reasoning_content": thought} if thought else {}
            message: dict[str, Any] = {"role": "assistant", "content": text, **reasoning}
            if self._tool:
                function = {"name": self._tool, "arguments": '{"city":"Oslo"}'}
                message["tool_calls"] = [{"type": "function", "function": function, "id": "fakecall"}]
            finish = "tool_calls" if self._tool else usage.finish
            said = {"finish_reason": finish, "index": 0, "message": message}
            said |= {} if logprobs is None else {"logprobs": logprobs}
        answer = {
            "choices": [said],
            "created": int(datetime.now(UTC).timestamp()),
            "model": self._model,
            "system_fingerprint": _FINGERPRINT,
            "object": "chat.completion" if self._chat else "text_completion",
        }
        counts = {} if usage.hidden else {"usage": _usage(usage)}
        timings = {} if usage.hidden else {"timings": _timings(usage)}
        return dumps({**answer, **counts, "id": self._id(), **timings})

    def error(self, message: str) -> bytes:
        return sse({"error": {"code": 500, "message": message, "type": "server_error"}})

    def malformed(self) -> bytes:
        return b'data: {"choices":[{"finish_reason":null,\n\n'

    def _tool_pieces(self) -> list[bytes]:
        head = {"index": 0, "id": "fakecall", "type": "function"}
        return [
            self._delta({"tool_calls": [{**head, "function": {"name": self._tool, "arguments": ""}}]}),
            self._delta({"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]}),
            self._delta({"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]}),
        ]

    def _id(self) -> str:
        return "chatcmpl-IzFrZiRmSI9Cj1KzC19u9U6F5LBpTj0w"

    def _delta(self, delta: dict[str, Any], **more: object) -> bytes:
        return self._chunk([{"finish_reason": None, "index": 0, "delta": delta, **more}])

    def _chunk(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, **timings: object
    ) -> bytes:
        created = {"choices": choices, "created": int(datetime.now(UTC).timestamp())}
        about = {"model": self._model, "system_fingerprint": _FINGERPRINT}
        counts = {} if usage is None else {"usage": usage}
        if self._chat:
            named = {"id": self._id(), **about, "object": "chat.completion.chunk", **counts}
        else:
            named = {**about, "object": "text_completion", **counts, "id": self._id()}
        return sse({**created, **named, **timings})


class NativeVoice:
    """/completion and /infill."""

    stream_headers = OpenAIVoice.stream_headers
    whole_type = JSON_UTF8

    def __init__(self, model: str, *, n_probs: int) -> None:
        self._model = model
        self._n_probs = n_probs
        self._said = 0

    def opening(self) -> bytes:
        return b""

    def token(self, token: Token) -> bytes:
        self._said += 1
        event = {"index": 0, "content": token.text, "tokens": [self._said], "stop": False, "id_slot": -1}
        counts = {"tokens_predicted": self._said, "tokens_evaluated": 0}
        logprobs = [logprob_of(token, self._n_probs)] if self._n_probs else []
        return sse(event | counts | ({"completion_probabilities": logprobs} if logprobs else {}))

    def last(self, usage: Usage) -> list[bytes]:
        return [sse(self._final("", [], usage))]

    def whole(self, tokens: list[Token], usage: Usage) -> bytes:
        return dumps(self._final("".join(token.text for token in tokens), tokens, usage))

    def error(self, message: str) -> bytes:
        return sse({"error": {"code": 500, "message": message, "type": "server_error"}})

    def malformed(self) -> bytes:
        return b'data: {"index":0,"content":\n\n'

    def _final(self, text: str, tokens: list[Token], usage: Usage) -> dict[str, Any]:
        about = {"index": 0, "content": text, "tokens": [], "id_slot": 0, "stop": True, "model": self._model}
        counts = {"tokens_predicted": usage.completion_tokens, "tokens_evaluated": usage.prompt_tokens}
        ends = {"stop_type": "limit" if usage.finish == "length" else "eos", "stopping_word": ""}
        logprobs = [logprob_of(token, self._n_probs) for token in tokens if self._n_probs]
        return {
            **about,
            **counts,
            **ends,
            **({"completion_probabilities": logprobs} if logprobs else {}),
            **({} if usage.hidden else {"timings": _timings(usage)}),
        }


def logprob_of(token: Token, top: int) -> dict[str, Any]:
    said = {"id": 1, "token": token.text, "bytes": list(token.text.encode()), "logprob": -0.5}
    return said | {"top_logprobs": [said] * top}


class EmbeddingVoice:
    stream_headers = ()
    whole_type = JSON_UTF8

    def __init__(self, model: str, texts: list[str], length: int) -> None:
        self._model = model
        self._vectors = [vector(text, length) for text in texts]

    def whole(self, tokens: list[Token], usage: Usage) -> bytes:
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        data = [
            {"embedding": embedding, "index": index, "object": "embedding"}
            for index, embedding in enumerate(self._vectors)
        ]
        return dumps({"model": self._model, "object": "list", "usage": counts, "data": data})

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


class LlamaDialect:
    kind = "llama-server"
    head_early = True  # the head comes when a slot takes the request
    stops_when_left = False  # a client that leaves without streaming does not stop the work
    closes_after_stream = True  # although it announces keep-alive
    idle_s = 5.0

    def __init__(
        self, model: FakeModel, tokens: int, slots: int, api_key: str | None, *, embeddings: bool
    ) -> None:
        self.models = [model]
        self.tokens = tokens
        self.slots = slots
        self.api_key = api_key
        self.embeddings = embeddings
        self.loading = False
        self.busy = 0
        self.lacks: frozenset[str] = frozenset()
        """Paths of `endpoints` that an older build does not have."""

    def headers(self, content_type: str) -> list[tuple[str, str]]:
        kept = [("Keep-Alive", "timeout=5, max=100")]
        return [*_COMMON, *([("Content-Type", content_type)] if content_type else []), *kept]

    def admit(self, method: str, path: str, headers: dict[str, str]) -> Reply | None:
        if self.api_key is not None and path not in _PUBLIC:
            bearer = headers.get("authorization", "").removeprefix("Bearer ")
            if self.api_key not in (bearer, headers.get("x-api-key")):
                return middleware_error(401, "Invalid API Key", "authentication_error")
        if self.loading:
            return LOADING
        if headers.get("content-encoding") == "zstd":
            return Reply(415, "", b"")
        return None

    def get(self, method: str, path: str) -> Reply:
        model = self.models[0]
        if path in ("/health", "/v1/health"):
            return Reply(200, JSON_UTF8, dumps({"status": "ok"}))
        if path in ("/v1/models", "/models"):
            return Reply(200, JSON_UTF8, dumps(self._models(model)))
        if path == "/props":
            return Reply(200, JSON_UTF8, dumps(self._props(model)))
        if path == "/slots":
            slots = [
                {
                    "id": n,
                    "n_ctx": model.context_tokens,
                    "speculative": False,
                    "is_processing": n < self.busy,
                }
                for n in range(self.slots)
            ]
            return Reply(200, JSON_UTF8, dumps(slots))
        if path == "/":
            return Reply(415, "text/plain", b"")
        return NOT_FOUND

    def post(self, path: str, body: bytes) -> Reply | Generation:
        if path in endpoints.OF_LLAMA and path not in self.lacks:
            return self._endpoint(path, body)
        if path in HELPERS:
            return HELPERS[path](_parse(body))
        if path not in (*GENERATING, *EMBEDDING):
            return NOT_FOUND
        asked = _parse(body)
        if path in EMBEDDING:
            return self._embed(asked)
        model = self.models[0]
        if path in ("/completion", "/infill"):
            return self._native(path, asked)
        chat = path == "/v1/chat/completions"
        given = _messages(asked, model) if chat else asked.get("prompt")
        prompt_tokens = count_words(given) + 10
        if prompt_tokens > model.context_tokens:
            raise Refused(_context_exceeded(prompt_tokens, model.context_tokens))
        tokens, finish = make_tokens(self.tokens, _limit(asked))
        thinks = (asked.get("chat_template_kwargs") or {}).get("enable_thinking") is not False
        if chat and "thinking" in model.capabilities and thinks:
            tokens = [Token("thought0000 ", thought=True), *tokens]
        tool = None
        if asked.get("tools") and "tools" in model.capabilities:
            tool, tokens = asked["tools"][0]["function"]["name"], []
        include = bool((asked.get("stream_options") or {}).get("include_usage"))
        wanted = asked.get("logprobs")
        top = int(asked.get("top_logprobs") or (0 if wanted is True else wanted)) if wanted else None
        voice = OpenAIVoice(model.name, chat=chat, include_usage=include, tool=tool, top_logprobs=top)
        return Generation(
            model, voice, asked.get("stream") is True, tokens, Usage(prompt_tokens, finish=finish)
        )

    def wrong_type(self, path: str) -> Reply:
        return Reply(400, JSON_UTF8, recording("llamacpp/err-bad-type").body)

    def _native(self, path: str, asked: dict[str, Any]) -> Generation:
        model = self.models[0]
        if path == "/infill" and "insert" not in model.capabilities:
            raise Refused(Reply(501, JSON_UTF8, recording("llamacpp/infill-no-fim").body))
        given = [asked.get(name) for name in ("prompt", "input_prefix", "input_suffix")]
        tokens, finish = make_tokens(self.tokens, _limit(asked))
        if "thinking" in model.capabilities:
            tokens = [Token("<think>\n"), Token("thought0000\n"), Token("</think>\n\n"), *tokens]
        voice = NativeVoice(model.name, n_probs=int(asked.get("n_probs") or 0))
        usage = Usage(count_words(given), finish=finish)
        return Generation(model, voice, asked.get("stream") is True, tokens, usage)

    def _endpoint(self, path: str, body: bytes) -> Reply | Generation:
        """Those that not every server has. Its errors have OpenAI's shape on Anthropic's paths too."""
        model = self.models[0]
        if path == endpoints.TRANSCRIPTIONS:
            text = "The current model does not support audio input."
            return handler_error(501, text, "not_supported_error")
        asked = _parse(body)
        if path in endpoints.RERANK:
            if "rerank" not in model.capabilities:
                return endpoints.rerank_is_off()
            if not asked.get("documents"):
                text = '"documents" must be a non-empty string array'
                return handler_error(400, text, "invalid_request_error")
            return endpoints.ranking(model.name, model, asked)
        if path == endpoints.RESPONSES:
            if asked.get("previous_response_id"):
                text = "llama.cpp does not support 'previous_response_id'."
                return handler_error(400, text, "invalid_request_error")
            if asked.get("input") is None:
                return handler_error(400, "'input' is required", "invalid_request_error")
            return endpoints.response("llama-server", model.name, model, asked, self.tokens)
        if not asked.get("messages"):
            return handler_error(500, "'messages' is required", "server_error")
        if b'"image"' in dumps(asked["messages"]) and "vision" not in model.capabilities:
            raise Refused(_no_images())
        words = endpoints.prompt_words(asked)
        if path == endpoints.COUNT:
            return Reply(200, JSON_UTF8, dumps({"input_tokens": words}))
        if words > model.context_tokens:
            return _context_exceeded(words, model.context_tokens)
        return endpoints.message("llama-server", model.name, model, asked, self.tokens)

    def missing(self, path: str) -> Reply:
        return NOT_FOUND

    def queue_full(self, path: str) -> Reply:
        return LOADING

    def error(self, path: str, message: str) -> Reply:
        return handler_error(500, message, "server_error")

    def _embed(self, asked: dict[str, Any]) -> Generation:
        if not self.embeddings:
            text = "This server does not support embeddings. Start it with `--embeddings`"
            raise Refused(handler_error(501, text, "not_supported_error"))
        given = asked.get("input", asked.get("content"))
        if given is None:
            text = '"input" or "content" must be provided'
            raise Refused(handler_error(400, text, "invalid_request_error"))
        texts = given if isinstance(given, list) else [given]
        if not texts:
            raise Refused(handler_error(400, '"input" must not be empty', "invalid_request_error"))
        if "" in texts:
            raise Refused(handler_error(400, "Input content cannot be empty", "invalid_request_error"))
        counts = [count_words(text) + 1 for text in texts]
        if max(counts) > _PHYSICAL_BATCH_TOKENS:
            text = (
                f"input ({max(counts)} tokens) is too large to process. increase the physical batch size "
                f"(current batch size: {_PHYSICAL_BATCH_TOKENS})"
            )
            raise Refused(handler_error(500, text, "server_error"))
        model = self.models[0]
        voice = EmbeddingVoice(model.name, texts, model.embedding_length)
        return Generation(model, voice, False, [], Usage(sum(counts)))

    def _models(self, model: FakeModel) -> dict[str, Any]:
        listed: dict[str, Any] = orjson.loads(recording("llamacpp/models").body)
        listed["models"][0] |= {"name": model.name, "model": model.name}
        listed["data"][0] |= {"id": model.name, "aliases": [model.name]}
        listed["data"][0]["meta"] |= {
            "n_ctx": model.context_tokens,
            "n_ctx_train": model.context_train_tokens,
            "n_embd": model.embedding_length,
            "size": model.size_bytes,
        }
        return listed

    def _props(self, model: FakeModel) -> dict[str, Any]:
        props: dict[str, Any] = orjson.loads(recording("llamacpp/props").body)
        props["default_generation_settings"]["n_ctx"] = model.context_tokens
        props |= {
            "total_slots": self.slots,
            "model_alias": model.name,
            "model_path": f"/opt/{model.name}.gguf",
        }
        props["modalities"]["vision"] = "vision" in model.capabilities
        props["chat_template_caps"] |= {
            "supports_tools": "tools" in model.capabilities,
            "supports_tool_calls": "tools" in model.capabilities,
        }
        if "thinking" in model.capabilities:
            props["chat_template"] += "{% if enable_thinking %}<think>{% endif %}"
        return props


def _tokenize(asked: dict[str, Any]) -> Reply:
    """The fake's tokens are bytes, so that any text comes back as it was."""
    return Reply(200, JSON_UTF8, dumps({"tokens": list(str(asked.get("content", "")).encode())}))


def _detokenize(asked: dict[str, Any]) -> Reply:
    tokens = asked.get("tokens", [])
    if not all(0 <= token < 256 for token in tokens):
        text = "vector::_M_range_check: __n (which is 50400000) >= this->size() (which is 49152)"
        return handler_error(500, text, "server_error")
    return Reply(200, JSON_UTF8, dumps({"content": bytes(tokens).decode("utf-8", "replace")}))


def _apply_template(asked: dict[str, Any]) -> Reply:
    said = [f"<|im_start|>{said['role']}\n{said['content']}<|im_end|>\n" for said in asked["messages"]]
    return Reply(200, JSON_UTF8, dumps({"prompt": "".join([*said, "<|im_start|>assistant\n"])}))


#: What is answered at once, whatever the slots do.
HELPERS = {"/tokenize": _tokenize, "/detokenize": _detokenize, "/apply-template": _apply_template}


def _no_images() -> Reply:
    text = "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
    return handler_error(500, text, "server_error")


def _context_exceeded(prompt_tokens: int, context_tokens: int) -> Reply:
    text = (
        f"request ({prompt_tokens} tokens) exceeds the available context size ({context_tokens} tokens), "
        "try increasing it"
    )
    sizes = {"n_prompt_tokens": prompt_tokens, "n_ctx": context_tokens}
    return handler_error(400, text, "exceed_context_size_error", **sizes)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        name = "err-bad-json" if body else "err-empty-body"
        raise Refused(Reply(500, JSON_UTF8, recording(f"llamacpp/{name}").body)) from None
    return asked if isinstance(asked, dict) else {}


def _limit(asked: dict[str, Any]) -> int | None:
    for name in ("n_predict", "max_tokens", "max_completion_tokens"):
        if asked.get(name) is not None:
            return int(asked[name]) or 1  # none at all still yields one
    return None


def _messages(asked: dict[str, Any], model: FakeModel) -> list[Any]:
    messages = asked.get("messages")
    if messages is None:
        raise Refused(handler_error(400, "'messages' is required", "invalid_request_error"))
    if not isinstance(messages, list):
        raise Refused(handler_error(400, "Expected 'messages' to be an array", "invalid_request_error"))
    temperature = asked.get("temperature")
    if temperature is not None and not isinstance(temperature, int | float):
        text = "Field 'temperature': [json.exception.type_error.302] type must be number, but is string"
        raise Refused(handler_error(400, text, "invalid_request_error"))
    if b'"image_url"' in dumps(messages) and "vision" not in model.capabilities:
        raise Refused(_no_images())
    return messages


def _timings(usage: Usage) -> dict[str, float]:
    prompt_n = usage.prompt_tokens - usage.cached_tokens
    prompt_ms, predicted_ms = usage.prompt_s * 1000, usage.decode_s * 1000
    predicted_n = usage.completion_tokens
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(1, prompt_n),
        "prompt_per_second": prompt_n / usage.prompt_s,
        "predicted_n": predicted_n,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(1, predicted_n),
        "predicted_per_second": predicted_n / usage.decode_s,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
