"""What a request made is freed when it ends: the garbage collector looks seldom, and what it would have to
find is memory until then."""

from __future__ import annotations

import gc

import pytest

from herd.proxy.ledger import Ledger
from herd_node.net.lane_exchange import LaneExchange
from tests.router.kit import QUESTIONS, Fleet, Question, until


def left() -> int:
    return sum(isinstance(thing, Ledger | LaneExchange) for thing in gc.get_objects())


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
async def test_nothing_of_a_request_waits_for_the_collector(fleet: Fleet, question: Question):
    gc.collect()
    gc.disable()
    try:
        await fleet.check(await fleet.ask(question))
        await until(lambda: not left(), "the request to be freed")
    finally:
        gc.enable()
