"""What a backend of each kind promises. The same checks run against the fake and against the real server.

A check takes a `Target` and asserts. Shapes are compared with the recordings: the same keys in the same
order, values of the same type.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from tests.fakes.recordings import Recording, recording

MESSAGES = [{"role": "user", "content": "Name one colour."}]
GREEDY = {"temperature": 0, "seed": 1, "num_predict": 6}


@dataclass(frozen=True, slots=True)
class Target:
    http: httpx.AsyncClient
    model: str
    embedding_model: str | None
    """None: nothing to embed with."""


Check = Callable[[Target], Awaitable[None]]


def shape(value: Any) -> Any:
    """Keys in order with the types of their values; a number is a number; of a list the first item."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


def same_shape(ours: Any, theirs: Any, *, but: tuple[str, ...] = ()) -> None:
    """`but`: keys that are not compared."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        ours = {key: value for key, value in ours.items() if key not in but}
        theirs = {key: value for key, value in theirs.items() if key not in but}
        assert list(ours) == list(theirs)
    assert shape(ours) == shape(theirs)


def same_head(answer: httpx.Response, recorded: Recording) -> None:
    """Status, and the headers that say what the body is."""
    assert answer.status_code == recorded.status
    assert answer.headers.get("content-type") == recorded.headers.get("content-type")


def events(body: bytes) -> list[bytes]:
    """The data of a body of server-sent events; comments are dropped."""
    blocks = [block for block in body.split(b"\n\n") if block and not block.startswith(b":")]
    assert all(block.startswith(b"data: ") for block in blocks)
    return [block.removeprefix(b"data: ") for block in blocks]


async def post(target: Target, path: str, **fields: Any) -> httpx.Response:
    return await target.http.post(path, json=fields)


# ---- Ollama


async def ollama_says_what_it_is(target: Target) -> None:
    root = await target.http.get("/")
    assert root.content == recording("ollama/root").body
    version = await target.http.get("/api/version")
    same_head(version, recording("ollama/version"))
    assert isinstance(version.json()["version"], str)


async def ollama_lists_its_models(target: Target) -> None:
    tags = (await target.http.get("/api/tags")).json()["models"]
    assert target.model in [entry["name"] for entry in tags]
    same_shape(tags[0], orjson.loads(recording("ollama/tags").body)["models"][0])


async def ollama_shows_a_model(target: Target) -> None:
    shown = await post(target, "/api/show", model=target.model)
    assert shown.status_code == 200
    theirs = orjson.loads(recording("ollama/show").body)
    ours = shown.json()
    needed = ("modelfile", "template", "details", "model_info", "capabilities", "modified_at")
    assert [key for key in ours if key in needed] == [key for key in theirs if key in needed]
    assert "\nFROM " in ours["modelfile"]
    unknown = await post(target, "/api/show", model="nope")
    same_head(unknown, recording("ollama/show-unknown"))
    assert unknown.content == recording("ollama/show-unknown").body


async def ollama_streams_a_chat(target: Target) -> None:
    recorded = recording("ollama/chat-stream")
    answer = await post(target, "/api/chat", model=target.model, messages=MESSAGES, options=GREEDY)
    same_head(answer, recorded)
    assert answer.content.endswith(b"\n")
    lines = [orjson.loads(line) for line in answer.content.splitlines()]
    theirs = [orjson.loads(line) for line in recorded.body.splitlines()]
    same_shape(lines[0], theirs[0])
    same_shape(lines[-1], theirs[-1])
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["eval_count"] <= GREEDY["num_predict"]


async def ollama_folds_a_chat(target: Target) -> None:
    recorded = recording("ollama/chat")
    answer = await post(
        target, "/api/chat", model=target.model, messages=MESSAGES, options=GREEDY, stream=False
    )
    same_head(answer, recorded)
    assert not answer.content.endswith(b"\n")
    same_shape(answer.json(), orjson.loads(recorded.body))


async def ollama_generates(target: Target) -> None:
    fields = {"model": target.model, "prompt": "The sky is", "options": GREEDY}
    for name, stream in (("generate-stream", True), ("generate", False)):
        recorded = recording(f"ollama/{name}")
        answer = await post(target, "/api/generate", **fields, stream=stream)
        same_head(answer, recorded)
        same_shape(
            orjson.loads(answer.content.splitlines()[-1]), orjson.loads(recorded.body.splitlines()[-1])
        )


async def ollama_loads_when_there_is_nothing_to_say(target: Target) -> None:
    for name, path in (("chat-empty-load", "/api/chat"), ("generate-empty-load", "/api/generate")):
        answer = await post(target, path, model=target.model)
        same_head(answer, recording(f"ollama/{name}"))
        same_shape(answer.json(), orjson.loads(recording(f"ollama/{name}").body))
        assert answer.json()["done_reason"] == "load"
    loaded = (await target.http.get("/api/ps")).json()["models"]
    assert target.model in [entry["name"] for entry in loaded]
    same_shape(loaded[0], orjson.loads(recording("ollama/ps-one").body)["models"][0])


async def ollama_embeds(target: Target) -> None:
    if target.embedding_model is None:
        refused = await post(target, "/api/embed", model=target.model, input="hello")
        same_head(refused, recording("ollama/embed-chat-model"))
        assert refused.content == recording("ollama/embed-chat-model").body
        return
    two = await post(target, "/api/embed", model=target.embedding_model, input=["hello", "world"])
    same_shape(two.json(), orjson.loads(recording("ollama/embed-two").body))
    assert len(two.json()["embeddings"]) == 2
    old = await post(target, "/api/embeddings", model=target.embedding_model, prompt="hello")
    same_shape(old.json(), orjson.loads(recording("ollama/embeddings").body))
    openai = await post(target, "/v1/embeddings", model=target.embedding_model, input="hello")
    same_head(openai, recording("ollama/v1-embeddings"))
    same_shape(openai.json(), orjson.loads(recording("ollama/v1-embeddings").body))
    none = await post(target, "/api/embed", model=target.embedding_model, input=[])
    assert none.json() == {"model": target.embedding_model, "embeddings": []}


#: Recorded requests whose answer must be the same, byte for byte, for any plain model.
OLLAMA_REFUSALS = (
    "err-empty-body",
    "err-bad-json-as-v1",
    "err-json-array",
    "err-missing-model-chat",
    "err-missing-model-generate",
    "err-unknown-model-chat",
    "err-wrong-type",
    "embed-missing-model",
    "embed-unknown",
    "embeddings-unknown",
    "show-missing",
    "v1-chat-unknown-model",
    "v1-chat-missing-model",
)


async def ollama_refuses_in_recorded_words(target: Target) -> None:
    for name in OLLAMA_REFUSALS:
        recorded = recording("ollama/v1-chat-bad-json" if name.endswith("-as-v1") else f"ollama/{name}")
        path = recorded.request_head.split()[1].decode()
        answer = await target.http.post(path, content=recorded.request_body)
        assert (name, answer.status_code, answer.content) == (name, recorded.status, recorded.body)


async def ollama_calls_some_client_mistakes_its_own(target: Target) -> None:
    for name, fields in (
        ("err-option-type", {"options": {"num_ctx": "big"}}),
        ("chat-format-bad", {"format": "xml"}),
    ):
        answer = await post(
            target, "/api/chat", model=target.model, messages=MESSAGES, stream=False, **fields
        )
        same_head(answer, recording(f"ollama/{name}"))
        assert answer.content == recording(f"ollama/{name}").body


async def ollama_speaks_openai(target: Target) -> None:
    fields = {"model": target.model, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    whole = await post(target, "/v1/chat/completions", **fields)
    same_head(whole, recording("ollama/v1-chat"))
    same_shape(whole.json(), orjson.loads(recording("ollama/v1-chat").body))
    assert whole.content.endswith(b"\n")
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    stream = await post(target, "/v1/chat/completions", **fields, **usage)
    recorded = recording("ollama/v1-chat-stream-usage")
    same_head(stream, recorded)
    ours, theirs = events(stream.content), events(recorded.body)
    assert ours[-1] == b"[DONE]"
    for at in (0, -3, -2):
        same_shape(orjson.loads(ours[at]), orjson.loads(theirs[at]))
    models = await target.http.get("/v1/models")
    same_shape(models.json(), orjson.loads(recording("ollama/v1-models").body))


async def ollama_knows_no_other_path(target: Target) -> None:
    for name in ("err-unknown-path", "err-wrong-method"):
        recorded = recording(f"ollama/{name}")
        method, path = recorded.request_head.decode().split()[:2]
        answer = await target.http.request(method, path)
        same_head(answer, recorded)
        assert (answer.content, answer.headers.get("allow")) == (recorded.body, recorded.headers.get("allow"))


async def ollama_refuses_a_strangers_host_and_origin(target: Target) -> None:
    for headers in ({"host": "evil.example.com"}, {"origin": "https://evil.example.com"}):
        answer = await target.http.get("/api/tags", headers=headers)
        assert (answer.status_code, answer.content) == (403, b"")


OLLAMA: tuple[Check, ...] = (
    ollama_says_what_it_is,
    ollama_lists_its_models,
    ollama_shows_a_model,
    ollama_streams_a_chat,
    ollama_folds_a_chat,
    ollama_generates,
    ollama_loads_when_there_is_nothing_to_say,
    ollama_embeds,
    ollama_refuses_in_recorded_words,
    ollama_calls_some_client_mistakes_its_own,
    ollama_speaks_openai,
    ollama_knows_no_other_path,
    ollama_refuses_a_strangers_host_and_origin,
)


# ---- llama-server


async def llama_says_that_it_is_ready(target: Target) -> None:
    health = await target.http.get("/health")
    same_head(health, recording("llamacpp/health-ok"))
    assert health.content == recording("llamacpp/health-ok").body
    assert health.headers["server"] == "llama.cpp"


async def llama_describes_itself_in_props(target: Target) -> None:
    props = (await target.http.get("/props")).json()
    theirs = orjson.loads(recording("llamacpp/props").body)
    needed = ("default_generation_settings", "total_slots", "model_alias", "model_path", "modalities")
    needed += ("chat_template", "chat_template_caps", "is_sleeping")
    for key in needed:
        assert type(props[key]) is type(theirs[key]), key
    assert props["model_alias"] == target.model
    assert isinstance(props["default_generation_settings"]["n_ctx"], int)
    assert {"vision", "audio"} <= props["modalities"].keys()
    assert {"supports_tools", "supports_tool_calls"} <= props["chat_template_caps"].keys()


async def llama_lists_its_model(target: Target) -> None:
    listed = (await target.http.get("/v1/models")).json()
    theirs = orjson.loads(recording("llamacpp/models").body)
    assert [entry["id"] for entry in listed["data"]] == [target.model]
    assert listed["data"][0].keys() >= theirs["data"][0].keys()
    same_shape(listed["data"][0]["meta"], theirs["data"][0]["meta"])
    props = (await target.http.get("/props")).json()
    assert listed["data"][0]["meta"]["n_ctx"] == props["default_generation_settings"]["n_ctx"]


async def llama_shows_its_slots(target: Target) -> None:
    slots = (await target.http.get("/slots")).json()
    props = (await target.http.get("/props")).json()
    assert len(slots) == props["total_slots"]
    for slot in slots:
        assert slot.keys() >= {"id", "n_ctx", "speculative", "is_processing"}
        assert slot["is_processing"] is False


async def llama_streams_a_chat(target: Target) -> None:
    fields = {"model": target.model, "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "stream": True}
    for name, more in (
        ("chat-stream", {}),
        ("chat-stream-usage", {"stream_options": {"include_usage": True}}),
    ):
        recorded = recording(f"llamacpp/{name}")
        answer = await post(target, "/v1/chat/completions", **fields, **more)
        same_head(answer, recorded)
        assert answer.headers["x-accel-buffering"] == "no"
        ours, theirs = events(answer.content), events(recorded.body)
        assert ours[-1] == b"[DONE]"
        for at in (0, 1, -3, -2):
            same_shape(orjson.loads(ours[at]), orjson.loads(theirs[at]))
        assert orjson.loads(ours[0])["choices"][0]["delta"] == {"role": "assistant", "content": None}


async def llama_folds_a_chat(target: Target) -> None:
    answer = await post(target, "/v1/chat/completions", model="ignored", messages=MESSAGES, max_tokens=4)
    recorded = recording("llamacpp/chat")
    same_head(answer, recorded)
    same_shape(answer.json(), orjson.loads(recorded.body))
    assert answer.json()["model"] == target.model
    assert answer.json()["usage"]["completion_tokens"] == 4


async def llama_completes_text(target: Target) -> None:
    fields = {"prompt": "The sky is", "max_tokens": 3, "temperature": 0}
    whole = await post(target, "/v1/completions", **fields)
    same_shape(whole.json(), orjson.loads(recording("llamacpp/v1-completions").body))
    stream = await post(target, "/v1/completions", **fields, stream=True)
    ours, theirs = events(stream.content), events(recording("llamacpp/v1-completions-stream").body)
    assert ours[-1] == b"[DONE]"
    for at in (0, -2):
        same_shape(orjson.loads(ours[at]), orjson.loads(theirs[at]))


async def llama_embeds(target: Target) -> None:
    answer = await post(target, "/v1/embeddings", input=["hello", "world"], dimensions=3)
    recorded = recording("llamacpp/embeddings-two")
    same_head(answer, recorded)
    same_shape(answer.json(), orjson.loads(recorded.body))
    vectors = [row["embedding"] for row in answer.json()["data"]]
    assert all(len(vector) > 3 for vector in vectors), "dimensions is ignored"
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in vectors)


async def llama_refuses_in_recorded_words(target: Target) -> None:
    for name in (
        "err-bad-json",
        "err-empty-body",
        "err-no-messages",
        "err-bad-type",
        "chat-image-unsupported",
        "embeddings-empty",
        "err-404",
    ):
        recorded = recording(f"llamacpp/{name}")
        method, path = recorded.request_head.decode().split()[:2]
        answer = await target.http.request(
            method, path, content=recorded.request_body, headers={"content-type": "application/json"}
        )
        # newer builds call broken JSON a 400; older ones, and the recordings, a 500
        assert answer.status_code in (400, recorded.status), name
        said, wanted = answer.json()["error"], orjson.loads(recorded.body)["error"]
        assert said["message"] == wanted["message"]
        assert said["code"] == answer.status_code


async def llama_refuses_what_is_too_long(target: Target) -> None:
    long_text = "word " * 5000
    messages = [{"role": "user", "content": long_text}]
    chat = await post(target, "/v1/chat/completions", messages=messages, stream=True)
    same_head(chat, recording("llamacpp/err-ctx-exceeded-stream"))
    same_shape(chat.json(), orjson.loads(recording("llamacpp/err-ctx-exceeded").body))
    embedding = await post(target, "/v1/embeddings", input="word " * 900)
    same_head(embedding, recording("llamacpp/embeddings-too-long"))
    assert "is too large to process" in embedding.json()["error"]["message"]


async def llama_honours_ollamas_sampling_fields(target: Target) -> None:
    """The fields that the translator always sends are understood, and the length is kept."""
    fields = {"n_predict": 3, "min_p": 0.0, "typical_p": 1.0, "repeat_last_n": 64, "n_keep": 4, "seed": -1}
    schema = {"type": "json_schema", "json_schema": {"name": "schema", "schema": {"type": "object"}}}
    answer = await post(target, "/v1/chat/completions", messages=MESSAGES, **fields, response_format=schema)
    assert answer.status_code == 200
    assert 1 <= answer.json()["usage"]["completion_tokens"] <= 3


LLAMA: tuple[Check, ...] = (
    llama_says_that_it_is_ready,
    llama_describes_itself_in_props,
    llama_lists_its_model,
    llama_shows_its_slots,
    llama_streams_a_chat,
    llama_folds_a_chat,
    llama_completes_text,
    llama_embeds,
    llama_refuses_in_recorded_words,
    llama_refuses_what_is_too_long,
    llama_honours_ollamas_sampling_fields,
)
