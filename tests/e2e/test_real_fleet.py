"""A router, two agents and two real llama.cpp servers, used through real clients."""

from __future__ import annotations

import json
import shutil
import subprocess

import anthropic
import ollama
import openai
import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.kit import Fleet, until

pytestmark = [pytest.mark.e2e, pytest.mark.llama, pytest.mark.slow]

ASK = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture
def openai_client(real_fleet: Fleet):
    with openai.OpenAI(base_url=f"{real_fleet.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ollama_client(real_fleet: Fleet):
    with ollama.Client(host=real_fleet.url) as client:
        yield client


def test_the_openai_client_streams_a_chat(openai_client: openai.OpenAI) -> None:
    stream = openai_client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, max_tokens=12, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_the_openai_client_gets_a_whole_chat_and_sees_who_served_it(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.with_raw_response.create(model=MODEL, messages=ASK, max_tokens=8)
    assert answer.parse().choices[0].message.content
    assert answer.headers["x-fleet-node"] in ("a", "b")
    assert answer.headers["x-fleet-model"] == MODEL
    assert answer.headers["x-fleet-attempts"] == "1"
    assert float(answer.headers["x-fleet-score"]) <= 110
    assert len(answer.headers["x-request-id"]) == 24


def test_the_openai_client_gets_completions_and_embeddings(openai_client: openai.OpenAI) -> None:
    assert openai_client.completions.create(model=MODEL, prompt="The sky is", max_tokens=4).choices[0].text
    vectors = openai_client.embeddings.create(model=MODEL, input=["one", "two"]).data
    assert [len(vector.embedding) for vector in vectors] == [576, 576]


def test_the_openai_client_lists_and_retrieves_models(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == [MODEL]
    assert openai_client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("owner/absent")


def test_the_anthropic_client_talks_counts_and_is_refused_on_a_llama_cpp_node(real_fleet: Fleet) -> None:
    with anthropic.Anthropic(base_url=real_fleet.url, api_key="none", max_retries=0) as client:
        whole = client.messages.with_raw_response.create(
            model=MODEL, max_tokens=6, messages=ASK, system="Be brief.", extra_body={"temperature": 0}
        )
        message = whole.parse()
        assert (message.type, message.content[0].type, message.stop_reason) == (
            "message",
            "text",
            "max_tokens",
        )
        assert (message.model, whole.headers["x-fleet-model"]) == (MODEL, MODEL)
        with client.messages.stream(model=MODEL, max_tokens=6, messages=ASK) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert (final.content[0].text, final.usage.output_tokens) == (text, 6)
        counted = client.messages.with_raw_response.count_tokens(model=MODEL, messages=ASK)
        usage = final.usage
        assert counted.parse().input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        assert "x-fleet-estimated" not in counted.headers
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="absent", max_tokens=6, messages=ASK)
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(
                model=MODEL, max_tokens=6, messages=ASK, tools=[{"name": "f", "input_schema": {}}]
            )


def test_the_openai_client_responds_on_a_llama_cpp_node(openai_client: openai.OpenAI) -> None:
    response = openai_client.responses.create(model=MODEL, input="Name a colour.", max_output_tokens=6)
    assert response.output_text
    events = list(openai_client.responses.create(model=MODEL, input="Hi", max_output_tokens=6, stream=True))
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta")
    with pytest.raises(openai.APIStatusError) as lacking:
        openai_client.images.generate(model=MODEL, prompt="a tree")
    assert lacking.value.status_code == 501


def test_the_ollama_client_streams_a_chat_on_a_llama_cpp_node(ollama_client: ollama.Client) -> None:
    lines = list(ollama_client.chat(MODEL, messages=ASK, stream=True, options={"num_predict": 10}))
    assert "".join(line.message.content or "" for line in lines)
    assert lines[-1].done
    assert lines[-1].eval_count
    assert lines[-1].prompt_eval_duration


def test_the_ollama_client_generates_embeds_and_shows(ollama_client: ollama.Client) -> None:
    answer = ollama_client.generate(MODEL, prompt="The sky is", options={"num_predict": 4})
    assert answer.response
    assert answer.model == MODEL
    assert len(ollama_client.embed(MODEL, input="one").embeddings[0]) == 576
    assert len(ollama_client.embeddings(MODEL, prompt="one").embedding) == 576
    assert "completion" in (ollama_client.show(MODEL).capabilities or [])


def test_the_ollama_client_lists_models_and_what_is_loaded(ollama_client: ollama.Client) -> None:
    assert [model.model for model in ollama_client.list().models] == [MODEL]
    assert [model.model for model in ollama_client.ps().models] == [MODEL]


def test_an_answer_with_a_schema_is_json(ollama_client: ollama.Client) -> None:
    colour = {"type": "string", "enum": ["red", "green", "blue"]}
    schema = {"type": "object", "properties": {"colour": colour}, "required": ["colour"]}
    answer = ollama_client.chat(
        MODEL, messages=ASK, format=schema, options={"num_predict": 60, "temperature": 0}
    )
    assert "colour" in json.loads(answer.message.content or "")


def test_an_unknown_model_is_a_404_in_both_dialects(
    openai_client: openai.OpenAI, ollama_client: ollama.Client
) -> None:
    with pytest.raises(openai.NotFoundError) as as_openai:
        openai_client.chat.completions.create(model="absent", messages=ASK)
    assert as_openai.value.code == "model_not_found"
    with pytest.raises(ollama.ResponseError) as as_ollama:
        ollama_client.chat("absent", messages=ASK)
    assert as_ollama.value.status_code == 404
    assert as_ollama.value.error == "model 'absent' not found"


def test_a_fallback_model_serves_and_is_shown(real_fleet: Fleet) -> None:
    body = {"model": "absent", "fallback_models": [MODEL], "messages": ASK, "max_tokens": 4}
    status, headers, _ = real_fleet.post("/v1/chat/completions", body)
    assert status == 200
    assert headers["x-fleet-model"] == MODEL
    assert headers["x-fleet-fallback"] == "absent"


def test_explain_shows_seven_signals_of_both_nodes(real_fleet: Fleet) -> None:
    real_fleet.post("/v1/chat/completions", {"model": MODEL, "messages": ASK, "max_tokens": 2})
    rows = json.loads(real_fleet.command("explain", "last", "--json").stdout)
    text = real_fleet.command("explain", "last").stdout
    for signal in ("thermal", "memory", "queue", "wait", "role", "trend", "context"):
        assert signal in text.lower()
    assert json.dumps(rows).count('"thermal"') >= 1


def test_the_two_statements_of_the_documentation_run_in_sqlite3(real_fleet: Fleet) -> None:
    program = shutil.which("sqlite3")
    if program is None:
        pytest.skip("the sqlite3 program is not installed")
    for statement in (
        "SELECT request_id, model, node_id, score, scores_breakdown FROM request_traces "
        "ORDER BY timestamp DESC LIMIT 1",
        "SELECT node_id, model, COUNT(*) n, ROUND(AVG(latency_ms)/1000.0,1), "
        "ROUND(AVG(COALESCE(completion_tokens,0)*1000.0/NULLIF(latency_ms,0)),1) FROM request_traces "
        "WHERE status='completed' GROUP BY node_id, model HAVING n > 0",
    ):
        database = str(real_fleet.data_dir / "latency.db")
        done = subprocess.run([program, database, statement], capture_output=True, text=True, check=True)
        assert MODEL in done.stdout


def test_a_stream_that_the_client_leaves_frees_its_slot(real_fleet: Fleet) -> None:
    client = openai.OpenAI(base_url=f"{real_fleet.url}/v1", api_key="none", max_retries=0)
    with (
        client,
        client.chat.completions.create(model=MODEL, messages=ASK, stream=True, max_tokens=2000) as stream,
    ):
        next(iter(stream))
    until(lambda: real_fleet.get("/fleet/status")["fleet"]["requests_active"] == 0, "the slot to be free")
    newest = until(lambda: _newest(real_fleet, "client_gone"), "the trace of the client that left")
    assert newest["status"] == "client_gone"


def _newest(fleet: Fleet, status: str) -> dict[str, object] | None:
    return next((row for row in fleet.traces(5) if row["status"] == status), None)
