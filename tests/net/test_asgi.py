"""What the ASGI binding alone has to do with: the route table."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route

from herd_node.net.asgi import asgi_endpoint
from herd_node.net.exchange import Exchange


async def echo(exchange: Exchange) -> None:
    await exchange.respond(200, [], await exchange.read_body(16))


async def test_an_endpoint_stands_in_a_starlette_route_as_it_is() -> None:
    app = Starlette(routes=[Route("/v1/models/{name:path}", asgi_endpoint(echo), methods=["POST"])])
    messages: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/models/a/b",
        "raw_path": b"/v1/models/a/b",
        "query_string": b"",
        "headers": [(b"content-length", b"2")],
        "root_path": "",
        "client": ("::ffff:127.0.0.1", 4000),
    }
    await app(scope, receive, send)
    assert [message.get("status", message.get("body")) for message in messages] == [200, b"{}"]
