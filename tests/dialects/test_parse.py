"""What a request's head must look like, endpoint by endpoint, and what each mistake is called."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.dialects import DIALECT_BY_PATH, Parsed, dialect_of
from herd.errors import ApiError, BadRequest
from herd.request import InferenceRequest
from herd_node.backends.ollama import LOAD_OPTIONS
from herd_node.protocol.routes import FORWARDED, FORWARDED_BY_PATH, Route

#: Forms are read in test_forms_and_services.py.
ROUTES = [route for route in FORWARDED if route.model_at == "body"]
PATHS = [route.path for route in ROUTES]
GENERATING = [route.path for route in FORWARDED if route.kind in ("chat", "completion", "generate")]

#: The least that each endpoint takes.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "m", "prompt": "hi"},
    "/v1/embeddings": {"model": "m", "input": "hi"},
    "/api/chat": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/api/generate": {"model": "m", "prompt": "hi"},
    "/api/embed": {"model": "m", "input": "hi"},
    "/api/embeddings": {"model": "m", "prompt": "hi"},
    "/api/show": {"model": "m"},
    "/v1/responses": {"model": "m", "input": "hi"},
    "/v1/rerank": {"model": "m", "query": "hi", "documents": ["a", "b"]},
    "/rerank": {"model": "m", "query": "hi", "documents": [{"text": "a"}]},
    "/v1/images/generations": {"model": "m", "prompt": "a tree"},
    "/v1/messages": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages/count_tokens": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
}


def parse(path: str, body: object) -> Parsed:
    route = FORWARDED_BY_PATH[path]
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return DIALECT_BY_PATH[path].parse(route, raw)


def span_of(path: str, body: bytes) -> tuple[int, int] | None:
    """As the request has it that is made of what was parsed."""
    parsed = parse(path, body)
    made = InferenceRequest(
        request_id="r",
        route=FORWARDED_BY_PATH[path],
        chain=parsed.asked,
        asked=parsed.asked,
        body=body,
        stream=parsed.stream,
        est_tokens=parsed.est_tokens,
        model_key=parsed.model_key,
    )
    return made.model_span


def refusal(path: str, body: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(path, body)
    assert caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


def test_the_table_of_this_file_knows_every_endpoint():
    assert set(GOOD) == set(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_the_least_request_is_taken(path: str):
    parsed = parse(path, GOOD[path])
    assert parsed.asked == ("m",)
    assert parsed.needs == FORWARDED_BY_PATH[path].needs


#: bytes, a piece of the sentence
NOT_JSON = [
    (b"", "missing request body"),
    (b"hello", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b'{"model": "m"} x', "not valid JSON"),
    (b'\xef\xbb\xbf{"model": "m"}', "not valid JSON"),
    (b'{"model": "\xff"}', "not valid JSON"),
    (b'{"model": "m", "temperature": NaN}', "not valid JSON"),
    (b'{"model": "m", "temperature": Infinity}', "not valid JSON"),
    (b'{"model": "\\ud83d"}', "not valid JSON"),
    (b'{"model": "m", "prompt": "\\udc00"}', "not valid JSON"),
    (b'{"\\ud800": 1, "model": "m"}', "not valid JSON"),
    (b"[" * 1025 + b"]" * 1025, "not valid JSON"),
    (b'{"model": "m", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
    (b"[]", "must be a JSON object, not a list"),
    (b'"m"', "must be a JSON object, not a string"),
    (b"7", "must be a JSON object, not a number"),
    (b"true", "must be a JSON object, not a boolean"),
    (b"null", "must be a JSON object, not null"),
    ("{}".encode("utf-16"), "not valid JSON"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("body", "said"), NOT_JSON)
def test_what_is_no_json_object_is_refused_everywhere(path: str, body: bytes, said: str):
    error = refusal(path, body)
    assert (type(error), error.status) == (BadRequest, 400)
    assert said in error.message


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/v1/chat/completions", 400, "you must provide a model parameter"),
        ("/v1/completions", 400, "you must provide a model parameter"),
        ("/v1/embeddings", 400, "you must provide a model parameter"),
        ("/api/chat", 400, "model is required"),
        ("/api/generate", 404, "model '' not found"),
        ("/api/embed", 404, "model '' not found"),
        ("/api/embeddings", 400, "model is required"),
        ("/api/show", 400, "model is required"),
        ("/v1/responses", 400, "you must provide a model parameter"),
        ("/v1/rerank", 400, "you must provide a model parameter"),
        ("/v1/images/generations", 400, "you must provide a model parameter"),
        ("/v1/messages", 400, "model is required"),
        ("/v1/messages/count_tokens", 400, "model is required"),
    ],
)
@pytest.mark.parametrize("missing", [{}, {"model": None}, {"model": ""}])
def test_a_missing_model_is_refused_in_the_words_of_the_endpoint(
    path: str, status: int, sentence: str, missing: dict[str, object]
):
    body = {key: value for key, value in GOOD[path].items() if key != "model"} | missing
    error = refusal(path, body)
    assert (error.status, error.message) == (status, sentence)


WRONG_NAMES = ["a b", "a\nb", "a\r\nX-Evil: 1", "a\x00b", "\u200bm", "a\u202eb", "x" * 201]
WRONG_NAMES += ["../../etc/passwd", "a/../b", "<script>", 'a"b', "a'b", "a;b", "a%00", "{m}", "a\\b"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_name_that_is_no_name_is_refused(path: str, name: str):
    error = refusal(path, GOOD[path] | {"model": name})
    assert (error.status, error.message) == (400, "invalid model name")


@pytest.mark.parametrize(
    "name", ["мистраль:7b", "千问/模型:最新", "مثال", "naïve-ü", "hf.co/a/b-GGUF:Q4_K_M", "名" * 200]
)
@pytest.mark.parametrize("path", PATHS)
def test_a_name_in_any_script_is_taken_as_it_was_written(path: str, name: str):
    assert parse(path, GOOD[path] | {"model": name}).asked == (name,)


WRONG_TYPES = [7, 1.5, True, [], ["m"], {}, {"a": 1}]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", WRONG_TYPES)
def test_a_model_that_is_no_string_is_refused(path: str, value: object):
    error = refusal(path, GOOD[path] | {"model": value})
    assert error.status == 400
    assert error.message.startswith("'model' must be a string, not ")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", ["true", 1, 0, [], {}])
def test_a_stream_that_is_no_boolean_is_refused(path: str, value: object):
    error = refusal(path, GOOD[path] | {"stream": value})
    assert error.status == 400
    assert "'stream'" in error.message


#: path, field, values that are wrong there
WRONG_FIELDS: list[tuple[str, str, list[object]]] = [
    ("/v1/chat/completions", "messages", ["hi", 7, {}, None, ["hi"], [None], [[]]]),
    ("/v1/chat/completions", "tools", ["x", {}, 7, ["x"]]),
    ("/v1/completions", "prompt", [7, {}, True, None, [None], ["a", None], [1.5], [True]]),
    ("/v1/completions", "suffix", [7, [], {}]),
    ("/v1/embeddings", "input", [7, {}, True, None, [None], ["a", False], [1.5]]),
    ("/api/chat", "messages", ["hi", 7, {}, ["hi"], [None], [{"content": 7}], [{"content": []}]]),
    ("/api/chat", "messages", [[{"content": "x", "images": "aGk="}], [{"content": "x", "images": [7]}]]),
    ("/api/chat", "tools", ["x", {}, 7, ["x"]]),
    ("/api/chat", "options", ["x", [], 7]),
    ("/api/generate", "prompt", [7, [], {}, True]),
    ("/api/generate", "system", [7, [], {}]),
    ("/api/generate", "images", ["aGk=", 7, [7], [None]]),
    ("/api/generate", "options", ["x", [], 7]),
    ("/api/embed", "input", [7, {}, True, [7], [None], [[1, 2]]]),
    ("/api/embeddings", "prompt", [7, [], {}, True]),
    ("/api/show", "verbose", ["x", 7, []]),
    ("/v1/responses", "input", [7, {}, True, None, [None], ["hi"], [{"content": 7}], [{"content": [7]}]]),
    ("/v1/responses", "instructions", [7, [], {}]),
    ("/v1/responses", "tools", ["x", {}, 7, ["x"]]),
    ("/v1/responses", "text", ["x", [], 7]),
    ("/v1/rerank", "query", [7, [], {}, None]),
    ("/v1/rerank", "documents", ["x", 7, {}, None, [], [7], [None], [{}], [{"text": 7}]]),
    ("/v1/rerank", "top_n", ["x", [], 1.5, -1, True]),
    ("/v1/images/generations", "prompt", [7, [], {}, None, ""]),
    ("/v1/images/generations", "n", ["x", [], 1.5, True]),
    ("/v1/images/generations", "size", [7, [], {}]),
    ("/v1/messages", "messages", ["hi", 7, {}, [], None, ["hi"], [None], [{"role": "user"}]]),
    ("/v1/messages", "messages", [[{"role": 7, "content": "x"}], [{"role": "user", "content": 7}]]),
    ("/v1/messages", "messages", [[{"role": "user", "content": [7]}], [{"role": "user", "content": [{}]}]]),
    ("/v1/messages", "tools", ["x", {}, 7, ["x"]]),
    ("/v1/messages", "system", [7, {}, [7], [{}], [{"type": "text", "text": 7}]]),
    ("/v1/messages", "max_tokens", ["5", 0, -1, 1.5, True, []]),
    ("/v1/messages", "temperature", ["1", [], {}, True]),
    ("/v1/messages", "top_p", ["1", []]),
    ("/v1/messages", "top_k", ["1", 1.5]),
    ("/v1/messages", "stop_sequences", ["x", [7], {}]),
    ("/v1/messages", "tool_choice", ["auto", []]),
    ("/v1/messages", "thinking", [True, "enabled", []]),
    ("/v1/messages", "metadata", ["x", []]),
    ("/v1/messages/count_tokens", "messages", ["hi", [], None]),
]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [(path, field, value) for path, field, values in WRONG_FIELDS for value in values],
)
def test_a_field_of_the_wrong_type_is_refused_in_a_sentence_that_names_it(
    path: str, field: str, value: object
):
    error = refusal(path, GOOD[path] | {field: value})
    assert error.status == 400
    inside = ("content", "images", "input type", "role")
    assert f"'{field}'" in error.message or any(word in error.message for word in inside)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_a_message_may_say_nothing(path: str):
    body = GOOD[path] | {"messages": [{"role": "assistant", "content": None}, {"role": "user"}]}
    assert len(parse(path, body).prefixes) == 2


@pytest.mark.parametrize("content", [7, True, {}, [7], ["hi"]])
def test_an_openai_message_has_text_or_parts(content: object):
    error = refusal(
        "/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": content}]}
    )
    assert "'content'" in error.message


def test_ollama_takes_a_request_without_anything_to_say():
    for path, body in {"/api/chat": {}, "/api/generate": {}, "/api/embed": {}, "/api/embeddings": {}}.items():
        assert parse(path, body | {"model": "m"}).asked == ("m",)


def test_show_with_an_old_name_beside_a_model_in_capitals_is_refused():
    """Ollama would read the second."""
    assert refusal("/api/show", b'{"name": "m", "MODEL": "n"}').message == "model is required"


def test_show_takes_the_old_name_of_the_field():
    parsed = parse("/api/show", b'{"name": "m"}')
    assert parsed.asked == ("m",)
    assert parsed.model_key == "name"
    assert span_of("/api/show", b'{"name": "m"}') == (9, 12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("twice", ["MODEL", "Model", "mOdEl", "model", "\\u006dodel", "\\u004dODEL"])
def test_a_second_model_in_any_spelling_is_refused(path: str, twice: str):
    rest = orjson.dumps({k: v for k, v in GOOD[path].items() if k != "model"})[1:]
    rest = b"," + rest if rest != b"}" else rest
    error = refusal(path, b'{"model":"m","' + twice.encode() + b'":"n"' + rest)
    assert error.status == 400
    assert "more than one field 'model'" in error.message


def test_a_second_model_further_inside_is_nobodys_business():
    body = GOOD["/api/chat"] | {"options": {"MODEL": "x"}, "metadata": {"model": "y"}}
    assert parse("/api/chat", body).asked == ("m",)


@pytest.mark.parametrize("path", GENERATING)
def test_the_span_of_the_model_is_its_bytes_in_the_body(path: str):
    for raw in (b'{ "model" : "a\\u002fb" ,', b'{"x":{"model":"z"},"model":"a/b",', b'{"model":"a/b",'):
        body = raw + orjson.dumps(GOOD[path] | {"model": "a"}).replace(b'"model":"a",', b"")[1:]
        parsed = parse(path, body)
        assert parsed.asked == ("a/b",)
        span = span_of(path, body)
        assert span is not None
        assert orjson.loads(body[slice(*span)]) == "a/b"


@pytest.mark.parametrize("path", PATHS)
def test_fallback_models_make_a_chain(path: str):
    assert parse(path, GOOD[path] | {"fallback_models": ["n", "M"]}).asked == ("m", "n", "M")
    for nothing in (None, []):
        assert parse(path, GOOD[path] | {"fallback_models": nothing}).asked == ("m",)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", ["n", 7, {}, [7], [None], [["n"]], ["a b"], [""], ["n"] * 17])
def test_fallback_models_that_are_no_list_of_names_are_refused(path: str, value: object):
    assert refusal(path, GOOD[path] | {"fallback_models": value}).status == 400


@pytest.mark.parametrize("path", PATHS)
def test_fallback_says_which_other_models_may_serve(path: str):
    for value, meant in ((None, "default"), (True, "default"), (False, "none"), ("loaded", "loaded")):
        assert parse(path, GOOD[path] | {"fallback": value}).fallback == meant
    assert parse(path, GOOD[path]).fallback == "default"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [0, 1, "", "Loaded", "true", [], {}, ["loaded"], 0.0])
def test_a_fallback_of_another_kind_is_refused_by_name(path: str, value: object):
    error = refusal(path, GOOD[path] | {"fallback": value})
    assert (error.status, "'fallback'" in error.message) == (400, True)


@pytest.mark.parametrize("fallback", [None, "loaded", False])
@pytest.mark.parametrize(
    ("path", "more", "meant"),
    [
        ("/api/chat", {"messages": []}, "none"),
        ("/api/chat", {"messages": None, "keep_alive": 0}, "none"),
        ("/api/generate", {"prompt": ""}, "none"),
        ("/api/generate", {"prompt": "", "keep_alive": 0}, "none"),
        *[("/api/chat", {"keep_alive": zero}, "chain") for zero in (0, 0.0, "0", "0s", "-0m0.0s")],
        ("/api/generate", {"raw": True}, "chain"),
        ("/api/generate", {"context": [1, 2]}, "chain"),
        ("/api/generate", {"template": "{{ .Prompt }}"}, "chain"),
        ("/api/generate", {"suffix": "}"}, "chain"),
        *[("/api/chat", {"keep_alive": some}, "default") for some in (None, -1, "5m", "10", "x", False, "")],
        ("/api/generate", {"raw": False, "context": [], "template": "", "suffix": None}, "default"),
    ],
)
def test_what_means_one_model_is_not_for_any_other(
    path: str, more: dict[str, object], meant: str, fallback: object
):
    asked = {None: "default", "loaded": "loaded", False: "none"}[fallback]  # type: ignore[index]
    found = parse(path, GOOD[path] | more | {"fallback": fallback}).fallback
    assert found == ("none" if asked == "none" else asked if meant == "default" else meant)


@pytest.mark.parametrize(
    ("think", "needed"),
    [(True, True), ("low", True), ("max", True), (False, False), (None, False), ("x", False), (1, False)],
)
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_thoughts_that_are_asked_for_need_a_model_that_thinks(path: str, think: object, needed: bool):
    assert ("thinking" in parse(path, GOOD[path] | {"think": think}).needs) is needed


@pytest.mark.parametrize("path", PATHS)
def test_who_is_behind_it_is_read_in_every_dialect(path: str):
    ids = {"metadata": {"user_id": "u-" + 300 * "x"}}
    assert parse(path, GOOD[path] | {"user": "anna"} | ids).user == "anna"
    assert parse(path, GOOD[path] | ids).user == ("u-" + 300 * "x")[:256]
    for nobody in ({"user": 7}, {"user": ""}, {"metadata": {"user_id": 7}}, {}):
        assert parse(path, GOOD[path] | nobody).user is None


def test_tags_come_from_the_metadata_and_never_stop_a_request():
    def tags(metadata: object) -> tuple[str, ...]:
        return parse("/v1/chat/completions", GOOD["/v1/chat/completions"] | {"metadata": metadata}).tags

    assert tags({"tags": ["a", "b"]}) == ("a", "b")
    assert tags({"tags": "a, b"}) == ("a", "b")
    assert tags({"tags": ["x" * 100] * 20}) == ("x" * 64,) * 16
    for odd in ({"tags": [7, None, "", {}]}, {"tags": 7}, {}, "x", 7, None, []):
        assert tags(odd) == ()


@pytest.mark.parametrize("field", ["n_discard", "id_slot", "slot_save_path", "slot_restore_path"])
@pytest.mark.parametrize("path", GENERATING)
def test_fields_that_reach_into_a_nodes_slots_are_refused(path: str, field: str):
    assert f"'{field}'" in refusal(path, GOOD[path] | {field: 1}).message
    if path.startswith("/api"):
        assert f"'{field}'" in refusal(path, GOOD[path] | {"options": {field: 1}}).message


@pytest.mark.parametrize(
    ("path", "stream", "expected"),
    [
        ("/v1/chat/completions", None, False),
        ("/v1/chat/completions", True, True),
        ("/v1/completions", None, False),
        ("/v1/embeddings", True, False),
        ("/api/chat", None, True),
        ("/api/chat", False, False),
        ("/api/generate", None, True),
        ("/api/generate", False, False),
        ("/api/embed", True, False),
        ("/api/embeddings", None, False),
        ("/api/show", True, False),
        ("/v1/responses", None, False),
        ("/v1/responses", True, True),
        ("/v1/rerank", True, False),
        ("/v1/images/generations", True, False),
        ("/v1/messages", None, False),
        ("/v1/messages", True, True),
        ("/v1/messages/count_tokens", True, False),
    ],
)
def test_each_endpoint_streams_by_its_own_default(path: str, stream: bool | None, expected: bool):
    body = GOOD[path] if stream is None else GOOD[path] | {"stream": stream}
    assert parse(path, body).stream is expected


def test_what_the_planner_must_know_is_read():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    parsed = parse(
        "/v1/chat/completions",
        {
            "model": "m",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 360}, image]}],
            "tools": [tool],
            "max_tokens": 9,
            "max_completion_tokens": 7,
            "user": "u" * 300,
        },
    )
    assert parsed.needs == {"completion", "tools", "vision"}
    assert (parsed.max_tokens, parsed.buffered, parsed.user) == (7, True, "u" * 256)
    assert 700 < parsed.est_tokens < 750  # 360 bytes of text and a tool at 3.6 bytes a token, and an image

    body = {"model": "m", "messages": [{"content": "x", "images": ["aGk="]}], "format": "json"}
    ollama = parse("/api/chat", body | {"options": {"num_predict": 5, "num_ctx": 2048}})
    assert ollama.needs == {"completion", "vision"}
    assert (ollama.max_tokens, ollama.wanted_context_tokens, ollama.buffered) == (5, 2048, True)
    assert parse("/api/embed", {"model": "m", "input": ["x"] * 3}).max_tokens == 1


@pytest.mark.parametrize("value", [-1, 0, True, "5", 1.5, None, [], {}])
def test_a_limit_that_limits_nothing_is_none(value: object):
    assert parse("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": value}).max_tokens is None
    body = {"model": "m", "prompt": "x", "options": {"num_predict": value}}
    assert parse("/api/generate", body).max_tokens is None


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (2048, 2048),
        (2048.9, 2048),
        (3, 4),
        (0, 4),
        (-1, 4),
        (None, None),
        (True, None),
        ("9", None),
        ([], None),
    ],
)
def test_num_ctx_is_read_as_ollama_reads_it(value: object, wanted: int | None):
    options = {"num_ctx": value}
    parsed = parse("/api/generate", {"model": "m", "prompt": "x", "options": options})
    assert parsed.wanted_context_tokens == wanted
    openai = {"model": "m", "prompt": "x", "options": {**options, "num_gpu": 3}}
    parsed = parse("/v1/completions", openai)
    assert (parsed.wanted_context_tokens, parsed.load_options) == (None, ())


def test_options_that_decide_about_a_load_are_known_by_name_and_type():
    options = {
        "num_gpu": 20,
        "use_mmap": True,
        "num_thread": "8",
        "num_batch": True,
        "main_gpu": None,
        "seed": 1,
    }
    parsed = parse("/api/chat", {"model": "m", "options": options})
    assert parsed.load_options == (("num_gpu", 20), ("use_mmap", True))
    every = dict.fromkeys(LOAD_OPTIONS, 1) | {"use_mmap": False}
    parsed = parse("/api/chat", {"model": "m", "options": every})
    assert {"num_ctx", *dict(parsed.load_options)} == set(LOAD_OPTIONS)  # the agent's own list


def test_text_that_is_not_ascii_counts_more_tokens():
    latin = parse("/api/generate", {"model": "m", "prompt": "a" * 360}).est_tokens
    thai = parse("/api/generate", {"model": "m", "prompt": "ก" * 120}).est_tokens
    assert (latin, thai) == (100.0, 180.0)


def test_equal_beginnings_have_equal_prefix_marks():
    def marks(*texts: str) -> list[bytes]:
        messages = [{"role": "user", "content": text} for text in texts]
        return [mark.digest for mark in parse("/api/chat", {"model": "m", "messages": messages}).prefixes]

    assert marks("a", "b", "c")[:2] == marks("a", "b")
    assert marks("a", "b")[-1] != marks("ab")[-1]
    assert marks("a", "b")[-1] != marks("a", "x")[-1]
    long = "x" * 70_000
    assert marks(long + "a") != marks(long + "b")


@pytest.mark.parametrize("depth", [300, 1000])
@pytest.mark.parametrize("path", GENERATING)
def test_a_deep_value_that_must_be_counted_is_taken_or_refused_and_no_more(path: str, depth: int):
    deep = b"[" * depth + b"]" * depth
    key = b'"tools":[{"x":' + deep + b"}]"
    if "completions" in path and "chat" not in path:
        key = b'"prompt":' + deep
    if path == "/api/generate":
        key = b'"format":{"x":' + deep + b"}"
    body = orjson.dumps({k: v for k, v in GOOD[path].items() if k != "prompt"})
    assert refusal(path, body[:-1] + b"," + key + b"}").status == 400


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
_FIELDS = (
    "model",
    "messages",
    "prompt",
    "input",
    "stream",
    "tools",
    "options",
    "fallback_models",
    "fallback",
    "metadata",
)
_FIELDS += ("query", "documents", "instructions", "thinking", "stop_sequences", "tool_choice", "text")
_FIELDS += ("images", "format", "suffix", "system", "name", "response_format", "max_tokens", "user")


@given(
    route=st.sampled_from(ROUTES),
    changed=st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=4),
)
def test_any_json_is_understood_or_refused_in_one_sentence(route: Route, changed: dict[str, object]):
    body = orjson.dumps(GOOD[route.path] | changed)
    refused: ApiError | None = None
    try:
        dialect_of(route).parse(route, body)
    except ApiError as error:
        refused = error
    assert refused is None or (refused.message and 400 <= refused.status < 500)


@given(route=st.sampled_from(ROUTES), body=st.binary(max_size=60))
def test_any_bytes_are_refused_in_one_sentence(route: Route, body: bytes):
    with pytest.raises(ApiError):
        dialect_of(route).parse(route, body)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize(
    "more", ['"STREAM": true', '"stream": false, "Stream": true', '"\\u0053tream": true']
)
def test_a_stream_in_other_letters_is_refused(path: str, more: str) -> None:
    """Go reads it as `stream`, others do not: the answer would be another one than was expected."""
    body = orjson.dumps(GOOD[path])[:-1] + b", " + more.encode() + b"}"
    with pytest.raises(BadRequest, match="'stream'"):
        parse(path, body)
