"""The whole URL table: Starlette's routes, the gateway's allow-list and the tests over "every route" use it.

A row is a `Route`; a handler is a function of (exchange, route, principal). What every request passes, in
this order: admission, method, handler, and errors in the caller's dialect.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from starlette.routing import BaseRoute, Router
from starlette.routing import Route as StarletteRoute
from starlette.types import Receive, Scope, Send

from herd.errors import ApiError, MethodNotAllowed, NotFound
from herd.request import Principal
from herd.web.errors import answer_error
from herd.web.sites import refuse_other_sites
from herd_node.net import exchange as net
from herd_node.net.asgi import asgi_endpoint
from herd_node.net.exchange import BodyTooLarge, ClientGone, Exchange
from herd_node.protocol.routes import FORWARDED, MANAGED, Route

_log = logging.getLogger(__name__)

Handler = Callable[[Exchange, Route, Principal], Awaitable[None]]
Admit = Callable[[str, Route], Principal]

#: What the router answers itself.
OWN: tuple[Route, ...] = (
    Route(("GET",), "/v1/models", "openai", "list", "", "none"),
    Route(("GET",), "/v1/models/{id:path}", "openai", "list", "path", "none"),
    Route(("GET", "HEAD"), "/api/tags", "ollama", "list", "", "none"),
    Route(("GET",), "/api/ps", "ollama", "list", "", "none"),
    Route(("GET", "HEAD"), "/api/version", "ollama", "list", "", "none"),
    Route(("GET", "HEAD"), "/", "ollama", "list", "", "none"),
    Route(("GET",), "/api/status", "ollama", "list", "", "none"),
    Route(("POST",), "/heartbeat", "fleet", "status", ""),
    Route(("GET", "HEAD"), "/fleet/status", "fleet", "status", "", "none"),
    Route(("GET", "HEAD"), "/healthz", "fleet", "status", "", "none"),
    Route(("GET", "HEAD"), "/readyz", "fleet", "status", "", "none"),
    Route(("GET", "HEAD"), "/dashboard/api/traces", "fleet", "status", "", "none"),
    Route(("GET",), "/dashboard/api/model-management", "fleet", "manage", "", "none"),
    Route(("POST",), "/dashboard/api/pull", "fleet", "manage", who="admin"),
    Route(("POST",), "/dashboard/api/delete", "fleet", "manage", who="admin"),
    Route(("POST",), "/dashboard/api/load", "fleet", "manage", who="admin"),
    Route(("POST",), "/dashboard/api/unload", "fleet", "manage", who="admin"),
    Route(("GET", "HEAD"), "/dashboard", "fleet", "page", "", "none"),
    Route(("GET", "HEAD"), "/dashboard/static/{path:path}", "fleet", "page", "", "none"),
)

#: Ollama's own calls that manage models; load and unload are the agent's alone.
OLLAMA_MANAGED: tuple[Route, ...] = tuple(
    route for route in MANAGED.values() if route.path.startswith("/api/")
)

ROUTES: tuple[Route, ...] = (*FORWARDED, *OLLAMA_MANAGED, *OWN)


def build(handlers: Mapping[str, Handler], admit: Admit, routes: Iterable[Route] = ROUTES) -> Router:
    """The ASGI application. `handlers` maps a row's path to its handler; a row without one is a bug."""
    rows: list[BaseRoute] = []
    for route in routes:
        endpoint = asgi_endpoint(guarded(route, handlers[route.path], admit))
        rows.append(StarletteRoute(route.path, endpoint))
    return Router(rows, redirect_slashes=False, default=_nowhere(admit))


def inference_handlers(handlers: Mapping[str, Handler], admit: Admit) -> dict[str, net.Handler]:
    """For the lane (`herd_node.net.lane`): the rows that are forwarded and whose body may be kept in memory,
    each guarded as in `build`."""
    return {
        route.path: guarded(route, handlers[route.path], admit)
        for route in FORWARDED
        if route.body == "whole"
    }


def guarded(route: Route, handler: Handler, admit: Admit) -> net.Handler:
    """One row's handler with everything around it that every request passes."""

    async def serve(exchange: Exchange) -> None:
        try:
            principal = admit(exchange.peer, route)
            if route.who == "admin":
                refuse_other_sites(exchange.headers)
            if exchange.method not in route.methods:
                allowed = ", ".join(route.methods)
                raise MethodNotAllowed(f"{route.path} takes {allowed}, not {exchange.method}", allow=allowed)
            await handler(exchange, route, principal)
        except ClientGone:
            _log.debug("the client of %s left", route.path)
        except BodyTooLarge as error:
            await answer_error(exchange, route.dialect, error)
        except ApiError as error:
            await answer_error(exchange, route.dialect, error)
        except Exception as error:  # noqa: BLE001 - the last line of defence: logged, never shown to the caller
            _log.exception("unexpected error in %s", route.path)
            if exchange.started:
                exchange.abort()
            else:
                await answer_error(exchange, route.dialect, error)

    return serve


def _dialect_of(path: str) -> str:
    """Whom a path belongs to that is nowhere."""
    if path.startswith("/v1/messages/"):
        return "anthropic"
    return "openai" if path.startswith("/v1/") else "ollama"


def _nowhere(admit: Admit) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    unknown = Route((), "/", "fleet", "status", "", "none")

    async def serve(exchange: Exchange) -> None:
        dialect = _dialect_of(exchange.path)
        try:
            admit(exchange.peer, unknown)
            raise NotFound(f"there is nothing at {exchange.path[:200]}")
        except ApiError as error:
            await answer_error(exchange, dialect, error)

    endpoint = asgi_endpoint(serve)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await endpoint(scope, receive, send)

    return app
