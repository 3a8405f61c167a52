"""`GET /dashboard` and its style sheet. Context in, page out: the markup is in `dashboard_templates/`."""

from __future__ import annotations

from herd.errors import NotFound
from herd.proxy.trace_writer import TraceWriter
from herd.request import Principal
from herd.web import render
from herd.web.fleet import Status
from herd_node.net.exchange import Exchange
from herd_node.protocol.routes import Route

_LAST_TRACES = 20


class Dashboard:
    """Handlers of the page rows."""

    def __init__(self, status: Status, traces: TraceWriter, *, port: int, join_command: str) -> None:
        self._status = status
        self._traces = traces
        self._port = port
        self._join_command = join_command

    async def page(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        rows = await self._traces.latest(_LAST_TRACES, None)
        host = (exchange.header(b"host") or f"127.0.0.1:{self._port}".encode()).decode("latin-1")
        context = render.overview_context(
            self._status.fleet(),
            rows,
            base_url=f"http://{host}",
            join_command=self._join_command,
            notice=" ".join(self._status.notices) or None,
        )
        body = render.render("overview.html", context)
        await exchange.respond(200, [(b"content-type", render.HTML), *render.SECURITY_HEADERS], body)

    async def static(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        found = render.static_file(exchange.path)
        if found is None:
            raise NotFound("no such file")
        body, content_type = found
        headers = [(b"content-type", content_type), (b"cache-control", b"max-age=300")]
        await exchange.respond(200, [*headers, *render.SECURITY_HEADERS], body)
