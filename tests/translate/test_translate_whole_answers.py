"""Embeddings, show and errors: answers that are one body."""

from __future__ import annotations

import math

import orjson
import pytest

from herd_node.translate import (
    Answer,
    Call,
    ModelFacts,
    honest_error,
    model_digest,
    reclassify,
    translate,
    translate_error,
)
from herd_node.translate.moments import Stamps, rfc3339
from herd_node.translate.show import human_number
from tests.fakes.recordings import recording

FACTS = ModelFacts(
    name="emb", upstream_id="emb-id", context_tokens=512, capabilities=frozenset({"embedding"})
)


def call(path: str, **fields: object) -> Call:
    made = translate(path, orjson.dumps({"model": "Asked", **fields}), FACTS)
    assert isinstance(made, Call)
    assert (made.path, made.sse, made.stream) == ("/v1/embeddings", False, False)
    return made


def answered(path: str, name: str, **fields: object) -> tuple[int, dict]:
    recorded = recording(f"llamacpp/{name}")
    status, body = call(path, **fields).reader.whole(recorded.status, recorded.body, elapsed_s=0.25)
    return status, orjson.loads(body)


@pytest.mark.parametrize(("given", "sent"), [("a", ["a"]), (["a", "b"], ["a", "b"])])
def test_inputs_are_always_sent_as_a_list(given: object, sent: list[str]) -> None:
    body = orjson.loads(call("/api/embed", input=given, truncate=True, keep_alive="5m").body)
    assert body == {"model": "emb-id", "input": sent, "encoding_format": "float"}


def test_two_inputs_become_ollamas_shape() -> None:
    status, ours = answered("/api/embed", "embeddings-two", input=["hello", "world"])
    theirs = orjson.loads(recording("ollama/embed-two").body)
    del theirs["load_duration"]
    assert status == 200
    assert list(ours) == list(theirs)
    assert (ours["model"], ours["total_duration"], ours["prompt_eval_count"]) == ("Asked", 250_000_000, 2)
    for mine, yours in zip(ours["embeddings"], theirs["embeddings"], strict=True):
        assert mine == pytest.approx(yours, abs=1e-5)  # the same weights


def test_fewer_dimensions_are_cut_and_normalised_again() -> None:
    _, ours = answered("/api/embed", "embeddings", input="hello", dimensions=8)
    theirs = orjson.loads(recording("ollama/embed-dimensions").body)
    assert ours["embeddings"][0] == pytest.approx(theirs["embeddings"][0], abs=1e-5)


@pytest.mark.parametrize("dimensions", [0, -1, 576, 10_000])
def test_dimensions_that_cut_nothing_change_nothing(dimensions: int) -> None:
    _, ours = answered("/api/embed", "embeddings", input="hello", dimensions=dimensions)
    assert len(ours["embeddings"][0]) == 576
    assert math.fsum(x * x for x in ours["embeddings"][0]) == pytest.approx(1, abs=1e-4)


def test_a_vector_that_is_zero_where_it_is_cut_stays_zero() -> None:
    body = b'{"data":[{"index":0,"embedding":[0.0,0.0,1.0]}],"usage":{"prompt_tokens":1}}'
    _, out = call("/api/embed", input="x", dimensions=2).reader.whole(200, body, elapsed_s=0.1)
    assert orjson.loads(out)["embeddings"] == [[0.0, 0.0]]


def test_vectors_come_in_the_order_of_the_inputs() -> None:
    rows = b'{"index":1,"embedding":[1.0]},{"index":0,"embedding":[2.0]}'
    body = b'{"data":[' + rows + b'],"usage":{"prompt_tokens":2}}'
    _, out = call("/api/embed", input=["x", "y"]).reader.whole(200, body, elapsed_s=0.1)
    assert orjson.loads(out)["embeddings"] == [[2.0], [1.0]]


def test_the_older_path_answers_with_one_vector_and_nothing_else() -> None:
    made = call("/api/embeddings", prompt="hello", options={"temperature": None})
    assert orjson.loads(made.body)["input"] == ["hello"]
    recorded = recording("llamacpp/embeddings")
    _, body = made.reader.whole(200, recorded.body, elapsed_s=0.1)
    ours, theirs = orjson.loads(body), orjson.loads(recording("ollama/embeddings").body)
    assert list(ours) == list(theirs)
    assert len(ours["embedding"]) == len(theirs["embedding"])


@pytest.mark.parametrize("given", [{}, {"input": None}, {"input": ""}, {"input": []}])
def test_nothing_to_embed_is_answered_here(given: dict) -> None:
    answer = translate("/api/embed", orjson.dumps({"model": "smol-embed", **given}), FACTS)
    assert isinstance(answer, Answer)
    assert answer.body == recording("ollama/embed-empty-list").body
    legacy = translate("/api/embeddings", b'{"model":"m"}', FACTS)
    assert isinstance(legacy, Answer)
    assert legacy.body == b'{"embedding":[]}'


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"data":[]}', b'{"data":[{"index":0}],"usage":{}}', b"<html>"]
)
def test_an_answer_without_vectors_is_the_backends_failure(body: bytes) -> None:
    status, out = call("/api/embed", input="x").reader.whole(200, body, elapsed_s=0.1)
    assert status == 502
    assert "error" in orjson.loads(out)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("embeddings-too-long", 400, "the input length exceeds the context length"),
        ("embeddings-empty", 400, "Input content cannot be empty"),
        (
            "embeddings-not-enabled",
            400,
            "This server does not support embeddings. Start it with `--embeddings`",
        ),
        ("chat-loading-503", 503, "Loading model"),
        ("apikey-missing", 401, "Invalid API Key"),
    ],
)
def test_a_failed_embedding_says_why(name: str, status: int, message: str) -> None:
    assert answered("/api/embed", name, input="x") == (status, {"error": message})


# ---- errors


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("err-bad-json", 400),
        ("err-empty-body", 400),
        ("chat-image-unsupported", 400),
        ("embeddings-too-long", 400),
        ("embeddings-not-enabled", 400),
        ("err-bad-type", 400),
        ("err-bad-schema", 400),
        ("err-ctx-exceeded", 400),
        ("chat-loading-503", 503),
        ("err-404", 404),
        ("apikey-missing", 401),
    ],
)
def test_llama_servers_500s_that_are_the_callers_mistake_become_400(name: str, status: int) -> None:
    recorded = recording(f"llamacpp/{name}")
    assert reclassify("llama-server", recorded.status, recorded.body) == status


@pytest.mark.parametrize(
    "message",
    [
        "Failed to parse tools: Expected 'tools' to be an array, got 7; tools = 7",
        "Failed to parse messages: Missing 'role' in message: {}",
        "'messages' is required",
    ],
)
def test_further_mistakes_seen_on_the_real_server_become_400(message: str) -> None:
    body = orjson.dumps({"error": {"code": 500, "message": message, "type": "server_error"}})
    assert reclassify("llama-server", 500, body) == 400


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("err-option-type", 400),
        ("chat-format-bad", 400),
        ("generate-template-bad", 400),
        ("embed-chat-model", 400),
        ("embeddings-chat-model", 400),
        ("jinja-chat-image", 400),
        ("queue-full", 503),
        ("chat-think-bad", 400),
        ("err-unknown-model-chat", 404),
    ],
)
def test_ollamas_500s_that_are_the_callers_mistake_become_400(name: str, status: int) -> None:
    recorded = recording(f"ollama/{name}")
    assert reclassify("ollama", recorded.status, recorded.body) == status


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("llama-server", "llamacpp/embeddings-too-long", {"code": 400, "type": "invalid_request_error"}),
        ("llama-server", "llamacpp/embeddings-not-enabled", {"code": 400, "type": "invalid_request_error"}),
        ("llama-server", "llamacpp/chat-loading-503", {"code": 503, "type": "unavailable_error"}),
        ("llama-server", "llamacpp/err-ctx-exceeded", {"code": 400, "type": "exceed_context_size_error"}),
    ],
)
def test_a_body_says_the_status_that_it_has(kind: str, name: str, said: dict) -> None:
    recorded = recording(name)
    status, body = honest_error(kind, recorded.status, recorded.body)
    ours, theirs = orjson.loads(body)["error"], orjson.loads(recorded.body)["error"]
    assert (status, {key: ours[key] for key in said}) == (said["code"], said)
    assert (list(ours), ours["message"]) == (list(theirs), theirs["message"])
    assert (body == recorded.body) is (status == recorded.status)


def test_in_ollamas_dialect_only_the_status_changes() -> None:
    recorded = recording("ollama/err-option-type")
    assert honest_error("ollama", recorded.status, recorded.body) == (400, recorded.body)
    openai = (
        b'{"error":{"message":"option \\"seed\\" must be of type integer","type":"api_error","code":null}}'
    )
    status, body = honest_error("ollama", 500, openai)
    assert (status, orjson.loads(body)["error"]["type"]) == (400, "invalid_request_error")


def test_an_embedding_that_is_too_long_is_the_callers_mistake_on_the_older_path_too() -> None:
    body = b'{"error":"the input length exceeds the context length"}'
    assert honest_error("ollama", 500, body) == (400, body)


@pytest.mark.parametrize(
    "error",
    [
        "llama-server process has terminated: exit status 3: error: something bad",
        "llama-server process has terminated: the engine is not supported here",
        "error starting llama-server: llama-server binary not found",
        "invalid file magic",
    ],
)
def test_a_failing_node_stays_a_failing_node(error: str) -> None:
    assert reclassify("ollama", 500, orjson.dumps({"error": error})) == 500
    assert reclassify("llama-server", 500, b'{"error":{"code":500,"message":"out of memory"}}') == 500


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'{"error":7}', b"\xff\xfe", b"x" * 5000])
def test_an_error_body_of_any_shape_is_read(body: bytes) -> None:
    for kind in ("ollama", "llama-server", "llama-router", "openai"):
        assert reclassify(kind, 500, body) == 500
    status, message = translate_error(500, body, "/v1/chat/completions")
    assert status == 500
    assert message


def test_a_server_that_is_not_known_keeps_its_status() -> None:
    recorded = recording("llamacpp/err-bad-json")
    assert reclassify("openai", recorded.status, recorded.body) == 500


def test_a_model_that_llama_servers_router_does_not_know_is_404() -> None:
    recorded = recording("llamacpp/router-chat-unknown-model")
    wanted = (404, "model 'no-such-model' not found")
    assert translate_error(recorded.status, recorded.body, "/v1/chat/completions") == wanted


# ---- show


SHOWN = ModelFacts(
    name="smollm2:135m",
    upstream_id="smollm2:135m",
    context_tokens=4096,
    context_train_tokens=8192,
    slots=2,
    size_bytes=96_576_768,
    parameters=134_515_008,
    quantisation="Q4_1",
    embedding_length=576,
    capabilities=frozenset({"completion", "embedding"}),
    created_s=1795302044.0,
    chat_template="{{ messages }}",
)


def shown(facts: ModelFacts, **fields: object) -> dict:
    answer = translate("/api/show", orjson.dumps(fields or {"model": "x"}), facts)
    assert isinstance(answer, Answer)
    assert (answer.status, answer.content_type) == (200, b"application/json; charset=utf-8")
    return orjson.loads(answer.body)


def test_show_has_the_fields_of_ollamas_in_their_order() -> None:
    ours, theirs = shown(SHOWN), orjson.loads(recording("ollama/show").body)
    assert list(ours) == [key for key in theirs if key != "tensors"]
    assert {key: type(value) for key, value in ours.items()} == {key: type(theirs[key]) for key in ours}
    assert list(ours["details"]) == list(theirs["details"])
    assert ours["details"]["parameter_size"] == theirs["details"]["parameter_size"]


def test_show_tells_both_contexts_and_the_capabilities() -> None:
    ours = shown(SHOWN, name="smollm2:135m", verbose=True)
    architecture = ours["model_info"]["general.architecture"]
    assert ours["model_info"][f"{architecture}.context_length"] == 8192
    assert ours["model_info"]["general.parameter_count"] == 134_515_008
    assert ours["parameters"] == "num_ctx                        4096"
    assert ours["capabilities"] == ["completion", "embedding"]
    assert ours["modified_at"] == "2026-11-21T23:00:44Z"


def test_what_is_not_known_is_not_shown() -> None:
    ours = shown(ModelFacts(name="m", upstream_id="m"))
    assert ours["model_info"] == {"general.architecture": "llamacpp"}
    assert not {"parameters", "template"} & ours.keys()


def test_a_server_of_the_openai_dialect_is_shown_as_such() -> None:
    able = frozenset({"completion", "vision"})
    ours = shown(
        ModelFacts(name="m", upstream_id="m", flavour="openai", context_tokens=4096, capabilities=able)
    )
    assert (ours["details"]["family"], ours["details"]["format"]) == ("openai", "")
    assert ours["model_info"] == {"general.architecture": "openai", "openai.context_length": 4096}
    assert ours["capabilities"] == ["completion", "vision"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (134_515_008, "134.52M"),
        (8_030_261_248, "8.0B"),
        (7_000_000_000, "7B"),
        (2_000_000, "2M"),
        (1500, "2K"),
        (12, "12"),
    ],
)
def test_numbers_are_rounded_as_ollama_rounds_them(count: int, text: str) -> None:
    assert human_number(count) == text


def test_digests_differ_between_models_and_stay_the_same() -> None:
    digests = {model_digest("a", 1), model_digest("a", 2), model_digest("b", 1), model_digest("b", None)}
    assert len(digests) == 4
    assert model_digest("a", 1) in digests


@pytest.mark.parametrize(
    ("wall_s", "text"),
    [
        (0.0, "1970-01-01T00:00:00Z"),
        (1795403355.25, "2026-11-23T03:09:15.25Z"),
        (0.5, "1970-01-01T00:00:00.5Z"),
    ],
)
def test_times_are_written_as_go_writes_them(wall_s: float, text: str) -> None:
    assert rfc3339(wall_s) == text


def test_times_of_many_lines_are_those_of_each() -> None:
    stamps, times_s = Stamps(), [0.0, 0.5, 1.25, 1.25, 0.5, 1795403355.25]
    assert [stamps.rfc3339(wall_s) for wall_s in times_s] == [rfc3339(wall_s) for wall_s in times_s]
