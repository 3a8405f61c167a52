"""What the lane and the server use of uvicorn that uvicorn does not promise. Fails first when it changes.

uvicorn is pinned to a minor version; whoever raises it reads `uvicorn/protocols/http/httptools_impl.py` and
this file side by side.
"""

from __future__ import annotations

import asyncio
import inspect
import re

import pytest
import uvicorn
from uvicorn.protocols.http import flow_control, httptools_impl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server, ServerState

from herd_node.net.asgi import asgi_endpoint
from herd_node.net.exchange import Exchange
from herd_node.net.lane import lane_protocol
from herd_node.net.lane_exchange import LaneExchange
from herd_node.net.server import QuietServer

#: All that the protocol reads, sets or calls of `self.cycle`; what belongs to ASGI's own cycle apart.
CYCLE = {"response_complete", "keep_alive", "disconnected", "message_event"}
ASGI_BODY = {"body", "more_body"}
OVERRIDDEN = {
    "on_message_begin": (),
    "on_headers_complete": (),
    "on_body": ("body",),
    "on_message_complete": (),
    "connection_made": ("transport",),
    "connection_lost": ("exc",),
    "eof_received": (),
    "shutdown": (),
    "send_400_response": ("msg",),
}
#: Those of the connection's methods that write or close by themselves. An answer that waits in the outbox
#: must go before; the last one comes seconds after.
WRITING = {"connection_lost", "shutdown", "send_400_response", "timeout_keep_alive_handler"}


def source(method: object) -> str:
    return inspect.getsource(method)  # type: ignore[arg-type]


def test_this_is_the_uvicorn_that_was_read() -> None:
    assert uvicorn.__version__.startswith("0.54."), "read httptools_impl.py again, then raise this"


def test_the_connection_asks_of_its_cycle_what_the_lane_offers() -> None:
    asked = set(re.findall(r"\bself\.cycle\.(\w+)", source(HttpToolsProtocol)))
    assert asked == CYCLE | ASGI_BODY
    assert set(re.findall(r"\bexisting_cycle\.(\w+)", source(HttpToolsProtocol))) == {"response_complete"}
    assert all(hasattr(LaneExchange, name) for name in CYCLE)


def test_the_asgi_body_is_touched_only_where_the_lane_stands_before() -> None:
    for name, method in inspect.getmembers(HttpToolsProtocol, inspect.isfunction):
        touched = set(re.findall(r"\bself\.cycle\.(\w+)", source(method))) & ASGI_BODY
        assert not touched or name in ("on_body", "on_message_complete")


def test_the_overridden_methods_are_uvicorns_with_the_same_signature() -> None:
    lane = lane_protocol({}, 0)
    base = lane.__mro__[1]
    own = {name for name in vars(base) if inspect.isfunction(vars(base)[name]) and not name.startswith("_")}
    assert own == set(OVERRIDDEN)
    for name, parameters in OVERRIDDEN.items():
        for owner in (HttpToolsProtocol, base):
            assert tuple(inspect.signature(getattr(owner, name)).parameters) == ("self", *parameters)


def test_the_connection_writes_and_closes_only_where_the_outbox_is_flushed_before() -> None:
    methods = inspect.getmembers(HttpToolsProtocol, inspect.isfunction)
    writing = {
        name for name, method in methods if re.search(r"transport\.(write|close|abort)", source(method))
    }
    assert writing == WRITING
    assert WRITING - {"timeout_keep_alive_handler"} <= OVERRIDDEN.keys()


def test_the_protocol_is_made_as_uvicorn_makes_it() -> None:
    parameters = tuple(inspect.signature(HttpToolsProtocol.__init__).parameters)
    assert parameters == ("self", "config", "server_state", "app_state", "_loop")


async def test_without_sockets_it_starts_and_listens_nowhere_so_that_an_acceptor_can() -> None:
    async def handler(exchange: Exchange) -> None: ...

    server = QuietServer(asgi_endpoint(handler), on_stop=lambda count: None, graceful_s=1)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await Server.startup(server, [])
    assert (server.started, server.servers) == (True, [])
    for made_with in ("config=config", "server_state=self.server_state", "app_state=self.lifespan.state"):
        assert made_with in source(Server.startup)


def test_the_head_is_begun_with_nothing_but_what_the_lane_puts_back() -> None:
    made = re.findall(r"\bself\.(\w+) =", source(HttpToolsProtocol.on_message_begin))
    assert sorted(made) == ["expect_100_continue", "headers", "scope", "url"]
    assert '"headers": self.headers' in source(HttpToolsProtocol.on_message_begin)


@pytest.mark.parametrize("name", ["url", "headers", "cycle", "parser", "client", "flow", "transport", "loop"])
def test_a_connection_has_what_the_lane_reads(name: str) -> None:
    assert f"self.{name}" in source(HttpToolsProtocol.__init__) + source(HttpToolsProtocol.on_message_begin)


def test_flow_control_is_what_the_lane_waits_for() -> None:
    assert flow_control.HIGH_WATER_LIMIT == 65536
    for name in ("drain", "pause_reading", "resume_reading"):
        assert callable(getattr(flow_control.FlowControl, name))
    assert "write_paused" in source(flow_control.FlowControl.__init__)
    assert httptools_impl.STATUS_LINE[404] == b"HTTP/1.1 404 Not Found\r\n"


def test_the_servers_state_is_what_a_stop_looks_at() -> None:
    state = ServerState()
    assert (state.connections, state.tasks, state.default_headers, state.total_requests) == (
        set(),
        set(),
        [],
        0,
    )
    assert "self.server_state.tasks" in source(Server._wait_tasks_to_complete)
    assert "connection.shutdown()" in source(Server.shutdown)
    assert "total_requests" in source(HttpToolsProtocol.on_response_complete)


def test_the_server_hands_connections_to_the_protocol_class_it_is_given() -> None:
    async def handler(exchange: Exchange) -> None: ...

    app = asgi_endpoint(handler)
    lane = lane_protocol({}, 0)
    config = QuietServer(app, on_stop=lambda count: None, graceful_s=1, http=lane).config
    config.load()
    assert config.http_protocol_class is lane
    assert issubclass(lane, asyncio.Protocol)
    plain = QuietServer(app, on_stop=lambda count: None, graceful_s=1).config
    plain.load()
    assert plain.http_protocol_class is HttpToolsProtocol
