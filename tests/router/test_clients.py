"""Callers that leave, read slowly or talk badly; the node that is lost; the end of the router."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sqlite3
from typing import Any
from urllib.parse import unquote

import pytest

from tests.fakes.backend import FakeBackend
from tests.fakes.model import FakeModel
from tests.router.kit import (
    LLAMA,
    OLLAMA,
    QUESTIONS,
    STREAMS,
    TEXT,
    Answer,
    Call,
    Fleet,
    Question,
    running,
    settings,
    until,
)
from tests.router.test_faults_before_content import one_of

from herd.app import Router  # isort: skip


async def left(fleet: Fleet, call: Call) -> list[dict[str, Any]]:
    """The client hangs up: within a second nothing runs for it any more, and its row says why."""
    call.hang_up()
    await until(lambda: not fleet.router.dispatcher.live, "the router to notice", patience_s=1.0)
    rows = await fleet.check(call.answer)
    assert rows[-1]["status"] == "client_gone"
    return rows


@one_of(*[question for question in QUESTIONS if str(question) != "openai-l-whole"])
async def test_f54_a_caller_who_leaves_before_the_first_word_stops_the_work(fleet: Fleet, question: Question):
    fleet.fail_all(question, "slow_tokens", delay_s=30)
    call = await fleet.begin(question.path, question.body)
    await until(lambda: fleet.live() == 1, "the generation to run")
    [row] = await left(fleet, call)
    assert row["node_id"] in ("a", "b")
    assert sum(fake.counters.aborted for fake in fleet.fakes(question.model)) == 1
    # in_flight is 0 at once, but the slot settles: the backend finishes the batch in work
    assert sum(node["settling"] for node in (await fleet.status())["nodes"]) >= 1


async def test_a_slot_settles_until_the_backend_is_seen_idle(fleet: Fleet):
    """A llama-server may go on with the prompt in work although its client has left."""
    question = Question("openai", LLAMA, False)
    fleet.fail_all(question, "deaf")
    fleet.fail_all(question, "slow_tokens", delay_s=0.1)

    def settling() -> int:
        rows = fleet.router.registry.nodes_for_status(fleet.router.clock.now_s())
        return sum(row.settling for row in rows)

    await until(lambda: settling() == 0, "earlier slots to settle", patience_s=20)
    call = await fleet.begin(question.path, question.body)
    await until(lambda: fleet.live() == 1, "the generation to run")
    call.hang_up()
    await until(lambda: settling() == 1, "the router to notice")
    status = await fleet.status()
    assert (status["fleet"]["requests_active"], fleet.live()) == (0, 1)
    while fleet.live():
        assert settling() == 1
        await asyncio.sleep(0.02)
    await until(lambda: settling() == 0, "the slot to be free", patience_s=5)
    await fleet.check(call.answer)


@one_of(*STREAMS)
async def test_f54_a_caller_who_leaves_in_the_middle_stops_the_work(fleet: Fleet, question: Question):
    for fake in fleet.fakes(question.model):
        await fake.control({"tokens": 100_000, "token_delay_s": 0.01})
    call = await fleet.begin(question.path, question.body)
    await call.head()
    for _ in range(3):
        await call.piece()
    before = sum(node["settling"] for node in (await fleet.status())["nodes"])
    [row] = await left(fleet, call)
    assert row["time_to_first_token_ms"] is not None
    assert sum(fake.counters.aborted for fake in fleet.fakes(question.model)) == 1
    assert sum(node["settling"] for node in (await fleet.status())["nodes"]) <= before


async def test_f54_a_caller_who_leaves_the_queue_leaves_nothing_behind(fleet: Fleet):
    question = Question("openai", "only-a:1", True)
    fleet.fail_all(question, "slow_tokens", delay_s=30)
    running_calls = [await fleet.begin(question.path, question.body) for _ in range(4)]
    await until(lambda: fleet.live() == 4, "all slots to be taken")
    waiting = await fleet.begin(question.path, question.body)
    await until(lambda: len(fleet.router.room) == 1, "one to wait")
    status = await fleet.status()
    assert status["queues"]["only-a:1"]["waiting"] == status["fleet"]["requests_waiting"] == 1
    assert [node["waiting"] for node in status["nodes"]] == [1, 0]
    assert (status["nodes"][0]["in_flight"], status["fleet"]["requests_active"]) == (4, 4)
    waiting.hang_up()
    await until(lambda: len(fleet.router.room) == 0, "the queue to be empty", patience_s=1.0)
    assert fleet.requests(question) == 4
    for call in running_calls:
        call.hang_up()
    for call in (waiting, *running_calls):
        [row] = await fleet.check(call.answer)
        assert row["status"] == "client_gone"
        assert (row["node_id"] is None) is (call is waiting)


async def test_the_next_in_the_queue_is_sent_when_a_slot_is_freed(fleet: Fleet):
    """Late binding: nothing waits at a node."""
    question = Question("ollama", "only-a:1", True)
    fake = fleet.ollama["a"]
    await fake.control({"token_delay_s": 0.02})
    answers = await asyncio.gather(*(fleet.ask(question) for _ in range(10)))
    assert [(answer.status, answer.text) for answer in answers] == [(200, TEXT)] * 10
    assert (fake.counters.max_live, fake.counters.requests) == (4, 10)
    rows = [(await fleet.check(answer))[0] for answer in answers]
    assert sum(row["queue_ms"] > 50 for row in rows) >= 4


async def test_a_wait_that_is_too_long_ends_in_503(fleet: Fleet):
    question = Question("ollama", "only-a:1", True)
    fleet.fail_all(question, "slow_tokens", delay_s=30)
    running_calls = [await fleet.begin(question.path, question.body) for _ in range(4)]
    await until(lambda: fleet.live() == 4, "all slots to be taken")
    answer = await fleet.ask(question)  # the settings of this fleet: 2 s
    assert (answer.status, "stayed busy" in answer.error) == (503, True)
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-fleet-attempts"] == "0"
    for call in running_calls:
        call.hang_up()
    [row] = await fleet.check(answer)
    assert (row["status"], row["node_id"]) == ("rejected", None)
    for call in running_calls:
        await fleet.check(call.answer)


async def test_f54_a_caller_who_leaves_while_it_is_held_leaves_nothing_behind(fleet: Fleet):
    question = QUESTIONS[0]
    fleet.fail_all(question, "queue_full")
    call = await fleet.begin(question.path, question.body)
    await until(lambda: len(fleet.router.room) == 1 and fleet.requests(question) == 2, "it to be held")
    rows = await left(fleet, call)
    assert [row["status"] for row in rows] == ["retried", "client_gone"]
    assert [row["node_id"] is not None for row in rows] == [True, True]


@one_of(*[question for question in STREAMS if question.model == OLLAMA])
async def test_f55_a_caller_who_does_not_read_is_dropped(fleet: Fleet, question: Question):
    for fake in fleet.fakes(question.model):
        await fake.control({"tokens": 60_000})
    loop = asyncio.get_running_loop()
    asked_as = f"slow-{question}"
    body = json.dumps(question.body).encode()
    lines = [f"POST {question.path} HTTP/1.1", "Host: x", f"X-Request-Id: {asked_as}"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode()
    with socket.socket() as raw, fleet.deadlines(write_s=0.4):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        await loop.sock_connect(raw, ("127.0.0.1", fleet.router.port))
        await loop.sock_sendall(raw, head + body)
        await until(lambda: fleet.live() == 1, "the generation to run")
        await until(lambda: not fleet.router.dispatcher.live, "the caller to be dropped")
        await until(lambda: fleet.live() == 0, "the backend to stop", patience_s=1.0)
    # what was made is what the buffers took
    assert sum(fake.counters.tokens for fake in fleet.fakes(question.model)) < 60_000
    [row] = await fleet.rows(Answer(0, {}, asked_as=asked_as))
    assert row["status"] == "client_gone"


async def raw_answers(fleet: Fleet, sent: bytes, *, until_closed: bool = True) -> bytes:
    reader, writer = await fleet.connect()
    writer.write(sent)
    got = b""
    try:
        async with asyncio.timeout(5):
            while piece := await reader.read(65536):
                got += piece
                if not until_closed and got.endswith((b"0\r\n\r\n", b"}")):
                    break
    except TimeoutError:
        got += b"<silence>"
    except ConnectionError:
        got += b"<reset>"
    writer.transport.abort()
    return got


def chat(fleet: Fleet, *fields: str, body: bytes | None = None, framing: str | None = None) -> bytes:
    data = body if body is not None else json.dumps(QUESTIONS[1].body).encode()
    framing = framing if framing is not None else f"Content-Length: {len(data)}"
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", framing, *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


async def test_f58_pipelined_requests_are_answered_one_after_the_other(fleet: Fleet):
    got = await raw_answers(fleet, chat(fleet) + chat(fleet, "Connection: close"))
    assert got.count(b"HTTP/1.1 200 OK") == 2
    assert got.count(TEXT.encode()) == 2
    assert fleet.requests(QUESTIONS[1]) == 2


@pytest.mark.parametrize("framing", ["length", "chunked", "expect"])
async def test_a_connection_serves_on_whatever_was_answered(fleet: Fleet, framing: str):
    """Good and bad ones in turn, in each way to send a body; the lane takes some of them, ASGI the others."""
    reader, writer = await fleet.connect()
    good, bad = json.dumps(QUESTIONS[1].body).encode(), b'{"model": 7}'
    for body, status in ((good, 200), (bad, 400), (good, 200), (bad, 400), (good, 200)):
        if framing == "chunked":
            pieces = b"".join(b"%x\r\n%b\r\n" % (1, body[at : at + 1]) for at in range(len(body)))
            writer.write(chat(fleet, body=pieces + b"0\r\n\r\n", framing="Transfer-Encoding: chunked"))
        elif framing == "expect":
            writer.write(
                chat(fleet, "Expect: 100-continue", body=b"", framing=f"Content-Length: {len(body)}")
            )
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
        else:
            writer.write(chat(fleet, body=body))
        call = Call(reader, writer, "")
        answer = await call.head()
        answer.body = await reader.readexactly(int(answer.headers["content-length"]))
        assert answer.status == status
        assert answer.text == TEXT if status == 200 else "model" in answer.error
    writer.transport.abort()


async def test_a_client_of_http_1_0_gets_a_stream_without_chunks(fleet: Fleet):
    body = json.dumps(QUESTIONS[0].body).encode()
    head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    got = await raw_answers(fleet, head.encode() + body)
    head, _, rest = got.partition(b"\r\n\r\n")
    assert b" 200 " in head.partition(b"\r\n")[0]
    assert b"chunked" not in head.lower()
    assert rest.startswith(b"data: ")
    assert rest.endswith(b"data: [DONE]\n\n")


SMUGGLED = [
    (
        "both",
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"0\r\n\r\nGET /fleet/status HTTP/1.1\r\nHost: x\r\n\r\n",
    ),
    ("two lengths", "Content-Length: 5\r\nContent-Length: 6", b"hello"),
    ("a sign", "Content-Length: +5", b"hello"),
    ("no number", "Content-Length: five", b"hello"),
    ("negative", "Content-Length: -1", b""),
    ("coding", "Transfer-Encoding: chunked, identity", b"5\r\nhello\r\n0\r\n\r\n"),
    ("chunk size", "Transfer-Encoding: chunked", b"zz\r\nhello\r\n0\r\n\r\n"),
    ("space", "Content-Length : 5", b"hello"),
    ("folded", "X-A: b\r\n c: d\r\nContent-Length: 5", b"hello"),
]


@pytest.mark.parametrize(("_name", "framing", "data"), SMUGGLED, ids=[row[0] for row in SMUGGLED])
async def test_f58_a_request_with_two_readings_is_none(fleet: Fleet, _name: str, framing: str, data: bytes):
    got = await raw_answers(fleet, chat(fleet, body=data, framing=framing))
    assert b" 200 " not in got.partition(b"\r\n")[0]
    assert b" 500 " not in got.partition(b"\r\n")[0]
    assert b'"nodes"' not in got
    assert fleet.requests(QUESTIONS[1]) == 0


async def test_f58_line_breaks_in_a_model_name_reach_nobody(fleet: Fleet):
    for path, body in [(question.path, question.body) for question in QUESTIONS]:
        answer = await fleet.request(path, body | {"model": "o:1\r\nX-Evil: yes"})
        assert (answer.status, answer.error) == (400, "invalid model name")
        assert "x-evil" not in answer.headers
    assert sum(fake.counters.requests for fake in fleet.all_fakes) == 0


async def test_what_belongs_between_caller_and_router_goes_no_further(fleet: Fleet):
    secret = {
        "Authorization": "Bearer s",
        "Cookie": "a=b",
        "Origin": "http://evil",
        "X-Herd-Auth": "1 x",
        "TE": "x",
    }
    question = QUESTIONS[1]
    answer = await fleet.request(question.path, question.body, headers={**secret, "Accept": "text/x-mine"})
    assert answer.status == 200
    fake = next(fake for fake in fleet.fakes(question.model) if fake.counters.last)
    seen = fake.counters.last[-1]["headers"]
    assert not {"authorization", "cookie", "origin", "x-herd-auth", "te"} & seen.keys()
    assert (seen["accept"], seen["host"]) == ("text/x-mine", f"127.0.0.1:{fake.port}")
    assert json.loads(fake.counters.last[-1]["body"]) == question.body
    assert seen["x-request-id"] == answer.headers["x-request-id"]


@pytest.mark.slow
async def test_f59_a_model_in_any_script_is_served(fleet: Fleet):
    """A third node, with its own Ollama; then it is killed."""
    names = ["мистраль:7b", "千问:最新", "naïve 100%".replace(" ", "-").replace("%", "٪") + ":1"]
    models = [FakeModel(name, loaded=True) for name in names]
    async with FakeBackend(kind="ollama", models=models, slots=4, max_loaded=8) as fake:
        process = await fleet.start_agent("c", fake.url)
        try:
            await fleet.online("c")
            for name in names:
                for dialect, stream in (
                    ("openai", True),
                    ("ollama", True),
                    ("openai", False),
                    ("ollama", False),
                ):
                    answer = await fleet.ask(Question(dialect, name, stream))
                    assert (answer.status, answer.text) == (200, TEXT), answer
                    shown = answer.headers["x-fleet-model"]
                    assert shown.isascii()
                    assert unquote(shown) == name
                answer = await fleet.ask(Question("openai", name, False), fallback_models=[OLLAMA])
                assert answer.headers["x-fleet-node"] == "c"
            answer = await fleet.ask(Question("openai", "nowhere:名", True), fallback_models=[names[1]])
            assert unquote(answer.headers["x-fleet-fallback"]) == "nowhere:名"
            listed = (await fleet.get("/api/tags"))["models"]
            assert {model["name"] for model in listed} >= set(names)

            # F01: the node is gone, its beats are not late yet: the next model of the chain is used
            process.kill()
            await process.wait()
            answer = await fleet.ask(Question("openai", names[0], True), fallback_models=[OLLAMA])
            assert (answer.status, answer.text, answer.headers["x-fleet-attempts"]) == (200, TEXT, "2")
            first, second = await fleet.check(answer)
            assert (first["node_id"], first["status"], second["model"]) == ("c", "retried", OLLAMA)
            assert "cannot be reached" in first["error_message"]
            node = next(node for node in (await fleet.status())["nodes"] if node["node_id"] == "c")
            assert (node["status"], "unreachable" in node["reason"]) == ("offline", True)
            # alone: held, then refused
            answer = await fleet.ask(Question("ollama", names[0], True))
            assert (answer.status, answer.headers["x-fleet-attempts"]) == (503, "0")
            # offline models are not listed
            listed = (await fleet.get("/api/tags"))["models"]
            assert not {model["name"] for model in listed} & set(names)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def test_f44_a_stream_that_outlives_the_drain_ends_with_an_error_record(tmp_path: Any):
    """A router and a node of their own. What waits is refused at once, what runs has its time."""
    router = Router(settings(tmp_path, drain_timeout_s=0.4, wait_timeout_s=30))
    model = FakeModel("m:1", loaded=True)
    async with (
        FakeBackend(models=[model], slots=4, tokens=100_000, token_delay_s=0.02) as fake,
        running(router),
    ):
        fleet = Fleet(router, tmp_path)
        process = await fleet.start_agent("n", fake.url)
        try:
            await fleet.online("n")
            running_ones = [
                await fleet.begin("/v1/chat/completions", _chat("m:1", stream=True)) for _ in range(3)
            ]
            running_ones.append(await fleet.begin("/api/chat", _chat("m:1", stream=False)))
            for call in running_ones[:3]:
                await call.head()
            await until(lambda: fake.counters.live == 4, "all slots to be taken")
            waiting = asyncio.ensure_future(fleet.request("/api/chat", _chat("m:1")))
            await until(lambda: len(router.room) == 1, "one to wait")
            router.stop()
            assert (await waiting).status == 503
            # it goes on answering while it drains, and says so
            ready = await fleet.request("/readyz", method="GET")
            assert (ready.status, ready.json()["phase"]) == (503, "draining")
            refused = await fleet.request("/api/chat", _chat("m:1"))
            assert (refused.status, "shutting down" in refused.error) == (503, True)
            assert refused.headers["retry-after"]
            for call in running_ones[:3]:
                answer = await call.rest()
                assert (answer.whole, answer.ends, len(answer.errors)) == (True, 0, 1)
                assert "shutting down" in answer.errors[0]
                assert answer.text.startswith("t0000 t0001 ")
            last = running_ones[3]
            await last.head()
            answer = await last.rest()
            assert (answer.status, "shutting down" in answer.error) == (503, True)
            await until(lambda: fake.counters.live == 0, "the backend to stop", patience_s=1.0)
        finally:
            process.kill()
            await process.wait()
    with contextlib.closing(sqlite3.connect(router.data_dir.database_file)) as database:
        rows = database.execute("SELECT status, COUNT(*) FROM request_traces GROUP BY status").fetchall()
    assert sorted(rows) == [("failed", 4), ("rejected", 2)]


def _chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}


async def test_f54_f44_a_router_that_stops_refuses_who_waits_and_ends_what_runs(tmp_path: Any):
    """A router of its own: it ends here. Without a node, so that the request is held."""
    router = Router(settings(tmp_path, hold_timeout_s=30, drain_timeout_s=0.5))
    async with running(router):
        fleet = Fleet(router, tmp_path)
        held = asyncio.ensure_future(fleet.ask(QUESTIONS[0]))
        await until(lambda: len(router.room) == 1, "it to be held")
        (row,) = router.traces.recent(5)
        assert (row["status"], row["node_id"], row["attempt"]) == ("started", None, 1)
        router.stop()
        answer = await held
        assert (answer.status, answer.error) == (503, "the router is shutting down; try again")
        assert answer.headers["retry-after"]
    with contextlib.closing(sqlite3.connect(router.data_dir.database_file)) as database:
        rows = database.execute("SELECT status, request_id FROM request_traces").fetchall()
    assert rows == [("rejected", answer.headers["x-request-id"])]
