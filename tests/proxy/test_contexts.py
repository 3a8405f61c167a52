"""Context protection at work: what is settled when a slot is taken, what goes out, and what is logged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from herd.dialects import DIALECT_BY_PATH
from herd.proxy.contexts import Contexts
from herd.proxy.heads import as_comment, of_answer
from herd.proxy.records import Sent
from herd.proxy.sending import body_of
from herd.proxy.slots import Granted
from herd.request import InferenceRequest
from herd.scheduling.context import ContextUse
from herd.scheduling.plan import NEW, Attempt, History, next_step
from herd.scheduling.policy import Policy
from herd_node.protocol.routes import FORWARDED_BY_PATH
from tests.fleet.build import KEY, beat, fresh, join, model
from tests.proxy.room_kit import House, request


class Side:
    """One node with one loaded model, and what becomes of requests for it."""

    def __init__(self, mode: Any = "strip", **fields: Any) -> None:
        self.policy = Policy(context_protection=mode)
        self.registry = fresh()
        self.now_s = 0.0
        self.fields = {"context_tokens": 4096, "context_train_tokens": 32768, "slots": 4, **fields}
        self.beat()
        self.contexts = Contexts(self.registry, self.policy)

    def beat(self, **fields: Any) -> None:
        join(self.registry, beat("attic", model(**{**self.fields, **fields})), self.now_s)

    @property
    def state(self) -> tuple[str, int | None]:
        view = self.registry.instance("attic", KEY)
        return view.state, view.context_tokens

    def asked(self, options: Any, **more: Any) -> InferenceRequest:
        body = more.pop("body", None) or orjson.dumps({"model": "llama3:8b", "options": options})
        parsed = DIALECT_BY_PATH["/api/chat"].parse(FORWARDED_BY_PATH["/api/chat"], body)
        wanted, load_options = parsed.wanted_context_tokens, parsed.load_options
        made = request("r", "llama3:8b", wanted_context_tokens=wanted, load_options=load_options, **more)
        return made._replace(body=body)

    def settle(self, asked: InferenceRequest) -> Attempt:
        snapshot = self.registry.snapshot(self.now_s)
        step = next_step(asked, snapshot, NEW, self.policy, self.now_s)
        assert isinstance(step, Attempt), step
        return self.contexts.settle(asked, step, self.now_s) if self.contexts.concern(asked) else step

    def sent(self, options: Any, **more: Any) -> Any:
        """What of the options reaches the node."""
        asked = self.asked(options, **more)
        return orjson.loads(body_of(asked, self.settle(asked)))["options"]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"num_ctx": 2048}, {"num_ctx": 4096}),
        ({"num_ctx": 4096, "seed": 1}, {"num_ctx": 4096, "seed": 1}),
        ({"num_ctx": 0}, {"num_ctx": 4096}),
        ({"seed": 1, "num_thread": 8, "num_ctx": 2048.0, "num_gpu": 3}, {"seed": 1, "num_ctx": 4096}),
        ({"use_mmap": True}, {}),
        ({"num_thread": "8", "num_gpu": None}, {"num_thread": "8", "num_gpu": None}),
        ({"num_ctx": 8192, "num_thread": 8}, {"num_ctx": 8192, "num_thread": 8}),
    ],
)
def test_strip_replaces_the_context_and_removes_the_others(options: Any, left: Any):
    assert Side().sent(options) == left
    assert Side("warn").sent(options) == options
    assert Side("passthrough").sent(options) == options
    assert Side(state="cold", context_tokens=None).sent(options) == options


def test_no_other_byte_of_the_body_differs():
    body = b'{ "model":"llama3:8b",\n "options" : {"seed": 1e0, %b"num_ctx":\t%b},"x":"\xc3\xa9" }\n'
    side = Side()
    asked = side.asked(None, body=body % (b'"num_thread":8 , ', b"2048"))
    assert body_of(asked, side.settle(asked)) == body % (b"", b"4096")


def test_a_fallback_gets_its_name_and_its_options_both():
    side = Side()
    asked = side.asked({"num_ctx": 2048}, arrival_s=0.0)._replace(resolved=("llama3:8b-alias",))
    sent = orjson.loads(body_of(asked, side.settle(asked)))
    assert sent == {"model": "llama3:8b-alias", "options": {"num_ctx": 4096}}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"llama3:8b","options":{"num_ctx":1},"options":{"num_ctx":2048}}',
        b'{"model":"llama3:8b","options":{"num_ctx":1,"num_ctx":2048}}',
        b'{"model":"llama3:8b","Options":{"num_ctx":1},"options":{"num_ctx":2048}}',
    ],
)
def test_what_stands_there_twice_is_left_alone(body: bytes):
    side = Side()
    asked = side.asked(None, body=body)
    assert body_of(asked, side.settle(asked)) == body


def test_a_body_without_options_is_the_same_object():
    side = Side()
    asked = side.asked({})
    assert not side.contexts.concern(asked)
    assert body_of(asked, side.settle(asked)) is asked.body


def test_options_that_the_model_was_loaded_with_stay_and_others_go():
    side = Side(state="cold", context_tokens=None)
    assert side.sent({"num_thread": 8}) == {"num_thread": 8}
    side.beat(state="hot", context_tokens=4096)
    assert side.sent({"num_thread": 8}) == {"num_thread": 8}
    assert side.sent({"num_thread": 8, "num_gpu": 3}) == {"num_thread": 8}
    assert side.state == ("hot", 4096)


def test_who_does_not_ask_for_them_has_it_loaded_anew_and_then_they_go():
    side = Side(state="cold", context_tokens=None)
    side.sent({"num_thread": 8})
    side.beat(state="hot", context_tokens=4096)
    step = side.settle(side.asked({}))
    assert (step.context.reload, side.state) == (True, ("loading", 4096))
    side.beat(state="hot", context_tokens=4096)
    assert side.sent({"num_thread": 8}) == {}
    assert side.settle(side.asked({})).context == ContextUse()


def test_a_reload_makes_the_model_one_that_loads_with_the_context_asked_for():
    side = Side()
    step = side.settle(side.asked({"num_ctx": 100_000}))
    assert (step.context.reload, side.state) == (True, ("loading", 32768))


async def test_a_slot_for_which_the_model_is_loaded_anew_is_that_of_a_cold_one():
    house = House()
    join(house.registry, beat("attic", model(context_tokens=4096, slots=4)), house.now_s)
    for tokens, cold in ((2048, False), (8192, True)):
        got = await house.room.acquire(request(f"{tokens}", wanted_context_tokens=tokens), History())
        assert isinstance(got, Granted)
        assert (got.cold, got.step.context.reload) == (cold, cold)
        await house.end(got)
    assert house.registry.instance("attic", KEY).context_tokens == 8192
    await house.close()


@pytest.mark.parametrize(("mode", "lines"), [("strip", 0), ("warn", 1), ("passthrough", 0)])
def test_only_warn_says_so_once_a_model_and_minute(mode: str, lines: int, caplog: pytest.LogCaptureFixture):
    side = Side(mode)
    with caplog.at_level(logging.WARNING, "herd.proxy.contexts"):
        for _ in range(3):
            side.settle(side.asked({"num_ctx": 2048, "stop": ["secret"], "num_thread": 8}))
            side.beat()
        assert len(caplog.records) == lines
        side.now_s = 61.0
        side.beat()
        side.settle(side.asked({"num_ctx": 2048}))
        assert len(caplog.records) == 2 * lines
    for record in caplog.records:
        assert "'llama3:8b' on node 'attic'" in record.getMessage()
        assert "secret" not in record.getMessage()
    if lines:
        assert "its num_ctx, num_thread differs" in caplog.records[0].getMessage()


def test_the_answer_says_that_a_model_was_loaded_anew(sent_with: Callable[[ContextUse], Sent]):
    asked = request("r", "llama3:8b")
    loud, quiet = sent_with(ContextUse(reload=True)), sent_with(ContextUse(num_ctx=4096))
    assert (b"x-fleet-context", b"reload") in of_answer(asked, loud, 1, b"x", stream=True)
    assert b" x-fleet-context=reload " in as_comment(asked, loud, 1)
    assert b"x-fleet-context" not in as_comment(asked, quiet, 1)
    assert not any(name == b"x-fleet-context" for name, _ in of_answer(asked, quiet, 1, b"x", stream=False))


@pytest.fixture
def sent_with() -> Callable[[ContextUse], Sent]:
    def make(use: ContextUse) -> Sent:
        side = Side()
        step = side.settle(side.asked({}))._replace(context=use)
        return Sent(step, None, None, "ollama", False, None, 0.0, 0.0, 0, "llama3:8b")  # type: ignore[arg-type]

    return make
