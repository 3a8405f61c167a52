"""The beat loop against a tiny router over a real socket: joining, restarts, refusals, what is believed."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from herd.fleet.record import NOT_PROBED
from herd_node.membership import Membership
from herd_node.protocol import auth, wire
from herd_node.report import Host, Self, heartbeat
from herd_node.router_client import (
    NOT_CALLED_YET,
    Accepted,
    KeyRing,
    Link,
    Refused,
    RouterClient,
    Unreached,
    control_client,
)
from herd_node.runtime.chance import new_hex
from herd_node.runtime.clock import SystemClock
from herd_node.runtime.paths import DataDir, write_private
from herd_node.runtime.tasks import Tasks
from tests.agent.agent_kit import SECRET, Request
from tests.agent.tiny_router import TinyRouter


class Nowhere:
    """mDNS that finds what a test puts in."""

    def __init__(self) -> None:
        self.urls: dict[str, tuple[str, ...]] = {}

    def urls_of(self, router_id: str) -> tuple[str, ...]:
        return self.urls.get(router_id, ())


class Node:
    """One agent's side: folder, membership, gate, client."""

    def __init__(self, folder: Path, *, token: auth.Token | None = None, router_url: str = "") -> None:
        self.boot = new_hex(8)
        self.data_dir = DataDir(folder)
        self.data_dir.ensure()
        self.data_dir.node("n").ensure()
        self.membership = Membership(self.data_dir, "n", token)
        self.gate = auth.CallGate(self.boot)
        self.keys = KeyRing()
        self.finder = Nowhere()
        self.models: tuple[wire.Model, ...] = ()
        self.http = control_client()
        self.client = RouterClient(
            Link(
                membership=self.membership,
                boot=self.boot,
                router_url=router_url,
                interval_s=30.0,
                http=self.http,
                clock=SystemClock(),
                gate=self.gate,
                keys=self.keys,
                finder=self.finder,
                build=self._beat,
            )
        )

    def _beat(self, seq: int) -> wire.Heartbeat:
        me = Self("n", self.membership.agent_id, self.boot, "0", 30.0, 11436)
        beat = heartbeat(me, seq=seq, draining=False, addresses=(), host=Host(), backends=(), in_flight={})
        return replace(beat, models=self.models)

    def admits(self, router_boot: str) -> bool:
        """Whether the gateway would take a call of that router process."""
        header = auth.AuthHeader(self.membership.key_id, router_boot, self.boot, 10_000, "", "")
        return self.gate.check_and_accept(header) is None

    def stored(self) -> dict[str, object]:
        found = json.loads(self.data_dir.node("n").agent_file.read_bytes())
        assert isinstance(found, dict)
        return found


@pytest.fixture
async def router() -> AsyncIterator[TinyRouter]:
    router = TinyRouter()
    await router.server.start()
    yield router
    await router.server.close()


def token_of(router: TinyRouter, secret: bytes = SECRET) -> auth.Token:
    return auth.Token(router.router_id, (router.url,), secret)


@pytest.fixture
async def node(tmp_path: Path, router: TinyRouter) -> AsyncIterator[Node]:
    """A node that was given the router's token."""
    node = Node(tmp_path, token=token_of(router))
    yield node
    await node.http.aclose()


async def test_the_first_beat_learns_the_routers_boot_and_is_signed_once_more(
    node: Node, router: TinyRouter
) -> None:
    outcome = await node.client.beat()
    assert isinstance(outcome, Accepted)
    assert [(one.receiver_boot, one.seq) for one in router.headers] == [(None, 1), (router.boot, 2)]
    assert node.admits(router.boot)
    assert node.keys.key_for(node.membership.key_id) == auth.node_key(SECRET, node.membership.key_id)


async def test_after_an_accepted_beat_the_node_starts_without_a_token(
    node: Node, router: TinyRouter, tmp_path: Path
) -> None:
    await node.client.beat()
    again = Node(tmp_path)
    assert again.membership.agent_id == node.membership.agent_id
    assert isinstance(await again.client.beat(), Accepted)
    await again.http.aclose()
    stored = json.dumps(node.stored())
    assert SECRET.hex() not in stored
    assert node.data_dir.node("n").agent_file.stat().st_mode & 0o077 == 0


async def test_a_401_with_a_boot_alone_never_lets_a_router_call_us(node: Node, router: TinyRouter) -> None:
    stranger = "e" * 16

    def always_another_boot(request: Request, _header: auth.AuthHeader) -> bool:
        request.answer(401, {"boot": stranger})
        return True

    router.mood = always_another_boot
    assert isinstance(await node.client.beat(), Unreached)
    assert len(router.headers) == 2  # signed again once, not for ever
    assert not node.admits(stranger)
    assert node.keys.key_for(node.membership.key_id) is None


async def test_a_router_that_restarted_is_followed_within_one_beat_and_its_old_boot_is_dead(
    node: Node, router: TinyRouter
) -> None:
    await node.client.beat()
    old = router.boot
    router.restart("2" * 16)
    assert isinstance(await node.client.beat(), Accepted)
    assert node.admits("2" * 16)
    assert not node.admits(old)


@pytest.mark.parametrize("lie", ["key", "seq", "receiver", "unsigned", "body boot"])
async def test_a_200_that_our_router_did_not_sign_for_this_beat_is_not_believed(
    node: Node, router: TinyRouter, lie: str
) -> None:
    def lying(request: Request, header: auth.AuthHeader) -> bool:
        if header.receiver_boot is None:
            return False
        key = auth.node_key(SECRET, header.key_id)
        if lie == "unsigned":
            request.answer(200, {"router_id": router.router_id, "boot": router.boot, "state": "online"})
            return True
        header = header._replace(
            seq=header.seq + (lie == "seq"), sender_boot="f" * 16 if lie == "receiver" else header.sender_boot
        )
        said_boot = "9" * 16 if lie == "body boot" else None
        router.reply(request, header, bytes(32) if lie == "key" else key, said_boot)
        return True

    router.mood = lying
    assert isinstance(await node.client.beat(), Unreached)
    assert node.client.beats_accepted == 0
    assert node.stored()["routers"] == []
    assert not node.admits("1" * 16)


async def test_another_router_at_the_pinned_address_is_not_followed(node: Node, router: TinyRouter) -> None:
    await node.client.beat()
    router.router_id = "impostor"
    outcome = await node.client.beat()
    assert isinstance(outcome, Unreached)
    assert "impostor" in outcome.why


async def test_a_refused_token_is_said_once_and_tried_again(
    tmp_path: Path, router: TinyRouter, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(tmp_path, token=token_of(router, bytes(32)))
    with caplog.at_level(logging.INFO):
        outcomes = [await node.client.beat() for _ in range(3)]
    await node.http.aclose()
    assert all(isinstance(one, Refused) and one.status == 401 for one in outcomes)
    said = [record.message for record in caplog.records if "refuses our token" in record.message]
    assert len(said) == 1
    assert len(router.headers) == 3


async def test_a_refused_stored_key_gives_way_to_the_join_file_of_the_same_machine(
    tmp_path: Path, router: TinyRouter
) -> None:
    first = Node(tmp_path, token=token_of(router))
    await first.client.beat()
    router.secret = bytes(reversed(SECRET))  # the router lost its folder and made a new secret
    node = Node(tmp_path)
    assert isinstance(await node.client.beat(), Refused)
    write_private(node.data_dir.join_file, router.secret)
    stated = {"id": router.router_id, "boot": router.boot, "pid": 1, "urls": [router.url]}
    write_private(node.data_dir.router_file, json.dumps(stated).encode())
    assert isinstance(await node.client.beat(), Accepted)
    for one in (first, node):
        await one.http.aclose()


async def test_a_conflict_is_shown_with_the_routers_reason(
    node: Node, router: TinyRouter, caplog: pytest.LogCaptureFixture
) -> None:
    def taken(request: Request, _header: auth.AuthHeader) -> bool:
        request.answer(409, {"error": "node id n is held by another agent"})
        return True

    router.mood = taken
    with caplog.at_level(logging.WARNING):
        outcome = await node.client.beat()
    assert isinstance(outcome, Refused)
    assert "node id n is held by another agent" in caplog.text


async def test_without_any_credential_it_says_what_to_do_and_sends_nothing(
    tmp_path: Path, router: TinyRouter, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(tmp_path, router_url=router.url)
    with caplog.at_level(logging.INFO):
        assert await node.client.beat() is None
    await node.http.aclose()
    assert "run `herd join` on the router's machine" in caplog.text
    assert router.headers == []


async def test_a_join_file_that_appears_later_is_found(tmp_path: Path, router: TinyRouter) -> None:
    node = Node(tmp_path, router_url=router.url)
    assert await node.client.beat() is None
    write_private(node.data_dir.join_file, SECRET)
    assert isinstance(await node.client.beat(), Accepted)
    await node.http.aclose()


async def test_a_router_that_moved_is_found_by_its_id_alone(tmp_path: Path, router: TinyRouter) -> None:
    gone = TinyRouter()
    await gone.server.start()
    token = auth.Token("router-1", (gone.url,), SECRET)
    await gone.server.close()
    node = Node(tmp_path, token=token)
    node.finder.urls["another-router"] = (router.url,)
    assert isinstance(await node.client.beat(), Unreached)
    node.finder.urls["router-1"] = (router.url,)
    assert isinstance(await node.client.beat(), Accepted)
    routers = node.stored()["routers"]
    assert isinstance(routers, list)
    assert routers[0]["urls"] == [router.url, gone.url]
    await node.http.aclose()


async def test_a_router_on_the_same_folder_that_took_another_port_is_found_by_its_file(
    tmp_path: Path, router: TinyRouter
) -> None:
    gone = TinyRouter()
    await gone.server.start()
    node = Node(tmp_path, token=token_of(gone))
    assert isinstance(await node.client.beat(), Accepted)
    await gone.server.close()
    await node.http.aclose()
    again = Node(tmp_path)
    assert isinstance(await again.client.beat(), Unreached)
    write_private(again.data_dir.join_file, SECRET)
    stated = {
        "id": "router-1",
        "boot": router.boot,
        "pid": 1,
        "urls": [f"http://192.0.2.1:{router.server.port}"],
    }
    write_private(again.data_dir.router_file, json.dumps(stated).encode())
    assert isinstance(await again.client.beat(), Accepted)
    await again.http.aclose()


async def test_a_given_router_url_is_the_only_address_tried(tmp_path: Path, router: TinyRouter) -> None:
    nobody = TinyRouter()
    await nobody.server.start()
    await nobody.server.close()
    node = Node(tmp_path, token=token_of(router), router_url=nobody.url)
    assert isinstance(await node.client.beat(), Unreached)
    await node.http.aclose()
    assert router.headers == []


async def test_a_redirect_is_not_followed(node: Node, router: TinyRouter) -> None:
    trap = TinyRouter()
    await trap.server.start()

    def elsewhere(request: Request, _header: auth.AuthHeader) -> bool:
        request.write(
            f"HTTP/1.1 307 X\r\nLocation: {trap.url}/heartbeat\r\nContent-Length: 0\r\n\r\n".encode()
        )
        return True

    router.mood = elsewhere
    assert isinstance(await node.client.beat(), Unreached)
    assert trap.server.requests == []
    await trap.server.close()


async def test_proxy_variables_are_ignored(
    tmp_path: Path, router: TinyRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    node = Node(tmp_path, token=token_of(router))
    assert isinstance(await node.client.beat(), Accepted)
    await node.http.aclose()


async def test_a_change_is_told_at_once_and_a_burst_of_them_is_one_beat(
    node: Node, router: TinyRouter
) -> None:
    """The interval is 30 s, so every further beat here comes from a change."""
    tasks = Tasks("test")
    tasks.spawn(node.client.run(), name="beats")
    await asyncio.wait_for(router.wait_for(1), 2)
    for _ in range(5):
        node.client.changed()
        await asyncio.sleep(0)
    await asyncio.wait_for(router.wait_for(2), 1)
    await node.client.tell(1.0)
    await tasks.close()
    assert [beat.seq for beat in router.beats] == [2, 3, 4]


async def test_the_router_may_set_the_interval(node: Node, router: TinyRouter) -> None:
    router.interval_s = 0.01
    tasks = Tasks("test")
    tasks.spawn(node.client.run(), name="beats")
    await asyncio.wait_for(router.wait_for(4), 2)
    await tasks.close()


async def test_a_beat_that_would_be_too_large_leaves_cold_models_out(node: Node, router: TinyRouter) -> None:
    def model(number: int, state: wire.ModelState) -> wire.Model:
        name = f"{number}-" + "x" * 180
        return wire.Model(name=name, backend="b", aliases=(name + "-a", name + "-b"), state=state)

    node.models = (*(model(n, "cold") for n in range(500)), model(500, "hot"), model(501, "loading"))
    assert isinstance(await node.client.beat(), Accepted)
    sent = router.beats[0].models
    assert 0 < len(sent) < 502
    assert {one.state for one in sent} >= {"hot", "loading"}
    assert all(len(request.body) <= wire.MAX_BEAT_BYTES for request in router.server.requests)


async def test_a_broken_agent_file_is_a_lost_membership_not_a_crash(
    tmp_path: Path, router: TinyRouter
) -> None:
    data_dir = DataDir(tmp_path)
    data_dir.ensure()
    data_dir.node("n").ensure()
    write_private(data_dir.node("n").agent_file, b'{"agent_id": "short", "routers": [{}]}')
    node = Node(tmp_path, token=token_of(router))
    assert auth.is_boot(node.membership.agent_id)
    assert isinstance(await node.client.beat(), Accepted)
    await node.http.aclose()


async def test_an_address_that_was_silent_is_tried_after_the_others(
    tmp_path: Path, router: TinyRouter
) -> None:
    sick = TinyRouter()
    await sick.server.start()
    node = Node(tmp_path, token=auth.Token("router-1", (sick.url,), SECRET))
    assert isinstance(await node.client.beat(), Accepted)

    def sick_answer(request: Request, _header: auth.AuthHeader) -> bool:
        request.answer(503, {})
        return True

    sick.mood = sick_answer
    assert isinstance(await node.client.beat(), Unreached)
    sick.headers.clear()
    node.finder.urls["router-1"] = (router.url,)
    assert isinstance(await node.client.beat(), Accepted)
    assert sick.headers == []
    await sick.server.close()
    await node.http.aclose()


async def test_a_node_that_was_not_called_yet_is_no_trouble(
    node: Node, router: TinyRouter, caplog: pytest.LogCaptureFixture
) -> None:
    assert NOT_CALLED_YET == NOT_PROBED, "what the router says"
    router.state, router.reason = "unreachable", NOT_PROBED
    with caplog.at_level(logging.INFO):
        await node.client.beat()
    assert f"The router at {router.url} knows node n now; waiting for its first call." in caplog.text
