"""What an Ollama request becomes on a llama.cpp node, and what it is refused with."""

from __future__ import annotations

import base64
import dataclasses
import io
import sys

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd_node.translate import Answer, Call, ModelFacts, Refusal, translate
from tests.fakes.recordings import recording

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 20).decode()
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + b"\0" * 20).decode()
WAV = base64.b64encode(b"RIFF\0\0\0\0WAVEfmt ").decode()
MP3 = base64.b64encode(b"ID3\x03" + b"\0" * 20).decode()
WEBP = base64.b64encode(b"RIFF\0\0\0\0WEBPVP8 ").decode()
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

PLAIN = ModelFacts(name="smollm2:135m", upstream_id="the-backend's-id", context_tokens=1024)
ABLE = dataclasses.replace(
    PLAIN, capabilities=frozenset({"completion", "tools", "thinking", "vision", "embedding"})
)


def upstream(path: str, facts: ModelFacts = ABLE, **fields: object) -> dict[str, object]:
    call = translate(path, orjson.dumps({"model": "m", **fields}), facts)
    assert isinstance(call, Call)
    assert call.path == "/v1/chat/completions"
    return orjson.loads(call.body)


def chat(facts: ModelFacts = ABLE, **fields: object) -> dict[str, object]:
    return upstream("/api/chat", facts, **{"messages": [{"role": "user", "content": "hi"}], **fields})


def refusal(path: str, body: object, facts: ModelFacts = PLAIN) -> Refusal:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    with pytest.raises(Refusal) as caught:
        translate(path, raw, facts)
    return caught.value


def test_a_chat_becomes_a_streamed_chat_completion_with_the_backends_own_id() -> None:
    sent = chat(stream=False)
    assert sent["model"] == "the-backend's-id"
    assert sent["stream"] is True
    assert sent["messages"] == [{"role": "user", "content": "hi"}]


def test_stream_is_on_unless_the_caller_says_no() -> None:
    message = {"messages": [{"role": "user", "content": "hi"}]}
    for value, wanted in ((None, True), (True, True), (False, False)):
        call = translate("/api/chat", orjson.dumps({"model": "m", "stream": value, **message}), PLAIN)
        assert isinstance(call, Call)
        assert (call.stream, call.sse) == (wanted, True)
        assert call.content_type.startswith(b"application/x-ndjson" if wanted else b"application/json")


def test_ollamas_defaults_are_sent_in_full() -> None:
    sent = chat()
    expected = {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repeat_penalty": 1.0,
        "repeat_last_n": 64,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": -1,
        "n_keep": 4,
        "n_predict": 10 * 1024,
    }
    assert {name: sent[name] for name in expected} == expected
    assert "stop" not in sent


def test_options_replace_the_defaults_and_null_means_absent() -> None:
    sent = chat(
        options={
            "temperature": 0,
            "top_p": None,
            "num_predict": 7.9,
            "stop": ["a"],
            "seed": 3,
            "num_ctx": 1024,
            "num_batch": 64,
            "use_mmap": True,
            "nonsense": "x",
        }
    )
    wanted = {"temperature": 0.0, "top_p": 0.9, "n_predict": 7, "stop": ["a"], "seed": 3}
    assert {name: sent[name] for name in wanted} == wanted
    assert not {"num_ctx", "num_batch", "use_mmap", "nonsense", "options"} & sent.keys()


def test_a_context_of_unknown_size_leaves_the_length_to_the_server() -> None:
    assert "n_predict" not in chat(ModelFacts(name="m", upstream_id="m"))


def test_repeating_over_the_whole_context_is_spelled_as_a_number() -> None:
    assert chat(options={"repeat_last_n": -1})["repeat_last_n"] == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ctx": "big"}, 'option "num_ctx" must be of type integer'),
        ({"seed": True}, 'option "seed" must be of type integer'),
        ({"temperature": "hot"}, 'option "temperature" must be of type float32'),
        ({"use_mmap": 1}, 'option "use_mmap" must be of type boolean'),
        ({"stop": "x"}, 'option "stop" must be of type array'),
        ({"stop": [1]}, 'option "stop" must be of an array of strings'),
    ],
)
def test_an_option_of_the_wrong_type_is_the_callers_mistake(options: dict, message: str) -> None:
    refused = refusal("/api/generate", {"model": "m", "prompt": "x", "options": options})
    assert (refused.status, refused.message) == (400, message)


def test_a_context_larger_than_the_slot_is_refused_with_both_numbers() -> None:
    refused = refusal("/api/generate", {"model": "m", "prompt": "x", "options": {"num_ctx": 4096}})
    assert refused.status == 400
    assert "4096" in refused.message
    assert "1024" in refused.message


def test_generate_becomes_a_chat_of_system_and_prompt() -> None:
    sent = upstream(
        "/api/generate", prompt="The sky is", system="Be brief.", suffix="", raw=False, context=[]
    )
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The sky is"},
    ]


@pytest.mark.parametrize("wanted", ["json", {"type": "object"}])
def test_json_is_asked_for_as_a_schema_because_json_object_is_not_enforced(wanted: object) -> None:
    assert chat(format=wanted)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "schema", "schema": {"type": "object"}},
    }


@pytest.mark.parametrize("absent", [None, ""])
def test_an_empty_format_is_none(absent: object) -> None:
    assert "response_format" not in chat(format=absent)


def test_thinking_is_on_where_the_model_can_unless_the_caller_says_no() -> None:
    assert chat()["chat_template_kwargs"] == {"enable_thinking": True}
    assert chat(think=True)["chat_template_kwargs"] == {"enable_thinking": True}
    assert chat(think=False)["chat_template_kwargs"] == {"enable_thinking": False}
    low = chat(think="low")
    assert (low["chat_template_kwargs"], low["reasoning_effort"]) == ({"enable_thinking": True}, "low")


def test_a_model_that_cannot_think_gets_no_word_of_it() -> None:
    for think in (None, False):
        assert "chat_template_kwargs" not in chat(PLAIN, think=think)


def test_a_tool_call_travels_as_a_string_and_its_result_finds_it() -> None:
    sent = chat(
        tools=[{"function": {"name": "f"}}],
        messages=[
            {"role": "USER", "content": "Weather?"},
            {
                "role": "assistant",
                "thinking": "hm",
                "tool_calls": [
                    {"id": "call_a", "function": {"name": "f", "arguments": {"city": "Oslo"}}},
                    {"function": {"name": "g", "arguments": {}}},
                ],
            },
            {"role": "tool", "tool_name": "g", "content": "11"},
            {"role": "tool", "content": "12"},
        ],
    )
    user, assistant, first, second = sent["messages"]  # type: ignore[misc]
    assert user["role"] == "user"
    assert assistant["reasoning_content"] == "hm"
    calls = assistant["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "f", "arguments": '{"city":"Oslo"}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert (first["tool_call_id"], first["name"]) == (calls[1]["id"], "g")
    assert second["tool_call_id"] == calls[0]["id"] == "call_a"
    assert sent["tools"] == [
        {
            "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
            "type": "function",
        }
    ]


@pytest.mark.parametrize(("image", "media_type"), [(PNG, "png"), (JPEG, "jpeg")])
def test_an_image_becomes_a_data_uri_of_its_own_type(image: str, media_type: str) -> None:
    parts = chat(messages=[{"role": "user", "content": "what?", "images": [image]}])["messages"][0]["content"]  # type: ignore[index]
    uri = {"url": f"data:image/{media_type};base64,{image}"}
    assert parts == [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": uri}]
    assert upstream("/api/generate", prompt="what?", images=[image])["messages"][0]["content"] == parts  # type: ignore[index]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64," + PNG, "illegal base64 data at input byte 4"),
        (PNG[:-3], f"illegal base64 data at input byte {len(PNG) - 3}"),
        ("ü" + PNG, "illegal base64 data at input byte 0"),
        ("AAAA", "only PNG, JPEG and WebP images, WAV and MP3 sound are supported on this node"),
        ("", "only PNG, JPEG and WebP images, WAV and MP3 sound are supported on this node"),
    ],
)
def test_an_image_that_is_none_is_refused(image: str, message: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "", "images": [image]}]}
    refused = refusal("/api/chat", body, ABLE)
    assert (refused.status, refused.message) == (400, message)


def test_an_image_for_a_text_model_is_refused_by_name() -> None:
    body = {"model": "Smol", "messages": [{"role": "user", "content": "", "images": [PNG]}]}
    assert refusal("/api/chat", body).message == '"Smol" does not support image input'
    body["messages"][0]["images"] = [WAV]  # type: ignore[index]
    assert refusal("/api/chat", body).message == '"Smol" does not support audio input'


@pytest.mark.parametrize(("sound", "kind"), [(WAV, "wav"), (MP3, "mp3")])
def test_sound_rides_in_the_images_as_it_does_in_ollama(sound: str, kind: str) -> None:
    hears = dataclasses.replace(ABLE, capabilities=ABLE.capabilities | {"audio"})
    message = {"role": "user", "content": "", "images": [sound]}
    part = {"type": "input_audio", "input_audio": {"data": sound, "format": kind}}
    assert chat(hears, messages=[message])["messages"] == [{"role": "user", "content": [part]}]


def webp(size: tuple[int, int] = (3, 2)) -> str:
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new("RGB", size, (200, 0, 0)).save(out, "WEBP", lossless=True)
    return base64.b64encode(out.getvalue()).decode()


def test_webp_becomes_png_where_pillow_is_installed() -> None:
    sent = chat(messages=[{"role": "user", "content": "", "images": [webp()]}])
    uri = sent["messages"][0]["content"][0]["image_url"]["url"]  # type: ignore[index]
    kind, _, packed = uri.partition(",")
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(base64.b64decode(packed)))
    assert (kind, image.format, image.size) == ("data:image/png;base64", "PNG", (3, 2))
    assert image.convert("RGB").getpixel((1, 1)) == (200, 0, 0)


def test_webp_without_pillow_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    body = {"model": "m", "messages": [{"role": "user", "content": "", "images": [WEBP]}]}
    refused = refusal("/api/chat", body, ABLE)
    assert (refused.status, "pip install 'herd-fleet[webp]'" in refused.message) == (400, True)


def test_webp_that_is_broken_or_huge_is_the_callers_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    for image, message in ((WEBP, "the WebP image cannot be read"), (webp((9, 9)), "more than 64 pixels")):
        monkeypatch.setattr("herd_node.translate.webp.MAX_PIXELS", 64)
        body = {"model": "m", "messages": [{"role": "user", "content": "", "images": [image]}]}
        refused = refusal("/api/chat", body, ABLE)
        assert (refused.status, message in refused.message) == (400, True)


@pytest.mark.parametrize("wall_s", [0.0, 1795403355.390737])
def test_nothing_to_generate_answers_load_at_once(wall_s: float) -> None:
    for name in ("chat-empty-load", "generate-empty-load"):
        recorded = recording(f"ollama/{name}")
        path = "/api/chat" if name.startswith("chat") else "/api/generate"
        answer = translate(path, recorded.request_body, PLAIN, wall_s=wall_s)
        assert isinstance(answer, Answer)
        assert (answer.status, answer.content_type.decode()) == (200, recorded.headers["content-type"])
        ours, theirs = orjson.loads(answer.body), orjson.loads(recorded.body)
        assert list(ours) == list(theirs)
        assert {**ours, "created_at": ""} == {**theirs, "created_at": ""}


@pytest.mark.parametrize("keep_alive", [-1, 300, "5m", "1h30m", "-1s", "0.5s", "300ms", None, 0, "0s"])
def test_any_keep_alive_is_accepted_with_a_prompt(keep_alive: object) -> None:
    assert "keep_alive" not in chat(keep_alive=keep_alive)


NOTHING = [0, 0.0, "0", "0s", "-0m"]
UNLOADING = dataclasses.replace(ABLE, unloads=True)


@pytest.mark.parametrize("keep_alive", NOTHING)
@pytest.mark.parametrize("name", ["keepalive-zero-unload", "keepalive-zero-chat-empty"])
def test_unloading_is_asked_of_a_backend_that_can(name: str, keep_alive: object) -> None:
    recorded = recording(f"ollama/{name}")
    path = recorded.request_head.split()[1].decode()
    body = orjson.loads(recorded.request_body) | {"keep_alive": keep_alive}
    answer = translate(path, orjson.dumps(body), UNLOADING)
    assert isinstance(answer, Answer)
    assert answer.unload
    ours, theirs = orjson.loads(answer.body), orjson.loads(recorded.body)
    assert {**ours, "created_at": ""} == {**theirs, "created_at": ""}
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("keep_alive", NOTHING)
def test_a_backend_that_keeps_its_model_says_that_it_is_loaded(keep_alive: object) -> None:
    for path in ("/api/chat", "/api/generate"):
        answer = translate(path, orjson.dumps({"model": "m", "keep_alive": keep_alive}), PLAIN)
        assert isinstance(answer, Answer)
        assert (orjson.loads(answer.body)["done_reason"], answer.unload) == ("load", False)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}]}),
        ("/api/generate", {"prompt": "x"}),
        ("/api/generate", {"prompt": "x", "raw": True}),
        ("/api/embed", {"input": "x"}),
        ("/api/embeddings", {"prompt": "x"}),
    ],
)
def test_a_keep_alive_of_nothing_unloads_after_the_answer(path: str, asked: dict) -> None:
    for keep_alive, wanted in ((0, True), ("5m", False), (None, False), (-1, False)):
        body = orjson.dumps({"model": "m", "keep_alive": keep_alive, **asked})
        for facts, unloads in ((UNLOADING, wanted), (ABLE, False)):
            call = translate(path, body, facts)
            assert isinstance(call, Call)
            assert call.unload is unloads
            assert b"keep_alive" not in call.body


@pytest.mark.parametrize(
    ("keep_alive", "message"),
    [
        ("300", 'time: missing unit in duration "300"'),
        ("soon", 'time: invalid duration "soon"'),
        ("", 'time: invalid duration ""'),
        (True, "Unsupported type: 'bool'"),
    ],
)
def test_a_keep_alive_that_is_no_duration_is_refused(keep_alive: object, message: str) -> None:
    assert (
        refusal("/api/generate", {"model": "m", "prompt": "x", "keep_alive": keep_alive}).message == message
    )


def test_what_no_backend_can_is_refused_by_name() -> None:
    refused = refusal("/api/generate", {"model": "m", "prompt": "x", "_debug_render_only": True}, ABLE)
    assert (refused.status, refused.message) == (400, '"_debug_render_only" is not supported on this node')


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({}, (None, None)),
        ({"top_logprobs": 3}, (None, None)),
        ({"logprobs": False, "top_logprobs": 3}, (None, None)),
        ({"logprobs": True}, (True, 1)),
        ({"logprobs": True, "top_logprobs": 20}, (True, 20)),
    ],
)
def test_log_probabilities_are_asked_for_with_at_least_one_beside(asked: dict, sent: tuple) -> None:
    upstream = chat(**asked)
    assert (upstream.get("logprobs"), upstream.get("top_logprobs")) == sent


#: Recorded from Ollama: the same request must be refused in the same words. A status that facts name as
#: the client's mistake answered 500 is 400 here.
RECORDED_REFUSALS = [
    "chat-format-bad",
    "chat-think-bad",
    "chat-think-unsupported",
    "chat-tools-unsupported",
    "err-empty-body",
    "err-json-array",
    "err-keep-alive-string",
    "err-missing-model-chat",
    "err-missing-model-generate",
    "err-option-type",
    "err-wrong-type",
    "generate-image-bad-base64",
    "generate-top-logprobs-21",
    "embed-missing-model",
    "embed-number",
    "show-missing",
    "v1-chat-bad-json",
]


@pytest.mark.parametrize("name", RECORDED_REFUSALS)
def test_a_refusal_is_worded_as_ollama_words_it(name: str) -> None:
    recorded = recording(f"ollama/{name}")
    path = recorded.request_head.split()[1].decode()
    error = orjson.loads(recorded.body)["error"]
    path, message = ("/api/chat", error["message"]) if path.startswith("/v1") else (path, error)
    refused = refusal(path, recorded.request_body)
    assert refused.message == message
    assert refused.status == {500: 400}.get(recorded.status, recorded.status)


def test_arguments_of_a_tool_call_must_be_an_object_in_ollamas_words() -> None:
    recorded = recording("ollama/chat-tools-args-string")
    refused = refusal("/api/chat", recorded.request_body, ABLE)
    assert {"error": refused.message} == orjson.loads(recorded.body)


@pytest.mark.parametrize(
    ("path", "body", "word", "where"),
    [
        ("/api/chat", {"model": 7}, "number", "ChatRequest.model of type string"),
        ("/api/chat", {"model": "m", "stream": "no"}, "string", "ChatRequest.stream of type bool"),
        ("/api/chat", {"model": "m", "messages": [1]}, "number", "ChatRequest.messages of type api.Message"),
        (
            "/api/chat",
            {"model": "m", "messages": [{"content": [1]}]},
            "array",
            "Alias.content of type string",
        ),
        ("/api/chat", {"model": "m", "tools": {}}, "object", "ChatRequest.tools of type api.Tools"),
        ("/api/chat", {"model": "m", "options": []}, "array", "ChatRequest.options of type map"),
        (
            "/api/chat",
            {"model": "m", "top_logprobs": 1.5},
            "number 1.5",
            "ChatRequest.top_logprobs of type int",
        ),
        ("/api/generate", {"model": "m", "prompt": {}}, "object", "GenerateRequest.prompt of type string"),
        ("/api/embed", {"model": "m", "dimensions": "8"}, "string", "EmbedRequest.dimensions of type int"),
        (
            "/api/embeddings",
            {"model": "m", "prompt": ["a"]},
            "array",
            "EmbeddingRequest.prompt of type string",
        ),
        ("/api/show", {"model": True}, "bool", "ShowRequest.model of type string"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(path: str, body: object, word: str, where: str) -> None:
    refused = refusal(path, body)
    assert refused.status == 400
    assert refused.message.startswith(f"json: cannot unmarshal {word} into Go struct field {where}")


def test_a_path_that_nobody_translates_is_404() -> None:
    assert refusal("/api/pull", {"model": "m"}).status == 404


def outcome(path: str, body: dict) -> Call | Answer | Refusal:
    try:
        return translate(path, orjson.dumps(body), ABLE)
    except Refusal as refused:
        return refused


short_text = st.text("a0{é ", max_size=4)
scalars = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | short_text
json_values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(short_text, scalars, max_size=3)
FIELDS = """model messages prompt input stream options tools images format think keep_alive truncate raw
    dimensions suffix context logprobs top_logprobs system template name verbose"""
field_names = st.sampled_from(FIELDS.split())


@given(
    path=st.sampled_from(["/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/show"]),
    body=st.dictionaries(field_names, json_values, max_size=6),
)
def test_no_request_is_more_than_refused(path: str, body: dict) -> None:
    refused = outcome(path, {"model": "m", "prompt": "x", **body})
    if isinstance(refused, Refusal):
        assert 400 <= refused.status < 500
        assert refused.message


@given(
    message=st.dictionaries(
        st.sampled_from(["role", "content", "thinking", "images", "tool_calls", "tool_name", "tool_call_id"]),
        json_values | st.lists(st.dictionaries(st.just("function"), json_values), max_size=2),
    )
)
def test_no_message_is_more_than_refused(message: dict) -> None:
    refused = outcome("/api/chat", {"model": "m", "messages": [message]})
    if isinstance(refused, Refusal):
        assert refused.status == 400


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text builds hypothesis' character table
@given(st.text(), st.text())
def test_any_text_arrives_as_it_was_written(text: str, stop: str) -> None:
    sent = chat(messages=[{"role": "user", "content": text}], options={"stop": [stop]})
    assert sent["messages"] == [{"role": "user", "content": text}]
    assert sent["stop"] == [stop]


# ---- servers of the plain OpenAI dialect

OTHER = dataclasses.replace(ABLE, flavour="openai", context_tokens=None)
PLAIN_OPENAI = {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def test_an_openai_server_gets_the_fields_of_its_own_dialect_only() -> None:
    assert chat(OTHER) == {
        "model": "the-backend's-id",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "hi"}],
        **PLAIN_OPENAI,
    }


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"temperature": 0, "top_p": 1}, {"temperature": 0.0, "top_p": 1.0}),
        ({"num_predict": 7, "stop": ["a"]}, {"max_tokens": 7, "stop": ["a"]}),
        ({"num_predict": -1}, {}),
        ({"num_predict": 0}, {}),
        ({"seed": 3}, {"seed": 3}),
        ({"seed": -1}, {}),
        (
            {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1},
            {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1},
        ),
        ({"top_k": None, "num_keep": 9, "num_ctx": 99, "num_batch": 1}, {}),
    ],
)
def test_an_openai_server_hears_of_the_rest_what_the_caller_named(options: dict, sent: dict) -> None:
    got = chat(OTHER, options=options)
    gone = {"model", "stream", "stream_options", "messages"}
    assert {name: value for name, value in got.items() if name not in gone} == PLAIN_OPENAI | sent


@pytest.mark.parametrize(
    ("think", "sent"),
    [
        (None, {}),
        (True, {"chat_template_kwargs": {"enable_thinking": True}}),
        (False, {"chat_template_kwargs": {"enable_thinking": False}}),
        ("low", {"reasoning_effort": "low"}),
        ("max", {"reasoning_effort": "high"}),
    ],
)
def test_an_openai_server_is_told_to_think_only_when_the_caller_does(think: object, sent: dict) -> None:
    got = chat(OTHER, think=think)
    names = ("chat_template_kwargs", "reasoning_effort")
    assert {name: got[name] for name in names if name in got} == sent


@pytest.mark.parametrize(
    ("asked", "sent"),
    [({"logprobs": True}, {"logprobs": True}), ({"logprobs": True, "top_logprobs": 2}, {"top_logprobs": 2})],
)
def test_an_openai_server_gets_log_probabilities_as_they_were_asked_for(asked: dict, sent: dict) -> None:
    got = chat(OTHER, **asked)
    assert sent.items() <= got.items()
    assert ("top_logprobs" in got) is ("top_logprobs" in asked)


def test_tools_images_and_formats_are_the_same_for_any_server() -> None:
    fields = {
        "tools": [TOOL],
        "format": "json",
        "messages": [{"role": "user", "content": "x", "images": [PNG]}],
    }
    ours, theirs = chat(OTHER, **fields), chat(**fields)
    for name in ("tools", "response_format", "messages"):
        assert ours[name] == theirs[name]
