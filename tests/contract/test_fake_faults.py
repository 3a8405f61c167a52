"""Each fault of the fake does on the wire what its name says, to the requests it was ordered for."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request

import httpx
import orjson
import pytest

from tests.fakes.backend import FakeBackend
from tests.fakes.faults import KINDS, Fault
from tests.fakes.model import FakeModel

CHAT = json.dumps({"model": "smollm2:135m", "messages": [{"role": "user", "content": "x"}], "stream": True})
PATHS = {"ollama": "/api/chat", "llama-server": "/v1/chat/completions"}


async def raw(fake: FakeBackend, *, stream: bool = True, silent_after: int = 10_000) -> bytes:
    """Every byte of one answer, until the server closes, or is silent after so many tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", fake.port)
    body = CHAT.replace("true", "false") if not stream else CHAT
    head = f"POST {PATHS[fake.kind]} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    received, piece = b"", b"-"
    try:
        while piece:
            async with asyncio.timeout(0.1 if tokens(received) >= silent_after else 10):
                received += (piece := await reader.read(65536))
    except ConnectionResetError:
        received += b"<RST>"
    except TimeoutError:
        received += b"<silence>"
    finally:
        writer.close()
    return received


def tokens(received: bytes) -> int:
    return received.count(b"t000")


def backend(kind: str, **more: object) -> FakeBackend:
    return FakeBackend(kind=kind, models=[FakeModel("smollm2:135m", loaded=True)], **more)  # type: ignore[arg-type]


@pytest.fixture(params=["ollama", "llama-server"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


#: fault, tokens that arrive, what the bytes end with
CUTS = [
    ("rst_after_n", 2, b"<RST>"),
    ("fin_after_n", 2, b"\n\r\n"),
    ("clean_eof_after_n", 2, b"\r\n0\r\n\r\n"),
    ("stall_after_n", 2, b"<silence>"),
    ("bad_chunk_size", 2, b"zz\r\nbroken\r\n"),
    ("error_after_n", 2, b"\r\n0\r\n\r\n"),
    ("malformed_at", 8, b"\r\n0\r\n\r\n"),
    ("rst_before_headers", 0, b"<RST>"),
    ("close_before_headers", 0, b""),
    ("hang_before_headers", 0, b"<silence>"),
    ("rst_on_accept", 0, b"<RST>"),
    ("garbage_head", 0, b"not HTTP\r\n\r\n"),
]


@pytest.mark.parametrize(("fault", "arriving", "ending"), CUTS)
async def test_an_answer_is_broken_as_ordered(kind: str, fault: str, arriving: int, ending: bytes) -> None:
    async with backend(kind) as fake:
        fake.fault(fault, delay_s=0.0)
        received = await raw(fake, silent_after=arriving if ending == b"<silence>" else 10_000)
        assert (tokens(received), received[-len(ending) :] if ending else received) == (arriving, ending)
        healed = await raw(fake)
        assert tokens(healed) == 8
        assert healed.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("fault", "status"),
    [("status", 500), ("queue_full", 503), ("model_missing", 404), ("redirect", 302), ("header_bomb", 200)],
)
async def test_an_answer_is_replaced_as_ordered(kind: str, fault: str, status: int) -> None:
    async with backend(kind) as fake:
        fake.fault(fault)
        assert (await raw(fake)).startswith(f"HTTP/1.1 {status} ".encode())


async def test_a_head_can_have_both_lengths(kind: str) -> None:
    async with backend(kind) as fake:
        fake.fault("cl_and_te")
        head = (await raw(fake)).partition(b"\r\n\r\n")[0]
        assert b"Content-Length" in head
        assert b"Transfer-Encoding" in head


async def test_faults_hit_the_requests_they_were_ordered_for(kind: str) -> None:
    async with backend(kind) as fake:
        fake.fault("fin_after_n", skip=1, count=2, after=3)
        assert [tokens(await raw(fake)) for _ in range(4)] == [8, 3, 3, 8]


async def test_the_manners_change_the_writing_and_not_the_answer(kind: str) -> None:
    async with backend(kind, tokens=3) as fake:
        for manner in ("byte_drip", "split_utf8", "coalesce", "slow_tokens", "no_usage"):
            fake.fault(manner, delay_s=0.001)
            async with httpx.AsyncClient(trust_env=False) as http:
                answer = await http.post(fake.url + PATHS[kind], content=CHAT)
            text = answer.text.replace("ü", "t")
            assert [text.count(f"t000{n}") for n in range(4)] == [1, 1, 1, 0], manner
            assert ("eval_count" in text or "timings" in text) is (manner != "no_usage")
        fake.fault("empty_done")
        assert tokens(await raw(fake)) == 0
        fake.fault("duplicate_done")
        assert (await raw(fake)).count(b'"done":true' if kind == "ollama" else b"[DONE]") == 2


async def test_a_reused_connection_can_be_closed_without_a_byte(kind: str) -> None:
    async with backend(kind) as fake, httpx.AsyncClient(base_url=fake.url, trust_env=False) as http:
        fake.fault("keepalive_race")
        body = CHAT.replace("true", "false")
        assert (await http.post(PATHS[kind], content=body)).status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            await http.post(PATHS[kind], content=body)
        assert (await http.post(PATHS[kind], content=body)).status_code == 200
        assert fake.counters.requests == 3


async def test_a_whole_answer_can_be_cut_too(kind: str) -> None:
    async with backend(kind) as fake:
        for fault, ending in (("rst_after_n", b"<RST>"), ("fin_after_n", b"")):
            fake.fault(fault, delay_s=0.0)
            received = await raw(fake, stream=False)
            head, _, body = received.partition(b"\r\n\r\n")
            length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
            assert len(body.removesuffix(ending)) == length // 2
            assert body.endswith(ending)


async def test_the_port_can_be_closed_and_opened_again(kind: str) -> None:
    async with backend(kind) as fake, httpx.AsyncClient(base_url=fake.control_url, trust_env=False) as http:
        await http.post("/__control", json={"listen": False})
        with pytest.raises(ConnectionRefusedError):
            await raw(fake)
        await http.post("/__control", json={"listen": True})
        assert tokens(await raw(fake)) == 8


async def test_more_than_the_slots_wait_and_a_leaver_frees_his_place() -> None:
    async with backend("ollama", slots=1, tokens=2) as fake:
        fake.fault("stall_after_n", after=1)
        first = asyncio.create_task(raw(fake))
        await until(lambda: fake.counters.tokens == 1)
        second = asyncio.create_task(raw(fake))
        await until(lambda: fake.counters.waiting == 1)
        assert (fake.counters.live, second.done()) == (1, False)
        first.cancel()
        assert tokens(await second) == 2
        assert (fake.counters.aborted, fake.counters.max_live, fake.counters.live) == (1, 1, 0)
        await asyncio.gather(first, return_exceptions=True)


async def test_llama_server_finishes_a_whole_answer_for_nobody() -> None:
    async with backend("llama-server", tokens=3) as fake:
        fake.fault("slow_tokens", delay_s=0.02)
        left = asyncio.create_task(raw(fake, stream=False))
        await until(lambda: fake.counters.live == 1)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        await until(lambda: fake.counters.live == 0)
        assert (fake.counters.completed, fake.counters.aborted) == (1, 0)


async def test_a_cold_model_is_loaded_once_and_listed_then() -> None:
    models = [FakeModel("a:1"), FakeModel("b:1")]
    fake = FakeBackend(models=models, load_s=0.01, slots=2)
    async with fake, httpx.AsyncClient(trust_env=False) as http:
        http.base_url = fake.url  # known once it listens
        assert (await http.get("/api/ps")).json() == {"models": []}
        body = {"model": "a:1", "prompt": "x", "stream": False}
        await asyncio.gather(*(http.post("/api/generate", json=body) for _ in range(2)))
        assert [entry["name"] for entry in (await http.get("/api/ps")).json()["models"]] == ["a:1"]
        assert fake.counters.loads == 1
        await http.post("/api/generate", json={**body, "options": {"num_ctx": 4096}})
        assert (await http.get("/api/ps")).json()["models"][0]["context_length"] == 4096
        assert fake.counters.loads == 2
        unloaded = await http.post("/api/generate", json={"model": "a:1", "keep_alive": 0})
        assert unloaded.json()["done_reason"] == "unload"
        assert (await http.get("/api/ps")).json() == {"models": []}


async def test_the_counters_say_what_was_seen(kind: str) -> None:
    async with backend(kind) as fake:
        await raw(fake)
        async with httpx.AsyncClient(trust_env=False) as http:
            seen = (await http.get(fake.control_url + "/__control")).json()
            assert (seen["requests"], seen["completed"], seen["tokens"], seen["connections"]) == (1, 1, 8, 1)
            assert orjson.loads(seen["last"][0]["body"])["model"] == "smollm2:135m"
            assert seen["by_path"] == {PATHS[kind]: 1}
            wrong = await http.post(fake.control_url + "/__control", json={"faults": [{"kind": "no"}]})
            assert (wrong.status_code, wrong.json()) == (400, {"error": "no such fault: no"})


def test_every_fault_has_a_name_that_is_known() -> None:
    for name in KINDS:
        assert Fault(name).kind == name


@pytest.mark.slow
def test_as_a_program_it_says_where_it_listens_and_ends_with_its_input() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.backend", "--kind", "llama-server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    with child:
        urls = json.loads(child.stdout.readline())
        with urllib.request.urlopen(urls["url"] + "/health") as answer:
            assert answer.read() == b'{"status":"ok"}'
        child.stdin.close()
        assert child.wait(10) == 0


async def until(condition: object) -> None:
    """Waits for another task of this loop; fails after 5 s."""
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.001)
