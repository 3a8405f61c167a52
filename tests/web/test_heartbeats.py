"""`POST /heartbeat`: what is refused, with which status, and that nothing refused changes anything."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import orjson
import pytest

from herd_node.protocol import auth, wire
from tests.router.kit import Answer
from tests.web.kit import Lonely, fields_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


def state(lonely: Lonely) -> Any:
    """All that a beat could change."""
    return [(beat.node_id, beat.agent_id, beat.boot, beat.seq) for _, beat in lonely.router.registry.beats()]


async def refused(lonely: Lonely, answer: Answer, status: int, words: str, before: Any) -> dict[str, Any]:
    assert answer.status == status, answer
    said = answer.json()
    assert words in said["error"], said
    assert "x-herd-auth" not in answer.headers
    assert state(lonely) == before
    counts = (await lonely.status())["router"]["beats_refused"]
    assert counts[str(status)] >= 1
    return said  # type: ignore[no-any-return]


async def test_a_beat_is_taken_and_its_reply_is_signed(lonely: Lonely):
    fields = fields_of("taken", boot="1" * 16)
    raw, header = lonely.signed(fields)
    answer = await lonely.request("/heartbeat", raw, headers={"X-Herd-Auth": header})
    assert answer.status == 200, answer
    reply = wire.parse_reply(answer.json())
    assert (reply.router_id, reply.boot) == (lonely.router.identity.router_id, lonely.router.boot)
    assert reply.state in ("pending", "unreachable")  # nobody answers there
    signed, ours = auth.parse_auth(answer.headers["x-herd-auth"]), auth.parse_auth(header)
    key = auth.node_key(lonely.router.identity.join_secret, ours.key_id)
    assert auth.mac_ok(key, signed, direction="reply", method="POST", target="/heartbeat")
    assert (signed.seq, signed.sender_boot, signed.receiver_boot) == (ours.seq, lonely.router.boot, "1" * 16)
    assert signed.body_sha256 == auth.body_hash(answer.body)
    assert state(lonely) == [("taken", fields["agent_id"], "1" * 16, ours.seq)]


async def test_an_unsigned_beat_is_401(lonely: Lonely):
    before = state(lonely)
    for body in (json.dumps(fields_of()).encode(), b"", b"x" * 100):
        answer = await lonely.request("/heartbeat", body)
        await refused(lonely, answer, 401, "must be signed", before)


NO_SIGNATURES = ["x", "2 a b c d e f", "1", "1 a/b", "1 " + "x " * 6, "1 a/" + "0" * 16 + " b - 1 c d"]
NO_SIGNATURES += ["1  ", "ü" * 50, "1 " * 10_000]


@pytest.mark.parametrize("header", NO_SIGNATURES, ids=range(len(NO_SIGNATURES)))
async def test_a_signature_that_is_none_is_400_or_401(lonely: Lonely, header: str):
    before = state(lonely)
    answer = await lonely.request("/heartbeat", b"{}", headers={"X-Herd-Auth": header})
    assert answer.status in (400, 401, 426)
    assert answer.json()["error"]
    assert state(lonely) == before


async def test_a_wrong_signature_is_401(lonely: Lonely):
    before, fields = state(lonely), fields_of()
    wrong: list[dict[str, Any]] = [
        {"key": b"k" * 32},
        {"direction": "reply"},
        {"direction": "call"},
        {"method": "GET"},
        {"target": "/heartbeat?x"},
    ]
    for changed in wrong:
        await refused(lonely, await lonely.beat(fields, **changed), 401, "has not joined", before)
    raw, header = lonely.signed(fields)
    answer = await lonely.request("/heartbeat", raw + b" ", headers={"X-Herd-Auth": header})
    await refused(lonely, answer, 401, "not the one that was signed", before)


async def test_another_boot_of_the_router_is_401_and_names_ours(lonely: Lonely):
    before = state(lonely)
    for boot in ("f" * 16, None):
        answer = await lonely.beat(fields_of(), receiver_boot=boot)
        assert (answer.status, answer.json()["boot"]) == (401, lonely.router.boot)
        assert state(lonely) == before


async def test_a_beat_that_comes_again_is_409(lonely: Lonely):
    fields = fields_of("replayed", boot="2" * 16)
    raw, header = lonely.signed(fields)
    assert (await lonely.request("/heartbeat", raw, headers={"X-Herd-Auth": header})).status == 200
    before = state(lonely)
    answer = await lonely.request("/heartbeat", raw, headers={"X-Herd-Auth": header})
    await refused(lonely, answer, 409, "", before)
    earlier = await lonely.beat(fields, seq=auth.parse_auth(header).seq - 1)
    await refused(lonely, earlier, 409, "", before)
    # a boot that a newer one replaced is never taken again
    assert (await lonely.beat(fields | {"boot": "3" * 16})).status == 200
    before = state(lonely)
    await refused(lonely, await lonely.beat(fields), 409, "", before)


async def test_a_node_id_that_another_agent_holds_is_409_with_a_reason(lonely: Lonely):
    assert (await lonely.beat(fields_of("mine", boot="4" * 16))).status == 200
    before = state(lonely)
    other = fields_of("mine", agent_id="9" * 16, boot="5" * 16)
    await refused(lonely, await lonely.beat(other), 409, "choose another --node-id", before)
    again = await lonely.beat(fields_of("mine", boot="4" * 16))
    assert again.status == 200


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"7",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"{}",
    b"[" * 50_000 + b"]" * 50_000,
    b'{"v":1}',
    b'{"v":1,"node_id":"\\ud800"}',
]


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
async def test_a_signed_beat_that_is_garbage_is_400(lonely: Lonely, body: bytes):
    before = state(lonely)
    answer = await lonely.beat(fields_of("garbage"), body=body)
    await refused(lonely, answer, 400 if body != b"{}" else answer.status, "", before)
    assert answer.status in (400, 426)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("node_id", "other"),
        ("node_id", 7),
        ("agent_id", "8" * 16),
        ("boot", "7" * 16),
        ("seq", 10**6),
        ("interval_s", "5"),
        ("interval_s", float("1e308")),
        ("draining", 1),
        ("gateway", {"port": 80, "addresses": []}),
        ("gateway", None),
        ("models", {"a": 1}),
        ("models", [7]),
        ("models", [{"name": "m"}] * 600),
        ("in_flight", {"m": -1}),
        ("backends", [{"id": 7}]),
        ("heat", {"state": "melting"}),
        ("memory", {"pressure": "terrible"}),
        ("agent_version", "x" * 300),
    ],
)
async def test_a_signed_beat_with_one_wrong_field_is_400(lonely: Lonely, field: str, value: Any):
    fields = fields_of("wrong", boot="6" * 16)
    before = state(lonely)
    lonely._seq += 1
    body = orjson.dumps(fields | {"seq": lonely._seq + 1} | {field: value})
    answer = await lonely.beat(fields, body=body)
    said = await refused(lonely, answer, 400, "", before)
    assert field in said["error"] or "differ from" in said["error"]


async def test_another_version_is_426(lonely: Lonely):
    before = state(lonely)
    for version in (0, 2, 99):
        answer = await lonely.beat(fields_of("new", v=version))
        await refused(lonely, answer, 426, "version 1", before)


async def test_a_beat_that_is_too_large_is_413_before_it_is_read(lonely: Lonely):
    before = state(lonely)
    answer = await lonely.beat(fields_of("big"), body=b"x" * (wire.MAX_BEAT_BYTES + 1))
    await refused(lonely, answer, 413, "larger than", before)
    assert answer.headers["connection"] == "close"
    # unsigned it is not even looked at
    answer = await lonely.request("/heartbeat", b"x" * (wire.MAX_BEAT_BYTES + 1))
    assert answer.status == 401


async def test_unknown_fields_are_harmless(lonely: Lonely):
    fields = fields_of("odd", boot="a" * 16, future={"x": [1]}, base_url="http://evil")
    assert (await lonely.beat(fields)).status == 200


async def test_other_methods_are_405(lonely: Lonely):
    for method in ("GET", "PUT", "DELETE"):
        answer = await lonely.request("/heartbeat", b"{}", method=method)
        assert (answer.status, answer.headers["allow"]) == (405, "POST")


async def test_beats_that_come_all_at_once_are_taken_or_refused(lonely: Lonely):
    fields = fields_of("eager", boot="b" * 16)
    answers = await asyncio.gather(*(lonely.beat(fields) for _ in range(30)))
    assert {answer.status for answer in answers} <= {200, 409}
    assert 200 in {answer.status for answer in answers}
