"""FLEET_AUTO_PULL: a model that nobody has is pulled for those who ask for it, once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from herd.request import Principal
from tests.router.kit import TEXT, Answer, Fleet, until

TINY = "127.0.0.1:5999/library/tiny"
NAMED = f"{TINY}:latest"
CHAT = {"model": TINY, "messages": [{"role": "user", "content": "hi"}], "stream": False}


@pytest_asyncio.fixture(loop_scope="session")
async def pulling(fleet: Fleet) -> AsyncIterator[Fleet]:
    """On for everybody; the registry says a size without being asked."""
    pulls = fleet.router.dispatcher.pulls
    before = {node_id: list(fake.dialect.models) for node_id, fake in fleet.ollama.items()}
    sizes = pulls._size_of

    async def size_of(_model: str) -> int:
        return 12_000_000

    pulls._mode, pulls._size_of = "on", size_of
    yield fleet
    for fake in fleet.ollama.values():
        fake.token_delay_s = 0.0
    await until(lambda: not pulls._running, "the pulls to end")
    pulls._mode, pulls._size_of = "off", sizes
    pulls._failed.clear()
    for node_id, fake in fleet.ollama.items():
        fake.dialect.models[:] = before[node_id]
    async with asyncio.timeout(15):
        while any("tiny" in model["name"] for model in (await fleet.get("/api/tags"))["models"]):
            await asyncio.sleep(0.1)


def holders(fleet: Fleet) -> list[str]:
    fakes = fleet.ollama.items()
    return [node_id for node_id, fake in fakes if any(m.name == NAMED for m in fake.dialect.models)]


async def test_while_it_is_off_the_404_says_how_to_get_the_model(fleet: Fleet):
    answer = await fleet.request("/v1/chat/completions", CHAT)
    assert answer.status == 404
    assert answer.error.endswith(f"get it with `herd pull {TINY}`, or set FLEET_AUTO_PULL")
    await fleet.check(answer)


async def test_how_far_a_pull_is_stands_in_the_log(pulling: Fleet, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="herd.proxy.managing"):
        answer = await pulling.request("/v1/chat/completions", CHAT)
    assert answer.status == 200
    said = [record.getMessage() for record in caplog.records]
    assert any(text.endswith(": 50 %") for text in said)
    assert not any(TINY in text for text in said)
    await pulling.check(answer)


async def test_a_missing_model_is_pulled_once_for_all_who_wait(pulling: Fleet):
    answers = await asyncio.gather(*(pulling.request("/v1/chat/completions", CHAT) for _ in range(5)))
    assert [(answer.status, answer.text) for answer in answers] == [(200, TEXT)] * 5
    assert len(holders(pulling)) == 1
    for answer in answers:
        assert answer.headers["x-fleet-node"] == holders(pulling)[0]
        [row] = await pulling.check(answer)
        assert row["status"] == "completed"


async def test_a_stream_is_kept_alive_meanwhile(pulling: Fleet):
    for fake in pulling.ollama.values():
        fake.token_delay_s = 0.02
    with pulling.deadlines(early_sent_s=0.1, ping_s=0.1):
        answer = await pulling.request("/v1/chat/completions", CHAT | {"stream": True})
    assert (answer.status, answer.text, answer.ends) == (200, TEXT, 1)
    assert answer.body.startswith(b": ping\n\n")
    await pulling.check(answer)


async def test_who_cannot_be_kept_alive_is_told_how_far_it_is(pulling: Fleet):
    for fake in pulling.ollama.values():
        fake.token_delay_s = 0.05
    with pulling.deadlines(pull_wait_s=0.5):
        answer = await pulling.request("/api/chat", CHAT)
    assert answer.status == 503
    assert "is being pulled to node" in answer.error
    assert "% so far" in answer.error
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    [row] = await pulling.rows(answer)
    assert row["status"] == "rejected"
    [pull] = (await pulling.status())["pulls"]
    assert pull["model"] == TINY
    for fake in pulling.ollama.values():
        fake.token_delay_s = 0.0
    again = await pulling.request("/api/chat", CHAT)  # it went on without its caller
    assert (again.status, again.text) == (200, TEXT)
    await pulling.check(again)


async def test_a_model_that_does_not_exist_is_a_404_and_is_not_tried_again_at_once(pulling: Fleet):
    asked: list[str] = []

    async def size_of(model: str) -> int:
        asked.append(model)
        return 12_000_000

    pulling.router.dispatcher.pulls._size_of = size_of
    body = CHAT | {"model": "127.0.0.1:5999/library/none"}
    answer = await pulling.request("/v1/chat/completions", body)
    assert (answer.status, "file does not exist" in answer.error) == (404, True)
    again = await pulling.request("/v1/chat/completions", body)
    assert (again.status, again.error) == (404, answer.error)
    assert len(asked) == 1


async def test_a_pull_that_fails_is_said_with_the_nodes_own_words(pulling: Fleet):
    answer = await pulling.request("/v1/chat/completions", CHAT | {"model": "nowhere-else"})
    assert (answer.status, "no such host" in answer.error) == (502, True)
    rows = await pulling.check(answer)
    assert rows[-1]["status"] == "rejected"


async def test_what_has_no_known_size_or_fits_nowhere_is_not_pulled(pulling: Fleet):
    pulls = pulling.router.dispatcher.pulls

    async def unknown(_model: str) -> None:
        return None

    async def huge(_model: str) -> int:
        return 10**15

    pulls._size_of = unknown
    answer = await pulling.request("/v1/chat/completions", CHAT)
    assert (answer.status, "its size is not known" in answer.error) == (404, True)
    pulls._failed.clear()
    pulls._size_of = huge
    answer = await pulling.request("/v1/chat/completions", CHAT)
    assert (answer.status, "no node has the memory and the disk" in answer.error) == (501, True)
    assert holders(pulling) == []


async def test_who_leaves_does_not_end_the_pull(pulling: Fleet):
    for fake in pulling.ollama.values():
        fake.token_delay_s = 0.02
    call = await pulling.begin("/v1/chat/completions", CHAT)
    await until(lambda: list(pulling.router.models.pulls), "the pull to begin")
    call.hang_up()
    [row] = await pulling.check(call.answer)
    assert row["status"] == "client_gone"
    await until(lambda: holders(pulling), "the model to be there")
    await until(lambda: not list(pulling.router.models.pulls), "the pull to end")


async def test_a_look_at_a_model_pulls_nothing(pulling: Fleet):
    answer = await pulling.request("/api/show", {"model": TINY})
    assert (answer.status, holders(pulling)) == (404, [])
    assert not pulling.router.dispatcher.pulls._running


async def test_trusted_means_this_machine(pulling: Fleet):
    pulls = pulling.router.dispatcher.pulls
    pulls._mode = "trusted"
    assert pulls.allows(Principal("loopback", "::1", "::1"))
    assert not pulls.allows(Principal("lan", "10.0.0.9", "10.0.0.9"))
    assert not pulls.allows(None)


def told(answer: Answer) -> list[str]:
    """The reasoning of a stream's records, one by one."""
    found = []
    for record in answer.records:
        if not isinstance(record, dict):
            continue
        for choice in record.get("choices") or ():
            found.append(choice["delta"].get("reasoning_content"))
        found.append((record.get("message") or {}).get("thinking") or record.get("thinking"))
    return [text for text in found if text]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/api/chat", CHAT | {"stream": True}),
        ("/api/generate", {"model": TINY, "prompt": "hi"}),
    ],
)
async def test_who_wants_to_know_is_told_what_it_waits_for(pulling: Fleet, path: str, body: dict[str, Any]):
    for fake in pulling.ollama.values():
        fake.token_delay_s = 0.02
    with pulling.deadlines(progress_s=0.1):
        answer = await pulling.request(path, body, headers={"X-Fleet-Progress": "1"})
    assert (answer.status, answer.text, answer.ends) == (200, TEXT, 1)
    said = told(answer)
    assert any("is pulling" in text and "%" in text for text in said)
    await pulling.check(answer)


async def test_a_place_in_the_queue_is_told(fleet: Fleet):
    body = CHAT | {"model": "only-a:1", "stream": True}
    for fake in fleet.fakes("only-a:1"):
        fake.fault("slow_tokens", path="/v1/chat/completions", delay_s=0.15, count=None)
    calls = [await fleet.begin("/v1/chat/completions", body) for _ in range(4)]
    await until(lambda: fleet.live() == 4, "all slots to be taken")
    with fleet.deadlines(progress_s=0.1):
        answer = await fleet.request("/v1/chat/completions", body, headers={"X-Fleet-Progress": "1"})
    assert (answer.status, answer.text, answer.ends) == (200, TEXT, 1)
    assert told(answer)[0].startswith("Waiting for a free slot: number 1 of 1, about ")
    assert any("is at work on the prompt" in text for text in told(answer))
    for call in calls:
        await call.head()
        await call.rest()
    for call in calls:
        await fleet.check(call.answer)
    await fleet.check(answer)
