"""/api/generate with text of the caller's own: raw, suffix, template, context. Question by question."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import orjson
import pytest

from herd_node.protocol.framing import Records
from herd_node.translate import Answer, Call, ModelFacts, Question, Refusal, translate
from tests.fakes.recordings import recording

PLAIN = ModelFacts(name="smol", upstream_id="the-id", context_tokens=1024)
THINKS = dataclasses.replace(PLAIN, capabilities=frozenset({"completion", "thinking"}))
OPENAI = dataclasses.replace(THINKS, flavour="openai", context_tokens=None)
WALL_S = 1795403355.25


def made(facts: ModelFacts = PLAIN, **fields: object) -> Call | Answer | Question[Call | Answer]:
    return translate("/api/generate", orjson.dumps({"model": "Asked", **fields}), facts)


def call(facts: ModelFacts = PLAIN, **fields: object) -> Call:
    result = made(facts, **fields)
    assert isinstance(result, Call)
    return result


def sent(facts: ModelFacts = PLAIN, **fields: object) -> tuple[str, dict]:
    upstream = call(facts, **fields)
    return upstream.path, orjson.loads(upstream.body)


def answered(question: object, answers: Mapping[str, object], status: int = 200) -> tuple[object, list[dict]]:
    """What becomes of a question when the backend answers by path; and what it was asked."""
    asked = []
    while isinstance(question, Question):
        asked.append(orjson.loads(question.body))
        question = question.then(status, orjson.dumps(answers[question.path]))
    return question, asked


def refusal(facts: ModelFacts = PLAIN, **fields: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        made(facts, **fields)
    return caught.value


def native(text: str, **more: object) -> bytes:
    return orjson.dumps({"index": 0, "content": text, "stop": False, **more})


LAST = orjson.dumps({"index": 0, "content": "", "stop": True, "stop_type": "eos"})


def said(upstream: Call, payloads: list[bytes], tokens: object = None) -> list[dict]:
    """The lines of an answer, with the backend's answer to the question at its end."""
    reader = upstream.reader
    out = b"".join(reader.feed(payload, wall_s=WALL_S, elapsed_s=0.5) for payload in payloads)
    answers = {"/tokenize": {"tokens": tokens}, "/apply-template": {"prompt": "<user>x<assistant>"}}
    answered(reader.question(), answers)
    out += reader.end(elapsed_s=0.5, wall_s=WALL_S)
    return [orjson.loads(line) for line in out.splitlines()]


# ---- raw


def test_a_raw_prompt_goes_to_completion_as_it_is() -> None:
    path, body = sent(
        prompt="The sky is", raw=True, options={"temperature": 0, "num_predict": 8, "stop": ["."]}
    )
    wanted = {"model": "the-id", "stream": True, "prompt": "The sky is", "temperature": 0, "top_p": 0.9}
    assert path == "/completion"
    assert wanted.items() <= body.items()
    assert (body["n_predict"], body["stop"], body["min_p"]) == (8, ["."], 0)
    assert "messages" not in body


@pytest.mark.parametrize("stream", [True, False])
def test_a_native_stream_has_ollamas_shape_byte_by_byte(stream: bool) -> None:
    body = recording("llamacpp/completion-native-stream").body
    records, upstream = Records("sse"), call(prompt="The sky is", raw=True, stream=stream)
    payloads = [payload for at in range(len(body)) for payload in records.feed(body[at : at + 1])]
    lines = said(upstream, payloads)
    theirs = orjson.loads(recording("ollama/generate-raw").body)
    del theirs["load_duration"]
    assert list(lines[-1]) == list(theirs)
    assert {line["model"] for line in lines} == {"Asked"}
    assert "".join(line["response"] for line in lines)
    assert lines[-1]["done_reason"] == "length"
    assert len(lines) == (lines[-1]["eval_count"] + 1 if stream else 1)


@pytest.mark.parametrize("more", [{"system": "x"}, {"template": "x"}, {"context": [1]}])
def test_raw_goes_with_nothing_that_needs_a_template(more: dict) -> None:
    refused = refusal(prompt="x", raw=True, **more)
    assert {"error": refused.message} == orjson.loads(recording("ollama/generate-context-raw").body)
    assert refused.status == 400


def test_a_raw_prompt_that_is_cut_off_is_never_complete() -> None:
    upstream = call(prompt="x", raw=True)
    upstream.reader.feed(native("a"), wall_s=0, elapsed_s=0)
    assert upstream.reader.question() is None
    with pytest.raises(Exception, match="without a finish"):
        upstream.reader.end(elapsed_s=0, wall_s=0)


@pytest.mark.parametrize("wanted", ["json", {"type": "object"}])
def test_a_format_is_a_schema_of_the_native_path(wanted: object) -> None:
    assert sent(prompt="x", raw=True, format=wanted)[1]["json_schema"] == {"type": "object"}


# ---- suffix


def test_a_suffix_goes_to_infill_with_both_sides() -> None:
    path, body = sent(prompt="def f(", suffix="return", options={"num_predict": 4})
    assert path == "/infill"
    assert (body["input_prefix"], body["input_suffix"], body["n_predict"]) == ("def f(", "return", 4)


def test_a_model_that_cannot_fill_in_is_named_as_ollama_names_it() -> None:
    recorded, theirs = recording("llamacpp/infill-no-fim"), recording("ollama/generate-suffix-unsupported")
    body = orjson.loads(theirs.request_body)
    upstream = translate("/api/generate", theirs.request_body, PLAIN)
    assert isinstance(upstream, Call)
    assert body["suffix"] == "end"
    assert upstream.reader.whole(recorded.status, recorded.body, elapsed_s=0) == (400, theirs.body)


# ---- template


def test_a_template_of_the_callers_makes_the_prompt() -> None:
    request = orjson.loads(recording("ollama/generate-system-template").request_body)
    upstream = translate("/api/generate", orjson.dumps(request), PLAIN)
    assert isinstance(upstream, Call)
    assert (upstream.path, orjson.loads(upstream.body)["prompt"]) == ("/completion", "Be brief. The sky is")


def test_a_broken_template_is_refused_in_ollamas_words() -> None:
    recorded = recording("ollama/generate-template-bad")
    with pytest.raises(Refusal) as caught:
        translate("/api/generate", recorded.request_body, PLAIN)
    assert (caught.value.status, {"error": caught.value.message}) == (400, orjson.loads(recorded.body))


# ---- context


CONTEXT = {"prompt": "And?", "context": [1, 2, 3]}


def test_a_context_becomes_text_again_before_what_is_new() -> None:
    answers = {"/detokenize": {"content": "<before>"}, "/apply-template": {"prompt": "<user>And?<assistant>"}}
    upstream, asked = answered(made(system="Be brief.", **CONTEXT), answers)
    assert isinstance(upstream, Call)
    assert upstream.path == "/completion"
    assert orjson.loads(upstream.body)["prompt"] == "<before><user>And?<assistant>"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"}]
    assert asked == [{"model": "the-id", "tokens": [1, 2, 3]}, {"model": "the-id", "messages": messages}]


def test_a_context_goes_with_a_template_too() -> None:
    upstream, _ = answered(
        made(template="[{{ .Prompt }}]", **CONTEXT), {"/detokenize": {"content": "<before>"}}
    )
    assert isinstance(upstream, Call)
    assert orjson.loads(upstream.body)["prompt"] == "<before>[And?]"


@pytest.mark.parametrize(
    ("status", "answer"), [(500, {"error": {"message": "vector::_M_range_check"}}), (200, {})]
)
def test_tokens_that_the_model_does_not_have_are_the_callers_mistake(status: int, answer: dict) -> None:
    with pytest.raises(Refusal) as caught:
        answered(made(**CONTEXT), {"/detokenize": answer}, status)
    assert (caught.value.status, "tokens that this model does not have" in caught.value.message) == (
        400,
        True,
    )


@pytest.mark.parametrize("token", ["x", 1.5, True, None, [1]])
def test_a_context_of_anything_but_numbers_is_refused(token: object) -> None:
    refused = refusal(prompt="x", context=[1, token])
    assert refused.status == 400
    assert "Go struct field GenerateRequest.context of type int" in refused.message


def test_the_last_line_holds_the_context_for_the_next_turn() -> None:
    upstream = call(prompt="x", system="s")
    chunk = b'{"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":%s}]}'
    payloads = [chunk % (b"a", b"null"), chunk % (b"", b'"stop"'), b"[DONE]"]
    reader = upstream.reader
    out = b"".join(reader.feed(payload, wall_s=WALL_S, elapsed_s=0.5) for payload in payloads)
    assert b'"done":true' not in out
    question = reader.question()
    answers = {"/apply-template": {"prompt": "<s><x>"}, "/tokenize": {"tokens": [7, 8]}}
    _, asked = answered(question, answers)
    assert asked[0]["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]
    assert asked[1] == {
        "model": "the-id",
        "content": "<s><x>a",
        "add_special": False,
        "parse_special": True,
    }
    last = orjson.loads(reader.end(elapsed_s=0.5, wall_s=WALL_S))
    assert last["context"] == [7, 8]
    theirs = list(orjson.loads(recording("ollama/generate").body))
    assert [key for key in last if key in theirs] == [key for key in theirs if key in last]


@pytest.mark.parametrize(
    "answers", [{"/apply-template": {}}, {"/apply-template": {"prompt": "x"}, "/tokenize": {}}]
)
def test_a_context_that_cannot_be_had_is_left_out(answers: dict) -> None:
    reader = call(prompt="x").reader
    reader.feed(b'{"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}', wall_s=0, elapsed_s=0)
    answered(reader.question(), answers)
    assert b"context" not in reader.end(elapsed_s=0, wall_s=0)


def test_nobody_asks_for_the_context_of_a_raw_prompt_or_of_images_or_of_an_error() -> None:
    for upstream in (call(prompt="x", raw=True), call(prompt="x", suffix="y")):
        upstream.reader.feed(LAST, wall_s=0, elapsed_s=0)
        assert upstream.reader.question() is None
    failed = call(prompt="x").reader
    failed.feed(b'{"error":{"code":500,"message":"oops"}}', wall_s=0, elapsed_s=0)
    assert failed.question() is None


# ---- thoughts, log probabilities, images


@pytest.mark.parametrize("think", [None, True, "low"])
@pytest.mark.parametrize("stream", [True, False])
def test_thoughts_in_plain_text_stand_beside_the_answer(think: object, stream: bool) -> None:
    upstream = call(THINKS, prompt="x", raw=True, think=think, stream=stream)
    lines = said(upstream, [native("<thi"), native("nk>\nhm"), native("\n</think>\n\nyes"), LAST])
    assert "".join(line.get("thinking", "") for line in lines) == "hm"
    assert "".join(line["response"] for line in lines) == "yes"


def test_without_thinking_the_text_stays_as_it_is() -> None:
    for facts, think in ((THINKS, False), (PLAIN, None)):
        lines = said(call(facts, prompt="x", raw=True, think=think), [native("<think>a</think>b"), LAST])
        assert "".join(line["response"] for line in lines) == "<think>a</think>b"


def test_what_was_held_back_goes_out_at_the_end() -> None:
    lines = said(call(THINKS, prompt="x", template="{{ .Prompt }}"), [native("<thi"), LAST], [1])
    assert [line["response"] for line in lines] == ["<thi", ""]
    assert lines[-1]["context"] == [1]


@pytest.mark.parametrize(("top", "n_probs"), [(0, 1), (3, 3)])
def test_log_probabilities_of_the_native_path_have_ollamas_shape(top: int, n_probs: int) -> None:
    upstream = call(prompt="x", raw=True, logprobs=True, top_logprobs=top)
    assert orjson.loads(upstream.body)["n_probs"] == n_probs
    entry = {"id": 9, "token": "a", "bytes": [97], "logprob": -0.5}
    event = native("a", completion_probabilities=[entry | {"top_logprobs": [entry] * n_probs}])
    first, last = said(upstream, [event, LAST])
    plain = {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert first["logprobs"] == [plain | ({"top_logprobs": [plain] * top} if top else {})]
    assert "logprobs" not in last


@pytest.mark.parametrize("more", [{"raw": True}, {"suffix": "y"}, {"template": "z"}, {"context": [1]}])
def test_images_do_not_go_with_text_of_the_callers_own(more: dict) -> None:
    refused = refusal(prompt="x", images=["AAAA"], **more)
    assert (refused.status, refused.message.startswith('"images" do not go with')) == (400, True)


@pytest.mark.parametrize("more", [{"raw": True}, {"suffix": "y"}, {"template": "z"}, {"context": [1]}])
def test_without_a_prompt_it_is_a_load_whatever_else_is_there(more: dict) -> None:
    assert isinstance(made(prompt="", **more), Answer)


# ---- servers of the plain OpenAI dialect


def test_on_an_openai_server_text_goes_to_its_completions() -> None:
    path, body = sent(OPENAI, prompt="The sky is", raw=True, options={"num_predict": 5}, logprobs=True)
    assert path == "/v1/completions"
    assert body == {
        "model": "the-id",
        "stream": True,
        "prompt": "The sky is",
        "temperature": 0.8,
        "top_p": 0.9,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": 5,
        "stream_options": {"include_usage": True},
        "logprobs": 0,
    }
    path, body = sent(OPENAI, prompt="a", suffix="b", format="json")
    assert (path, body["prompt"], body["suffix"]) == ("/v1/completions", "a", "b")
    assert body["response_format"]["type"] == "json_schema"
    assert sent(OPENAI, prompt="a", template="<{{ .Prompt }}>")[1]["prompt"] == "<a>"


def test_on_an_openai_server_a_context_cannot_be_read() -> None:
    assert refusal(OPENAI, **CONTEXT).status == 400


def test_completions_of_an_openai_server_become_lines() -> None:
    upstream = call(OPENAI, prompt="x", raw=True, logprobs=True, top_logprobs=1)
    older = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}
    chunks = [
        {"choices": [{"text": "a", "index": 0, "logprobs": older, "finish_reason": None}]},
        {"choices": [{"text": "", "index": 0, "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
    ]
    first, last = said(upstream, [*map(orjson.dumps, chunks), b"[DONE]"])
    assert first["response"] == "a"
    assert first["logprobs"] == [
        {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5}]}
    ]
    assert (last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == ("length", 3, 1)
