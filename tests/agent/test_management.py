"""Management calls through the signed front door: to which backend, as which bytes, and what comes back."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from herd_node.gateway import Calls
from herd_node.net.spool import MEMORY_BYTES
from herd_node.protocol.routes import MANAGED
from herd_node.runtime.clock import ManualClock
from tests.agent.agent_kit import Answer, Backendish, House, Line, Request, openai_backend, until
from tests.fakes.backend import FakeBackend
from tests.fakes.model import FakeModel
from tests.fakes.recordings import recording

TINY = {"model": "127.0.0.1:5999/library/tiny", "insecure": True}


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    house.start()
    yield house
    await house.close()


@pytest.fixture
async def ollama(house: House) -> AsyncIterator[FakeBackend]:
    models = [FakeModel("smollm2:135m"), FakeModel("embedder:latest", capabilities=("embedding",))]
    async with FakeBackend(kind="ollama", models=models) as fake:
        await house.add(fake.url)
        yield fake


async def begin(house: House, method: str, path: str, body: object = b"", **changed: object) -> Line:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    line = await house.line()
    line.send(method, path, {"X-Herd-Auth": house.signature(method, path, raw, **changed)}, raw)
    return line


async def call(house: House, method: str, path: str, body: object = b"", **changed: object) -> Answer:
    line = await begin(house, method, path, body, **changed)
    if method == "HEAD":
        status, headers = await line.head()
        return Answer(status, headers, b"", True)
    return await line.answer()


def names(fake: FakeBackend) -> list[str]:
    return [model.name for model in fake.dialect.models]  # type: ignore[union-attr]


# -- Ollama: as it came


async def test_a_pull_brings_ollamas_own_lines_and_the_model(house: House, ollama: FakeBackend) -> None:
    answer = await call(house, "POST", "/api/pull", TINY)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
    assert (answer.body, answer.whole) == (recording("ollama/pull").body, True)
    assert "127.0.0.1:5999/library/tiny:latest" in names(ollama)


async def test_each_line_comes_when_ollama_says_it(house: House, ollama: FakeBackend) -> None:
    ollama.token_delay_s = 0.05
    line = await begin(house, "POST", "/api/pull", TINY)
    await line.head()
    assert json.loads(await line.chunk()) == {"status": "pulling manifest"}
    assert json.loads(await line.chunk())["completed"] == 393216
    assert ollama.counters.live == 1
    await line.close()
    await until(lambda: ollama.counters.aborted == 1)
    assert "127.0.0.1:5999/library/tiny:latest" not in names(ollama)


@pytest.mark.parametrize("name", ["pull-not-found", "pull-digest-mismatch", "pull-no-network"])
async def test_a_pull_that_fails_is_a_line_inside_a_200(house: House, ollama: FakeBackend, name: str) -> None:
    recorded = recording(f"ollama/{name}")
    answer = await call(house, "POST", "/api/pull", recorded.request_body)
    assert (answer.status, answer.body) == (200, recorded.body)
    assert "error" in json.loads(answer.body.splitlines()[-1])


async def test_without_a_stream_it_is_ollamas_500(house: House, ollama: FakeBackend) -> None:
    recorded = recording("ollama/pull-not-found-nostream")
    answer = await call(house, "POST", "/api/pull", recorded.request_body)
    assert (answer.status, answer.body) == (500, recorded.body)
    assert "x-herd-error" not in answer.headers


async def test_push_create_copy_and_delete_are_ollamas_own(house: House, ollama: FakeBackend) -> None:
    pushed = await call(house, "POST", "/api/push", {"model": "nope"})
    assert pushed.body == recording("ollama/push-unknown").body
    made = await call(house, "POST", "/api/create", {"model": "made:one", "from": "smollm2:135m"})
    assert json.loads(made.body.splitlines()[-1]) == {"status": "success"}
    copied = await call(house, "POST", "/api/copy", {"source": "made:one", "destination": "made:two"})
    assert (copied.status, copied.body) == (200, b"")
    assert {"made:one", "made:two"} <= set(names(ollama))
    deleted = await call(house, "DELETE", "/api/delete", {"model": "made:one"})
    assert (deleted.status, deleted.body) == (200, b"")
    assert "made:one" not in names(ollama)


@pytest.mark.parametrize("name", ["copy-unknown", "delete-unknown", "create-nothing", "delete-empty"])
async def test_what_ollama_refuses_is_refused_in_its_words(
    house: House, ollama: FakeBackend, name: str
) -> None:
    recorded = recording(f"ollama/{name}")
    method, path = recorded.request_head.decode().split()[:2]
    answer = await call(house, method, path, recorded.request_body)
    assert (answer.status, answer.json()) == (recorded.status, json.loads(recorded.body))


async def test_a_blob_of_any_length_goes_through_whole(house: House, ollama: FakeBackend) -> None:
    for size_bytes in (0, 10, MEMORY_BYTES, 5 * MEMORY_BYTES + 7):
        blob = bytes(range(256)) * (size_bytes // 256) + b"x" * (size_bytes % 256)
        path = f"/api/blobs/sha256:{hashlib.sha256(blob).hexdigest()}"
        assert (await call(house, "HEAD", path)).status == 404
        assert (await call(house, "POST", path, blob)).status == 201
        assert (await call(house, "HEAD", path)).status == 200
        assert (await call(house, "POST", path, blob)).status == 200


async def test_a_blob_that_is_not_what_was_signed_never_reaches_ollama(
    house: House, ollama: FakeBackend
) -> None:
    blob = b"y" * (2 * MEMORY_BYTES)
    path = f"/api/blobs/sha256:{hashlib.sha256(blob).hexdigest()}"
    signature = house.signature("POST", path, blob)
    statuses = []
    for sent in (blob[:-1] + b"z", blob):
        line = await house.line()
        line.send("POST", path, {"X-Herd-Auth": signature}, sent)
        statuses.append((await line.answer()).status)
    assert statuses == [401, 201], "and its number is not used up"


async def test_a_digest_that_is_none_is_refused_as_ollama_does_and_is_no_other_path(
    house: House, ollama: FakeBackend
) -> None:
    for path in ("/api/blobs/zzz", "/api/blobs/..", "/api/blobs/sha256:1%3Fx", "/api/blobs/a%20b"):
        answer = await call(house, "POST", path, b"x")
        assert (answer.status, answer.json()) == (400, {"error": "invalid digest format"})


async def test_loading_and_unloading_are_one_call_for_any_model(house: House, ollama: FakeBackend) -> None:
    for name in ("smollm2:135m", "embedder"):
        loaded = await call(house, "POST", "/herd/v1/load", {"model": name})
        assert (loaded.status, loaded.json()) == (200, {"status": "success"})
    assert ollama.dialect.models[0].loaded  # type: ignore[union-attr]
    unloaded = await call(house, "POST", "/herd/v1/unload", {"model": "SmolLM2:135M"})
    assert (unloaded.status, unloaded.json()) == (200, {"status": "success"})
    assert not ollama.dialect.models[0].loaded  # type: ignore[union-attr]
    unknown = await call(house, "POST", "/herd/v1/load", {"model": "nope"})
    assert (unknown.status, unknown.json()) == (404, {"error": "model 'nope' not found"})


# -- where it goes


async def test_a_backend_may_be_named_and_the_name_goes_no_further(house: House, ollama: FakeBackend) -> None:
    async with FakeBackend(kind="ollama", models=[FakeModel("other:1")]) as second:
        await house.add(second.url)
        path = f"/api/copy?backend={house.backends[1].id}"
        body = {"source": "other:1", "destination": "made:one"}
        assert (await call(house, "POST", path, body)).status == 200
        assert "made:one" in names(second)
        assert (await call(house, "POST", "/api/copy?backend=nope", body)).status == 404
        deleted = await call(house, "DELETE", "/api/delete", {"model": "other:1"})
        assert deleted.status == 200
        assert "other:1" not in names(second), "whoever has the model is asked, not whoever is first"


@pytest.mark.parametrize("verb", list(MANAGED))
async def test_what_no_backend_of_the_node_can_do_is_501_and_says_who_can(house: House, verb: str) -> None:
    async with openai_backend("m") as server:
        await house.add(server.url)
        route = MANAGED[verb]  # type: ignore[index]
        path = route.path.replace("{digest}", "sha256:" + "1" * 64)
        answer = await call(house, route.methods[-1], path, {"model": "m", "source": "m"})
        assert answer.status == 501
        said = answer.json()
        assert isinstance(said, dict)
        assert said["error"].startswith("this node cannot ")
        assert "Ollama nodes" in said["error"]
        assert "x-herd-error" not in answer.headers
        assert server.of(path) == []


async def test_a_node_whose_backend_is_down_is_not_ready(house: House, ollama: FakeBackend) -> None:
    await ollama.refuse()
    ollama.cut_all()
    refused = await call(house, "POST", "/api/pull", TINY)
    assert (refused.status, refused.headers["x-herd-error"]) == (503, "refused")
    await house.backends[0].poll(0.0)
    down = await call(house, "POST", "/api/pull", TINY)
    assert (down.status, down.headers["x-herd-error"]) == (503, "not-ready")


async def test_a_node_that_drains_begins_nothing_and_still_unloads(house: House, ollama: FakeBackend) -> None:
    house.gateway.draining = True
    busy = await call(house, "POST", "/api/pull", TINY)
    assert (busy.status, busy.headers["x-herd-error"]) == (503, "busy")
    assert (await call(house, "POST", "/herd/v1/unload", {"model": "smollm2:135m"})).status == 200


# -- who may, and what is no call


async def test_an_unsigned_management_call_is_refused_before_its_body_is_read(
    house: House, ollama: FakeBackend
) -> None:
    line = await house.line()
    line.send("POST", "/api/blobs/sha256:00", {}, length=10**12)
    answer = await line.answer()
    assert (answer.status, answer.headers["x-herd-error"]) == (401, "auth")
    again = await call(house, "POST", "/api/pull", TINY, receiver_boot="c" * 16)
    assert (again.status, again.headers["x-herd-error"]) == (401, "boot")


async def test_a_body_that_is_longer_than_any_model_is_413(house: House, ollama: FakeBackend) -> None:
    line = await house.line()
    path = "/api/blobs/sha256:" + "1" * 64
    line.send("POST", path, {"X-Herd-Auth": house.signature("POST", path)}, length=2 * 1024**4)
    assert (await line.answer()).status == 413


@pytest.mark.parametrize("path", ["/api/pull", "/api/push", "/api/create", "/api/copy", "/herd/v1/load"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b'"x"', b"\xff", b'{"model":"\\ud800"}'])
async def test_bad_bodies_are_the_callers_mistake_in_ollamas_shape(
    house: House, ollama: FakeBackend, path: str, body: bytes
) -> None:
    answer = await call(house, "POST", path, body)
    assert answer.status == 400
    said = answer.json()
    assert isinstance(said, dict)
    assert isinstance(said["error"], str)


async def test_fields_of_a_wrong_type_are_never_a_failure_of_the_agent(
    house: House, ollama: FakeBackend
) -> None:
    for path in ("/herd/v1/load", "/herd/v1/unload"):
        for value in (7, None, [], {}, True, ""):
            answer = await call(house, "POST", path, {"model": value, "options": 7})
            assert (answer.status, answer.json()) == (400, {"error": "model is required"})


# -- streams


async def test_a_stream_that_the_backend_cuts_is_cut_without_an_end_chunk(house: House) -> None:
    async with pretended_ollama() as server:

        async def cut(request: Request) -> None:
            request.begin("application/x-ndjson")
            request.chunk(b'{"status":"pulling manifest"}\n')
            await request.writer.drain()
            request.writer.close()

        server.on("/api/pull", cut)
        await house.add(server.url)
        answer = await call(house, "POST", "/api/pull", {"model": "m"})
        assert (answer.status, answer.whole) == (200, False)
        assert answer.body == b'{"status":"pulling manifest"}\n'


@pytest.mark.slow
async def test_a_caller_that_reads_nothing_makes_the_backend_wait(house: House) -> None:
    offered, piece = 64 * 1024 * 1024, b'{"status":"x"}\n' * 4096
    async with pretended_ollama() as server:
        taken, stuck = 0, asyncio.Event()

        async def flood(request: Request) -> None:
            nonlocal taken
            request.begin("application/x-ndjson")
            while taken < offered:
                request.chunk(piece)
                taken += len(piece)
                try:
                    async with asyncio.timeout(1.0):
                        await request.writer.drain()
                except TimeoutError:
                    break
            stuck.set()

        server.on("/api/pull", flood)
        await house.add(server.url)
        line = await begin(house, "POST", "/api/pull", {"model": "m"})
        line.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await stuck.wait()
        assert taken < offered // 2


async def test_the_body_that_ollama_gets_is_the_callers_byte_for_byte(house: House) -> None:
    async with pretended_ollama() as server:
        server.on("/api/create", {"status": "success"})
        await house.add(server.url)
        body = b'{ "model":"m" , "from": "x","unknown": 1.0,"stream":false}'
        await call(house, "POST", "/api/create", body)
        got = server.of("/api/create")[0]
        assert got.body == body
        assert "x-herd-auth" not in got.headers


@asynccontextmanager
async def pretended_ollama() -> AsyncIterator[Backendish]:
    """Enough of one to be taken for it; what it answers to a call is the test's."""
    server = Backendish()
    for path, answer in (
        ("version", {"version": "0.99.0"}),
        ("tags", {"models": []}),
        ("ps", {"models": []}),
    ):
        server.on(f"/api/{path}", answer)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


# -- who runs on a model


async def test_a_model_is_unused_when_only_calls_that_wait_for_it_to_be_loaded_are_left() -> None:
    calls, runner = Calls(ManualClock()), ("embedded", "m")
    await calls.until_unused(runner)
    running, waiting = calls.begin("m", runner), calls.begin("m", runner)
    elsewhere = calls.begin("other", ("embedded", "other"))
    calls.loading.add(waiting)
    free = asyncio.ensure_future(calls.until_unused(runner))
    calls.end(elsewhere)
    await asyncio.sleep(0)
    assert not free.done()
    calls.end(running)
    await free
    assert calls.on_runner(runner) == 1
