"""Endpoints that not every server has: each is tried once, and what the answers mean."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from herd_node.backends.calls import control_client
from herd_node.backends.llamacpp import LlamaCpp
from herd_node.backends.offers import AGAIN_S, Offers
from herd_node.protocol.routes import OFFERED_BY
from tests.backends.replaying import Answer, made, means, recorded, replaying
from tests.backends.test_llamacpp import ASLEEP, LOADING, READY

MESSAGES = "/v1/messages"


@pytest.mark.parametrize(
    ("status", "offered"),
    [
        (400, True),
        (401, True),
        (415, True),
        (422, True),
        (500, True),
        (404, False),
        (405, False),
        (501, False),
        (200, False),
        (302, False),
        (502, False),
    ],
)
async def test_a_refusal_of_nothing_says_that_it_is_there(status: int, offered: bool) -> None:
    """200 to nothing is no proof: there are servers that answer so whatever the path."""
    async with replaying({MESSAGES: made({}, status)}) as server, control_client() as http:
        offers = Offers()
        await offers.look(http, f"http://127.0.0.1:{server.origin.port}", (), 0.0)
    assert offers.endpoints == ((MESSAGES,) if offered else ())
    assert [(asked.method, asked.body) for asked in server.asked] == [("POST", {})] * len(OFFERED_BY)


async def test_what_gave_no_answer_is_tried_again_after_a_while_and_nothing_else_is() -> None:
    async with replaying({MESSAGES: made({}, 503)}) as server, control_client() as http:
        offers, url = Offers(), f"http://127.0.0.1:{server.origin.port}"
        await offers.look(http, url, (), 0.0)
        tried = len(server.asked)
        server.answers[MESSAGES] = made({}, 400)
        await offers.look(http, url, (), AGAIN_S - 1)
        assert (len(server.asked), offers.endpoints) == (tried, ())
        await offers.look(http, url, (), AGAIN_S)
        assert ([asked.path for asked in server.asked[tried:]], offers.endpoints) == ([MESSAGES], (MESSAGES,))
        await offers.look(http, url, (), 10 * AGAIN_S)
        assert len(server.asked) == tried + 1
        offers.forget()
        assert offers.endpoints == ()


def test_the_page_about_compatibility_has_a_row_for_each() -> None:
    page = (Path(__file__).parents[2] / "docs/compatibility.md").read_text(encoding="utf-8")
    section = page.partition("## Endpoints that not every backend has")[2].partition("\n## ")[0]
    table = section.partition("| endpoint |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) == list(OFFERED_BY)


WITH_MESSAGES: dict[str, Answer] = {
    MESSAGES: made(
        {"error": {"code": 500, "message": "'messages' is required", "type": "server_error"}}, 500
    ),
    "/v1/rerank": recorded("llamacpp/rerank-not-enabled"),
}


async def test_a_backend_is_tried_once_a_start() -> None:
    async with replaying(READY | WITH_MESSAGES) as server, means() as given:
        backend = LlamaCpp(server.origin, given)
        for now_s in (0.0, 5.0, 10.0):
            assert (await backend.poll(now_s)).endpoints == (MESSAGES,)
        assert [asked.path for asked in server.asked].count(MESSAGES) == 1
        server.answers["/health"] = LOADING
        await backend.poll(15.0)
        server.answers |= {"/health": READY["/health"], MESSAGES: made({}, 404)}
        assert (await backend.poll(20.0)).endpoints == ()


async def test_a_model_that_sleeps_is_not_woken_for_it() -> None:
    async with replaying(ASLEEP | WITH_MESSAGES) as server, means() as given:
        backend = LlamaCpp(server.origin, given)
        assert (await backend.poll(0.0)).endpoints == ()
        assert not {"/v1/rerank", MESSAGES} & {asked.path for asked in server.asked}
