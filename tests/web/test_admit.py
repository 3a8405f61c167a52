"""Who may call: loopback, the links of our own interfaces, and what `--allow-net` names."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import orjson
import pytest

from herd.errors import Forbidden
from herd.web.admit import admit, neighbourhood
from herd.web.routes import ROUTES
from herd_node.protocol.routes import Route
from tests.web.kit import Lonely

LAN = ROUTES[0]
OWN = tuple(map(ip_network, ("192.168.1.0/24", "fd00:1::/64", "fe80::/64", "127.0.0.0/8", "::1/128")))
NEAR = neighbourhood(OWN, ())
FAR = "--allow-net"


@pytest.mark.parametrize(
    ("peer", "kind", "address"),
    [
        ("127.0.0.1", "loopback", "127.0.0.1"),
        ("127.8.9.10", "loopback", "127.8.9.10"),
        ("::1", "loopback", "::1"),
        ("::ffff:127.0.0.1", "loopback", "127.0.0.1"),
        ("192.168.1.77", "lan", "192.168.1.77"),
        ("::ffff:192.168.1.77", "lan", "192.168.1.77"),
        ("fd00:1::5", "lan", "fd00:1::5"),
        ("fe80::5%eth0", "lan", "fe80::5"),
    ],
)
def test_who_is_near_is_let_in(peer: str, kind: str, address: str):
    principal = admit(peer, LAN, NEAR)
    assert (principal.kind, principal.address) == (kind, address)


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        ("192.168.2.1", "192.168.2.1/32"),
        ("8.8.8.8", "8.8.8.8/32"),
        ("::ffff:8.8.8.8", "8.8.8.8/32"),
        ("fd00:2::5", "fd00:2::5/128"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("0.0.0.0", "0.0.0.0/32"),
    ],
)
def test_who_is_far_is_told_what_would_let_it_in(peer: str, said: str):
    with pytest.raises(Forbidden) as refused:
        admit(peer, LAN, NEAR)
    assert refused.value.status == 403
    assert f"{FAR} {said}" in refused.value.message


@pytest.mark.parametrize("peer", ["", "x", "unix:", "1.2.3", "127.0.0.1:80"])
def test_a_peer_without_an_address_is_nobody(peer: str):
    with pytest.raises(Forbidden):
        admit(peer, LAN, NEAR)


@pytest.mark.parametrize(
    ("nets", "peer", "let_in"),
    [
        (("8.8.8.0/24",), "8.8.8.8", True),
        (("8.8.8.8/24",), "8.8.8.9", True),  # host bits are forgiven
        (("8.8.8.0/24",), "8.8.9.8", False),
        (("8.8.8.0/24",), "::ffff:8.8.8.8", True),
        (("2001:db8::/32",), "2001:db8::1", True),
        (("2001:db8::/32",), "8.8.8.8", False),
        (("0.0.0.0/0",), "2001:db8::1", False),
        (("0.0.0.0/0", "::/0"), "2001:db8::1", True),
        (("10.0.0.5",), "10.0.0.5", True),
    ],
)
def test_an_allowed_network_is_near(nets: tuple[str, ...], peer: str, let_in: bool):
    near = neighbourhood(OWN, nets)
    if let_in:
        assert admit(peer, LAN, near).kind == "lan"
    else:
        with pytest.raises(Forbidden):
            admit(peer, LAN, near)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_a_row_is_served_to_whom_it_says(route: Route):
    """And a row for this machine only is served to nobody else, near or not."""
    changes_models = route.kind == "manage" and route.methods != ("GET",)
    assert route.who == ("admin" if changes_models else "lan")
    for who in ("loopback", "admin"):
        private = route._replace(who=who)  # type: ignore[arg-type]
        assert admit("::1", private, NEAR).kind == "loopback"
        with pytest.raises(Forbidden, match="this machine only"):
            admit("192.168.1.77", private, NEAR)
        with pytest.raises(Forbidden, match=FAR):
            admit("8.8.8.8", private, NEAR)


def test_a_machine_without_networks_serves_itself():
    alone = neighbourhood((), ())
    assert admit("127.0.0.1", LAN, alone).kind == "loopback"
    with pytest.raises(Forbidden):
        admit("192.168.1.77", LAN, alone)
    assert replace(admit("::1", LAN, alone), id="x").id == "x"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("route", [*ROUTES, None], ids=lambda route: route.path if route else "nowhere")
async def test_every_row_asks_who_calls_before_anything_else(lonely: Lonely, route: Route | None):
    """Through the application itself, because no test can come from another network."""
    path = (
        (route.path if route is not None else "/nowhere")
        .replace("{id:path}", "m")
        .replace("{path:path}", "x")
    )
    sent: list[dict[str, Any]] = []
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"{", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    for method in ("POST", "GET"):
        sent.clear()
        scope = {
            **{"type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": path},
            **{"raw_path": path.encode(), "query_string": b"", "headers": [], "client": ("8.8.8.8", 5)},
            **{"server": ("127.0.0.1", 1), "root_path": "", "asgi": {"version": "3.0"}},
        }
        await lonely.router.app(scope, receive, send)
        assert sent[0]["status"] == 403
        error = orjson.loads(b"".join(message.get("body", b"") for message in sent))["error"]
        assert FAR in (error if isinstance(error, str) else error["message"])
        if route is not None and route.dialect == "openai":
            assert error["type"] == "permission_error"
    assert read == 0
