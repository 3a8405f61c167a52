"""The signed front door over real sockets: who gets in, where a call goes, what comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from herd_node.protocol import auth
from tests.agent.agent_kit import (
    AGENT_BOOT,
    AGENT_ID,
    KEY,
    KEY_ID,
    ROUTER_BOOT,
    Backendish,
    House,
    Request,
    openai_backend,
)

CHAT = "/v1/chat/completions"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    house.start()
    yield house
    await house.close()


@pytest.fixture
async def backend(house: House) -> AsyncIterator[Backendish]:
    """A server with the model `m`; each test scripts its answers."""
    async with openai_backend("m") as server:
        await house.add(server.url)
        yield server


# -- who gets in --


async def test_an_unsigned_call_is_refused_before_its_body_is_read(house: House, backend: Backendish) -> None:
    line = await house.line()
    line.send("POST", CHAT, {"Content-Type": "application/json"}, length=1_000_000)  # and not a byte of it
    answer = await line.answer()
    assert (answer.status, answer.headers["x-herd-error"]) == (401, "auth")
    assert backend.of(CHAT) == []


@pytest.mark.parametrize(
    ("changed", "status", "word"),
    [
        ({"key": bytes(32)}, 401, "auth"),
        ({"key_id": auth.key_id("node-2", AGENT_ID)}, 401, "auth"),
        ({"direction": "beat"}, 401, "auth"),
        ({"target": "/api/chat"}, 401, "auth"),
        ({"method": "GET"}, 401, "auth"),
        ({"body_sha256": auth.body_hash(b"another")}, 401, "auth"),
        ({"receiver_boot": "c" * 16}, 401, "boot"),
        ({"receiver_boot": None}, 401, "boot"),
        ({"sender_boot": "c" * 16}, 401, "boot"),
    ],
)
async def test_a_call_that_is_not_exactly_what_the_router_signed_for_us_is_refused(
    house: House, backend: Backendish, changed: dict[str, object], status: int, word: str
) -> None:
    body = json.dumps(HELLO).encode()
    line = await house.line()
    line.send("POST", CHAT, {"X-Herd-Auth": house.signature("POST", CHAT, body, **changed)}, body)
    answer = await line.answer()
    assert (answer.status, answer.headers["x-herd-error"]) == (status, word)
    assert backend.of(CHAT) == []


async def test_a_replayed_call_is_refused_as_stale(house: House, backend: Backendish) -> None:
    backend.on(CHAT, {"ok": True})
    body = json.dumps(HELLO).encode()
    signature = house.signature("POST", CHAT, body)
    statuses = []
    for _ in range(2):
        line = await house.line()
        line.send("POST", CHAT, {"X-Herd-Auth": signature}, body)
        answer = await line.answer()
        statuses.append((answer.status, answer.headers.get("x-herd-error")))
    assert statuses == [(200, None), (409, "stale")]
    assert len(backend.of(CHAT)) == 1


async def test_a_call_whose_body_was_exchanged_does_not_use_its_number_up(
    house: House, backend: Backendish
) -> None:
    backend.on(CHAT, {"ok": True})
    body = json.dumps(HELLO).encode()
    signature = house.signature("POST", CHAT, body)
    statuses = []
    for sent in (body.replace(b"hi", b"ho"), body):
        line = await house.line()
        line.send("POST", CHAT, {"X-Herd-Auth": signature}, sent)
        statuses.append((await line.answer()).status)
    assert statuses == [401, 200]


async def test_a_boot_that_a_newer_one_replaced_is_stale_for_ever(house: House, backend: Backendish) -> None:
    house.gate.learn_router_boot(KEY_ID, "c" * 16)
    answer = await house.call(CHAT, HELLO)
    assert (answer.status, answer.headers["x-herd-error"]) == (409, "stale")


async def test_the_ping_is_answered_and_its_answer_is_signed(house: House) -> None:
    line = await house.line()
    signature = house.signature("GET", "/herd/v1/ping")
    line.send("GET", "/herd/v1/ping", {"X-Herd-Auth": signature})
    answer = await line.answer()
    header = auth.parse_auth(answer.headers["x-herd-auth"])
    assert answer.json() == {"node_id": "node-1", "agent_id": AGENT_ID, "boot": AGENT_BOOT}
    assert auth.mac_ok(KEY, header, direction="reply", method="GET", target="/herd/v1/ping")
    assert (header.sender_boot, header.receiver_boot) == (AGENT_BOOT, ROUTER_BOOT)
    assert header.seq == auth.parse_auth(signature).seq
    assert header.body_sha256 == auth.body_hash(answer.body)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/pull", 405),
        ("POST", "/api/delete", 405),
        ("GET", "/api/blobs/sha256:00", 405),
        ("POST", "/api/blobs/", 404),
        ("POST", "/api/blobs/a/b", 404),
        ("POST", "/api/blobs/..%2Ftags", 404),
        ("POST", "/api/me", 404),
        ("GET", "/", 404),
        ("GET", "/slots", 404),
        ("POST", "/v1/chat/completions/../models", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/herd/v1/ping", 404),
    ],
)
async def test_what_is_not_on_the_list_never_reaches_a_backend(
    house: House, backend: Backendish, method: str, path: str, status: int
) -> None:
    seen = len(backend.requests)
    body = json.dumps(HELLO).encode()
    line = await house.line()
    line.send(method, path, {"X-Herd-Auth": house.signature(method, path, body)}, body)
    assert (await line.answer()).status == status
    assert len(backend.requests) == seen


# -- where it goes --


async def test_only_the_name_is_replaced_and_every_other_byte_stays(house: House) -> None:
    async with openai_backend("Org/Model-7B") as server:
        server.on(CHAT, {"ok": True})
        await house.add(server.url)
        body = (
            b'{ "messages":[{"model":"x","content":"\\u00e9 {\\"model\\"}"}],'
            b'"model" : "org/MODEL-7b:latest" ,"n":1.0}'
        )
        assert (await house.call(CHAT, body)).status == 200
        assert server.of(CHAT)[0].body == body.replace(b'"org/MODEL-7b:latest"', b'"Org/Model-7B"')


async def test_the_first_backend_that_has_the_name_and_is_ready_serves_it(house: House) -> None:
    async with openai_backend("m") as first, openai_backend("m", "other") as second:
        for server in (first, second):
            server.on(CHAT, {"from": server.port})
            await house.add(server.url)
        assert (await house.call(CHAT, HELLO)).json() == {"from": first.port}
        assert (await house.call(CHAT, HELLO | {"model": "other"})).json() == {"from": second.port}
        first.on("/v1/models", None)
        await house.backends[0].poll(0.0)
        assert (await house.call(CHAT, HELLO)).json() == {"from": second.port}


async def test_nothing_of_the_caller_but_what_the_backend_needs_goes_on(
    house: House, backend: Backendish
) -> None:
    backend.on(CHAT, {"ok": True})
    extra = {
        "Authorization": "Bearer secret",
        "Cookie": "a=b",
        "Origin": "http://evil.example",
        "X-Herd-Tags": "t",
        "Connection": "X-Drop",
        "X-Drop": "1",
        "Accept": "text/event-stream",
        "X-Request-Id": "abc",
    }
    await house.call(CHAT, HELLO, extra)
    got = backend.of(CHAT)[0].headers
    assert got == {
        "host": f"127.0.0.1:{backend.port}",
        "content-type": "application/json",
        "content-length": str(len(json.dumps(HELLO))),
        "accept": "text/event-stream",
        "x-request-id": "abc",
    }


async def test_a_model_that_no_backend_has_is_said_by_a_word(house: House, backend: Backendish) -> None:
    answer = await house.call("/api/chat", HELLO | {"model": "absent"})
    assert (answer.status, answer.headers["x-herd-error"]) == (404, "no-model")
    assert answer.json() == {"error": "model 'absent' not found"}


async def test_before_any_backend_is_ready_the_node_says_so(house: House) -> None:
    answer = await house.call(CHAT, HELLO)
    assert (answer.status, answer.headers["x-herd-error"]) == (503, "not-ready")


async def test_a_backend_that_is_gone_is_refused_in_the_callers_dialect(
    house: House, backend: Backendish
) -> None:
    await backend.close()
    answer = await house.call(CHAT, HELLO)
    assert (answer.status, answer.headers["x-herd-error"]) == (503, "refused")
    said = answer.json()
    assert isinstance(said, dict)
    assert str(backend.port) not in said["error"]["message"]
    assert house.troubles == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"messages":[]}',
        b'{"model":7}',
        b'{"model":""}',
        b'{"model":"m","MODEL":"x"}',
        b'{"model":"m\\ud800"}',
    ],
)
async def test_a_body_that_names_no_single_model_is_the_callers_mistake(
    house: House, backend: Backendish, body: bytes
) -> None:
    answer = await house.call(CHAT, body)
    assert answer.status == 400
    assert "x-herd-error" not in answer.headers
    assert backend.of(CHAT) == []


# -- slots and the end --


async def test_one_more_than_the_slots_is_let_in_and_the_next_is_busy_at_once(house: House) -> None:
    house.means = type(house.means)(http=house.http, clock=house.clock, tasks=house.tasks, slots=2)
    async with openai_backend("m", "other") as server:
        go_on = asyncio.Event()

        async def slow(request: Request) -> None:
            await go_on.wait()
            request.answer(200, {"ok": True})

        server.on(CHAT, slow)
        await house.add(server.url)
        running = [await house.begin(CHAT, HELLO) for _ in range(3)]
        await server.wait_for(CHAT, 3)
        assert house.gateway.calls.by_model() == {"m": 3}
        busy = await house.call(CHAT, HELLO)
        assert (busy.status, busy.headers["x-herd-error"], busy.headers["retry-after"]) == (503, "busy", "1")
        other = await house.begin(CHAT, HELLO | {"model": "other"})
        await server.wait_for(CHAT, 4)
        assert house.gateway.calls.by_model() == {"m": 3, "other": 1}
        go_on.set()
        assert [(await line.answer()).status for line in [*running, other]] == [200] * 4
        await house.gateway.calls.until_idle()
        assert house.gateway.calls.by_model() == {}


async def test_a_node_that_drains_refuses_new_work_and_still_answers_pings(
    house: House, backend: Backendish
) -> None:
    go_on = asyncio.Event()

    async def slow(request: Request) -> None:
        await go_on.wait()
        request.answer(200, {"ok": True})

    backend.on(CHAT, slow)
    running = await house.begin(CHAT, HELLO)
    await backend.wait_for(CHAT)
    house.gateway.draining = True
    refused = await house.call(CHAT, HELLO)
    assert (refused.status, refused.headers["x-herd-error"]) == (503, "busy")
    line = await house.line()
    line.send("GET", "/herd/v1/ping", {"X-Herd-Auth": house.signature("GET", "/herd/v1/ping")})
    assert (await line.answer()).status == 200
    go_on.set()
    assert (await running.answer()).status == 200
    await house.gateway.calls.until_idle()


async def test_a_caller_that_leaves_before_the_first_byte_cuts_the_backend_at_once(
    house: House, backend: Backendish
) -> None:
    async def silent(request: Request) -> None:
        await request.until_left()

    backend.on(CHAT, silent)
    line = await house.begin(CHAT, HELLO)
    request = await backend.wait_for(CHAT)
    await line.close()
    await asyncio.wait_for(request.left.wait(), 2)
    await house.gateway.calls.until_idle()


async def test_a_caller_that_leaves_in_mid_stream_cuts_the_backend_at_once(
    house: House, backend: Backendish
) -> None:
    async def stream(request: Request) -> None:
        request.begin()
        request.chunk(b'data: {"a":1}\n\n')
        await request.until_left()

    backend.on(CHAT, stream)
    line = await house.begin(CHAT, HELLO | {"stream": True})
    await line.head()
    assert await line.chunk() == b'data: {"a":1}\n\n'
    request = backend.of(CHAT)[0]
    await line.close()
    await asyncio.wait_for(request.left.wait(), 2)
    await house.gateway.calls.until_idle()


# -- what comes back --


async def test_a_stream_goes_through_as_it_came_and_ends_properly(house: House, backend: Backendish) -> None:
    pieces = [b'data: {"x":"\xc3', b'\xa9"}\n\nda', b"ta: [DONE]\n\n"]
    go_on = asyncio.Event()

    async def stream(request: Request) -> None:
        request.begin()
        for piece in pieces:
            request.chunk(piece)
            await go_on.wait()
            go_on.clear()
        request.end()

    backend.on(CHAT, stream)
    line = await house.begin(CHAT, HELLO | {"stream": True})
    status, headers = await line.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    for piece in pieces:
        assert await line.chunk() == piece
        go_on.set()
    assert await line.chunk() == b""


@pytest.mark.parametrize("kind", ["openai", "llama-server"])
async def test_only_a_llama_server_is_not_believed_that_it_keeps_a_connection_behind_a_stream(
    house: House, kind: str
) -> None:
    async def stream(request: Request) -> None:
        request.begin()
        request.chunk(b"data: [DONE]\n\n")
        request.end()

    async with openai_backend("m") as server:
        server.on(CHAT, stream)
        if kind == "llama-server":
            server.on("/health", {"status": "ok"})
            server.on("/props", {"total_slots": 1, "model_path": "m.gguf"})
        assert (await house.add(server.url)).kind == kind
        for _ in range(2):
            answer = await house.call(CHAT, HELLO | {"stream": True})
            assert (answer.status, answer.whole) == (200, True)
        first, second = server.of(CHAT)
        assert (first.writer is second.writer) == (kind == "openai")


async def test_a_stream_that_the_backend_cuts_is_cut_without_an_end_chunk(
    house: House, backend: Backendish
) -> None:
    async def cut(request: Request) -> None:
        request.begin()
        request.chunk(b"data: 1\n\n")
        await request.writer.drain()
        request.writer.close()

    backend.on(CHAT, cut)
    answer = await house.call(CHAT, HELLO | {"stream": True})
    assert (answer.status, answer.body, answer.whole) == (200, b"data: 1\n\n", False)


async def test_a_body_shorter_than_its_length_is_cut_too(house: House, backend: Backendish) -> None:
    async def cut(request: Request) -> None:
        request.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        await request.writer.drain()
        request.writer.close()

    backend.on(CHAT, cut)
    answer = await house.call(CHAT, HELLO)
    assert (answer.status, answer.whole) == (200, False)


async def test_a_backend_that_hangs_up_before_its_head_is_a_reset(house: House, backend: Backendish) -> None:
    async def hang_up(request: Request) -> None:
        request.writer.transport.abort()

    backend.on(CHAT, hang_up)
    answer = await house.call(CHAT, HELLO)
    assert (answer.status, answer.headers["x-herd-error"]) == (502, "reset")


async def test_a_backend_that_does_not_speak_http_is_a_framing_error(
    house: House, backend: Backendish
) -> None:
    async def garbage(request: Request) -> None:
        request.write(b"220 mail.example ESMTP\r\n\r\n")

    backend.on(CHAT, garbage)
    answer = await house.call(CHAT, HELLO)
    assert (answer.status, answer.headers["x-herd-error"]) == (502, "framing")


async def test_a_redirect_is_passed_on_without_its_target_and_never_followed(
    house: House, backend: Backendish
) -> None:
    async def elsewhere(request: Request) -> None:
        request.write(f"HTTP/1.1 307 X\r\nLocation: {backend.url}/trap\r\nContent-Length: 0\r\n\r\n".encode())

    backend.on(CHAT, elsewhere)
    answer = await house.call(CHAT, HELLO)
    assert answer.status == 307
    assert "location" not in answer.headers
    assert backend.of("/trap") == []


async def test_status_body_and_retry_after_of_a_backends_own_error_pass(
    house: House, backend: Backendish
) -> None:
    async def full(request: Request) -> None:
        request.write(b"HTTP/1.1 503 X\r\nRetry-After: 7\r\nServer: s\r\nContent-Length: 4\r\n\r\nfull")

    backend.on(CHAT, full)
    answer = await house.call(CHAT, HELLO)
    assert (answer.status, answer.body, answer.headers["retry-after"]) == (503, b"full", "7")
    assert "x-herd-error" not in answer.headers
    assert "server" not in answer.headers
    assert house.troubles == 1


@pytest.mark.slow
async def test_a_caller_that_reads_nothing_makes_the_backend_wait(house: House, backend: Backendish) -> None:
    """Buffers: the kernel's on both sides of both sockets, the pool's 256 KiB; far below what is offered."""
    offered, piece = 64 * 1024 * 1024, b"x" * 65536
    taken = 0
    stuck = asyncio.Event()

    async def flood(request: Request) -> None:
        nonlocal taken
        request.begin()
        while taken < offered:
            request.chunk(piece)
            taken += len(piece)
            try:
                async with asyncio.timeout(1.0):
                    await request.writer.drain()
            except TimeoutError:
                break
        stuck.set()

    backend.on(CHAT, flood)
    line = await house.begin(CHAT, HELLO | {"stream": True})
    line.reader._transport.pause_reading()  # type: ignore[attr-defined]
    await stuck.wait()
    assert taken < offered // 2
