"""Each cell of the table in docs/compatibility.md, through a real router and agent to a fake of the kind.

What became of a request is seen at the fake: nothing came, the same bytes came, or something else.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import orjson
import pytest
import pytest_asyncio

from herd.app import Router
from herd_node.protocol.routes import MANAGED
from tests import compatibility
from tests.compatibility import KINDS, ROWS, Row
from tests.fakes.backend import FakeBackend
from tests.fakes.connection import Connection, Request
from tests.fakes.model import FakeModel
from tests.fakes.plain_dialect import PlainDialect
from tests.router.kit import Answer, Fleet, running, settings, until

ABLE = ("completion", "tools", "thinking", "vision", "insert")
#: What the agent asks by itself while it translates.
HELPERS = ("/tokenize", "/detokenize", "/apply-template")


class Witness(FakeBackend):
    """Remembers every request, not only those that work."""

    seen: list[Request]

    async def _serve(self, connection: Connection, request: Request) -> None:
        self.seen.append(request)
        await super()._serve(connection, request)


def witness(kind: str, *models: FakeModel) -> Witness:
    fake = Witness(kind=kind, models=list(models), slots=4, max_loaded=8)
    if kind == "openai":
        fake.dialect = PlainDialect(models[0], 8, 4, None, embeddings=True)
    fake.seen = []
    return fake


class Kinds:
    """A node of each kind, named after it, and its fakes."""

    def __init__(self, fleet: Fleet, fakes: dict[str, list[Witness]]) -> None:
        self.fleet = fleet
        self.fakes = fakes

    def model(self, kind: str, use: str) -> str:
        return "chat-openai" if kind == "openai" else f"{use}-{kind}"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def kinds(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kinds]:
    folder = tmp_path_factory.mktemp("kinds")
    fakes = {
        "ollama": [
            witness(
                "ollama",
                FakeModel("chat-ollama", capabilities=ABLE, loaded=True),
                FakeModel("embed-ollama", capabilities=("embedding",), loaded=True),
                FakeModel("rank-ollama", loaded=True),
            )
        ],
        "llama-server": [
            witness("llama-server", FakeModel("chat-llama-server", capabilities=ABLE, loaded=True)),
            witness("llama-server", FakeModel("embed-llama-server", capabilities=("embedding",))),
            witness("llama-server", FakeModel("rank-llama-server", capabilities=("rerank",))),
        ],
        "openai": [witness("openai", FakeModel("chat-openai", capabilities=ABLE))],
    }
    async with running(Router(settings(folder))) as router:
        fleet = Fleet(router, folder)
        every = [fake for ones in fakes.values() for fake in ones]
        try:
            for kind, ones in fakes.items():
                urls = [(await fake.__aenter__()).url for fake in ones]
                await fleet.start_agent(kind, *urls)
            for kind in KINDS:
                await fleet.online(kind)
            await until(lambda: _all_known(router), "every model to be listed")
            yield Kinds(fleet, fakes)
        finally:
            for process in fleet.agents.values():
                if process.returncode is None:
                    process.kill()
                await process.wait()
            for fake in every:
                await fake.__aexit__()


def _all_known(router: Router) -> bool:
    nodes = router.registry.snapshot(router.clock.now_s()).nodes
    listed = {kind: len(nodes[kind].instances) for kind in KINDS}
    return listed == {"ollama": 3, "llama-server": 3, "openai": 1}


def request_of(kinds: Kinds, row: Row, kind: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers."""
    model = kinds.model(kind, row.model or "chat")
    if row.path == "/v1/audio/transcriptions":
        parts = (f'name="model"\r\n\r\n{model}', 'name="file"; filename="a.wav"\r\n\r\nRIFF')
        form = "".join(f"--B\r\nContent-Disposition: form-data; {part}\r\n" for part in parts) + "--B--\r\n"
        return form.encode(), {"Content-Type": "multipart/form-data; boundary=B"}
    fields = {"model": model, **row.fields} if row.model else row.fields
    text = json.dumps(fields).replace('"MODEL"', json.dumps(model)).replace('"NODE"', json.dumps(kind))
    return (b"" if row.method in ("GET", "HEAD") else text.encode()), {}


def what_came(kinds: Kinds, kind: str, answer: Answer, row: Row) -> list[Request]:
    """The requests at the kind's fakes that this one was the cause of; not the agent's own looks."""
    ours = answer.headers.get("x-request-id", "none")
    managed = any(row.path == route.path for route in MANAGED.values()) or row.path.startswith("/api/blobs/")
    return [
        request
        for fake in kinds.fakes[kind]
        for request in fake.seen
        if request.path not in HELPERS
        and (request.headers.get("x-request-id") == ours or (managed and request.path == row.path))
    ]


def became(answer: Answer, body: bytes, row: Row, came: list[Request]) -> str:
    """The word of the table."""
    if row.path.startswith("/dashboard/") and answer.status == 200:
        return compatibility.DONE
    if row.method == "HEAD" and came:
        return compatibility.PASSED
    if not came:
        if answer.status >= 400:
            return compatibility.refused(answer.status)
        if "x-fleet-estimated" in answer.headers:
            return compatibility.ESTIMATED
        return compatibility.BY_NODE
    if answer.status >= 400 and came[-1].path == row.path:
        return compatibility.backends(answer.status)
    if answer.status >= 400:
        return compatibility.refused(answer.status)
    if came[-1].path != row.path:
        return compatibility.translated(came[-1].path)
    if came[-1].body == body:
        return compatibility.PASSED
    sent, got = orjson.loads(body), orjson.loads(came[-1].body)
    for field in ("stream", "stream_options"):
        sent.pop(field, None), got.pop(field, None)
    if sent == got:
        return compatibility.FOLDED
    loaded_tokens = FakeModel("").context_tokens
    assert sent | {"options": {**sent["options"], "num_ctx": loaded_tokens}} == got
    return compatibility.LOADED_CONTEXT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS, ids=compatibility.title)
async def test_what_the_table_says_of_a_request_is_what_becomes_of_it(kinds: Kinds, row: Row, kind: str):
    for fake in kinds.fakes[kind]:
        fake.seen.clear()
    body, headers = request_of(kinds, row, kind)
    path = row.path + (f"?node={kind}" if row.method == "HEAD" else "")
    answer = await kinds.fleet.request(path, body, method=row.method, headers=headers)
    found = became(answer, body, row, what_came(kinds, kind, answer, row))
    assert found == row.cells[KINDS.index(kind)], answer
    assert answer.whole or row.method == "HEAD"
    assert answer.status < 500 or answer.status == 501
    assert answer.errors == [] or answer.status >= 400 or row.path in ("/api/pull", "/api/push")
