"""The vendors' own Python clients: `anthropic`, and `openai` on what is not chat.

They stand for every program that is made with them: what they take for an answer, an error or an end, is one.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator

import anthropic
import openai
import pytest
import pytest_asyncio

from tests.router.kit import LLAMA, OLLAMA, TEXT, Fleet, Question, until

BOTH = pytest.mark.parametrize("model", [OLLAMA, LLAMA])
HI = [{"role": "user", "content": "hi"}]


@pytest_asyncio.fixture(loop_scope="session")
async def claude(fleet: Fleet) -> AsyncIterator[anthropic.AsyncAnthropic]:
    url = f"http://127.0.0.1:{fleet.router.port}"
    async with anthropic.AsyncAnthropic(base_url=url, api_key="sk-unused", max_retries=0) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="session")
async def gpt(fleet: Fleet) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://127.0.0.1:{fleet.router.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="sk-unused", max_retries=0) as client:
        yield client


@BOTH
async def test_anthropic_says_it_whole(claude: anthropic.AsyncAnthropic, model: str):
    message = await claude.messages.create(model=model, max_tokens=99, messages=HI, system="Be brief.")
    assert [(block.type, block.text) for block in message.content] == [("text", TEXT)]
    assert (message.model, message.stop_reason, message.usage.output_tokens) == (model, "end_turn", 8)


@BOTH
async def test_anthropic_streams(claude: anthropic.AsyncAnthropic, model: str):
    async with claude.messages.stream(model=model, max_tokens=3, messages=HI) as stream:
        pieces = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert pieces == ["t0000 ", "t0001 ", "t0002 "]
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 3)


@BOTH
async def test_anthropic_hears_of_a_stream_that_broke(
    fleet: Fleet, claude: anthropic.AsyncAnthropic, model: str
):
    fleet.fail_all(Question("anthropic", model, True), "fin_after_n", after=2)
    heard = []
    with pytest.raises(anthropic.APIStatusError, match="broke off"):
        async with claude.messages.stream(model=model, max_tokens=99, messages=HI) as stream:
            async for text in stream.text_stream:
                heard.append(text)
    assert heard == ["t0000 ", "t0001 "]


async def test_anthropic_counts_tokens(claude: anthropic.AsyncAnthropic):
    exact = await claude.messages.count_tokens(model=LLAMA, messages=HI)
    guess = await claude.messages.with_raw_response.count_tokens(model=OLLAMA, messages=HI)
    assert exact.input_tokens == 12
    assert guess.headers["x-fleet-estimated"] == "1"
    assert (await guess.parse()).input_tokens > 0


async def test_anthropic_lists_models(claude: anthropic.AsyncAnthropic):
    assert {OLLAMA, LLAMA} <= {model.id async for model in await claude.models.list()}
    assert (await claude.models.retrieve(OLLAMA)).id == OLLAMA


async def test_anthropic_knows_our_errors(fleet: Fleet, claude: anthropic.AsyncAnthropic):
    with pytest.raises(anthropic.NotFoundError) as missing:
        await claude.messages.create(model="nowhere:1", max_tokens=9, messages=HI)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="at least one message"):
        await claude.messages.create(model=OLLAMA, max_tokens=9, messages=[])
    tool = {"name": "f", "input_schema": {"type": "object"}}
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        await claude.messages.create(model=OLLAMA, max_tokens=9, messages=HI, tools=[tool])
    fleet.fail_all(Question("anthropic", OLLAMA, False), "queue_full")
    with pytest.raises(anthropic.APIStatusError) as busy:
        await claude.messages.create(model=OLLAMA, max_tokens=9, messages=HI)
    assert (busy.value.status_code, busy.value.body["error"]["type"]) == (529, "overloaded_error")


@BOTH
async def test_anthropic_leaves_in_the_middle(fleet: Fleet, claude: anthropic.AsyncAnthropic, model: str):
    for fake in fleet.fakes(model):
        await fake.control({"tokens": 100_000, "token_delay_s": 0.01})
    async with claude.messages.stream(model=model, max_tokens=99999, messages=HI) as stream:
        async for _ in stream.text_stream:
            break
    await until(lambda: fleet.live() == 0, "the backend to stop", patience_s=1.0)


@BOTH
async def test_openai_responds_whole_and_in_a_stream(gpt: openai.AsyncOpenAI, model: str):
    response = await gpt.responses.create(model=model, input="hi")
    assert (response.output_text, response.status, response.usage.output_tokens) == (TEXT, "completed", 8)
    kinds, text = [], ""
    async for event in await gpt.responses.create(model=model, input="hi", stream=True):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert (text, kinds[0], kinds[-1]) == (TEXT, "response.created", "response.completed")


@BOTH
async def test_openai_hears_of_a_response_that_broke(fleet: Fleet, gpt: openai.AsyncOpenAI, model: str):
    fleet.fail_all(Question("responses", model, True), "fin_after_n", after=2)
    heard, errors = "", []
    try:
        async for event in await gpt.responses.create(model=model, input="hi", stream=True):
            heard += event.delta if event.type == "response.output_text.delta" else ""
            errors += [event.message] if event.type == "error" else []
    except openai.APIError as error:
        errors.append(error.message)
    assert heard == "t0000 t0001 "
    assert len(errors) == 1
    assert "broke off" in errors[0]


async def test_openai_knows_our_errors(gpt: openai.AsyncOpenAI):
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        await gpt.responses.create(model=OLLAMA, input="hi", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        await gpt.responses.create(model="nowhere:1", input="hi")
    with pytest.raises(openai.APIStatusError) as lacking:
        await gpt.images.generate(model=OLLAMA, prompt="a tree")
    assert (lacking.value.status_code, lacking.value.code) == (501, "not_offered")


async def test_openai_sends_a_recording(gpt: openai.AsyncOpenAI):
    sound = io.BytesIO(bytes(3_000_000))
    said = await gpt.audio.transcriptions.create(model=OLLAMA, file=("a.wav", sound))
    assert said.text == "3000000 bytes"
    with pytest.raises(openai.NotFoundError):
        await gpt.audio.transcriptions.create(model="nowhere:1", file=("a.wav", b"x"))
