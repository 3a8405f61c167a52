"""The composition root of the router: builds everything once, owns every lifetime, ends everything in order.

Nothing else creates a long-lived object, and nothing else knows all the parts. Background loops run beside
`serve()`, never inside an ASGI lifespan: one that raises is logged, counted in `/fleet/status` and started
again; only the end of `serve()` ends the router.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from ipaddress import ip_address
from typing import Any

from herd.discovery import Announcement
from herd.errors import StartError
from herd.fleet.events import NodeChanged
from herd.fleet.rates import RateRow
from herd.fleet.registry import BeatOutcome, Registry
from herd.identity import Identity, RouterFile, load_or_create_identity, router_urls, write_router_file
from herd.proxy.autopull import AutoPull
from herd.proxy.calls import CallSigner, KeyRing
from herd.proxy.dispatch import Deadlines, Dispatcher
from herd.proxy.ledger import Books
from herd.proxy.managing import Managing
from herd.proxy.node_calls import NodeCalls
from herd.proxy.probe import Prober
from herd.proxy.sending import Sender
from herd.proxy.slots import WaitingRoom
from herd.proxy.trace_writer import TraceWriter
from herd.request import Principal
from herd.scheduling.policy import Policy
from herd.settings import Settings
from herd.store import nodes as stored_nodes
from herd.store import rates as stored_rates
from herd.store import traces as stored_traces
from herd.store.database import Database
from herd.web import routes
from herd.web.admit import Neighbourhood, admit, neighbourhood
from herd.web.aliases import Aliases
from herd.web.dashboard import Dashboard
from herd.web.fleet import Heartbeats, Status
from herd.web.inference import Inference
from herd.web.lists import Lists
from herd.web.manage import DashboardManagement, OllamaManagement
from herd_node.net.lane import lane_protocol
from herd_node.net.outbox import Outbox
from herd_node.net.pool import Pool
from herd_node.net.server import QuietServer, StartPortTaken, bind, port_of
from herd_node.protocol import auth
from herd_node.protocol.routes import FORWARDED, Route
from herd_node.runtime.addresses import own_addresses, own_networks
from herd_node.runtime.chance import RisingHex, new_hex
from herd_node.runtime.clock import Clock, SystemClock
from herd_node.runtime.paths import DataDir, FileLock
from herd_node.runtime.tasks import Tasks, supervise

_log = logging.getLogger(__name__)

Loop = Callable[[], Coroutine[Any, Any, None]]

_SWEEP_S = 1.0
_ADDRESSES_S = 3.0
_PERSIST_S = 10.0
_PRUNE_S = 3600.0
_POOL_IDLE_S = 30.0
_DRAIN_LOOK_S = 0.05
#: Beyond the drain the server waits so long for the last error records to leave.
_AFTER_DRAIN_S = 3.0


class Router:
    """One router process. `open` takes what only one process may have; `run` serves until a signal."""

    def __init__(
        self, settings: Settings, *, clock: Clock | None = None, join_command: str = "herd join"
    ) -> None:
        self.settings = settings
        self.clock = clock or SystemClock()
        self.data_dir = DataDir(settings.data_dir)
        self.boot = new_hex(8)
        self.port = settings.port
        self._join_command = join_command
        self._lock = FileLock(self.data_dir.lock_file)
        self._near: Neighbourhood = neighbourhood(own_networks(), settings.allow_net)
        self._addresses: tuple[str, ...] = ()
        """Those of this machine that the server listens on."""
        self._known: dict[str, Principal] = {}
        self._saved_models: dict[str, tuple[str, ...]] = {}
        self._server: QuietServer | None = None

    # -- start -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Lock the data folder and take the port. Raises StartError with one sentence."""
        folder = self.data_dir.root
        try:
            self.data_dir.ensure()
            free = self._lock.acquire()
        except OSError as error:
            raise StartError(
                f"The data folder {folder} cannot be used: {error.strerror or error}."
            ) from error
        if not free:
            raise StartError(f"A router already runs on {folder}; stop it, or use another --data-dir.")
        try:
            self._sockets = bind(self.settings.host, self.settings.port)
        except StartPortTaken as error:
            self._lock.release()
            raise StartError(str(error)) from error
        self.port = port_of(self._sockets)
        try:
            self.identity: Identity = load_or_create_identity(self.data_dir)
        except StartError:
            for sock in self._sockets:
                sock.close()
            self._lock.release()
            raise
        self._bound = tuple(sock.getsockname()[0] for sock in self._sockets)
        self._addresses = listened_on(self._bound, own_addresses())
        self.urls = router_urls(self.settings.host, self.port, self._addresses)

    def close(self) -> None:
        """Give back what `open` took."""
        write_router_file(self.data_dir, RouterFile(self.identity.router_id))
        self._lock.release()

    def _build(self) -> None:
        """Every object, once. Must run inside the event loop."""
        settings, clock = self.settings, self.clock
        self.database = Database.open(self.data_dir.database_file, clock.wall_s())
        self.database.write_now(stored_traces.mark_interrupted)
        self.tasks = Tasks("herd")
        self.traces = TraceWriter(self.database, clock)
        self.registry = Registry(router_id=self.identity.router_id)
        self.registry.load_rates(self.database.write_now(stored_rates.load_rates))
        self.registry.set_remembered(self.database.write_now(stored_nodes.load_models))
        self.keys = KeyRing(self.identity.join_secret)
        signer = CallSigner(self.keys, self.boot)
        policy = Policy(
            points=settings.score_points,
            wait_timeout_s=settings.wait_timeout_s,
            hold_timeout_s=settings.hold_timeout_s,
            max_attempts=settings.max_attempts,
            vram_fallback=settings.vram_fallback,
            context_protection=settings.context_protection,
        )
        self.room = WaitingRoom(self.registry, policy, clock, max_waiting=settings.max_waiting)
        outbox = Outbox()
        self.pool = Pool(
            idle_s=_POOL_IDLE_S,
            connect_timeout_s=settings.connect_timeout_s,
            unheard_timeout_s=settings.connect_timeout_s,
            outbox=outbox,
        )
        self.prober = Prober(
            self.registry,
            signer,
            self.keys,
            self.boot,
            clock,
            self.tasks,
            connect_timeout_s=settings.connect_timeout_s,
            changed=self._react,
        )
        self.node_calls = NodeCalls(
            self.registry, signer, clock, connect_timeout_s=settings.connect_timeout_s
        )
        self.models = Managing(self.registry, self.node_calls, clock)
        books = Books(self.registry, self.room, self.traces, clock, self.identity.router_id)
        self.dispatcher = Dispatcher(
            books=books,
            sender=Sender(self.pool, signer),
            pulls=AutoPull(
                self.models,
                self.tasks,
                clock,
                mode=settings.auto_pull,
                timeout_s=settings.auto_pull_timeout_s,
            ),
            deadlines=_deadlines(settings),
            chance=random.Random(),
            tell_all=settings.progress == "reasoning",
        )
        gate = auth.BeatGate(self.boot)
        heartbeats = Heartbeats(self.registry, self.keys, gate, clock, self._on_beat)
        self.status = Status(self.registry, self.room, self.traces, heartbeats, self.models.pulls, clock)
        if self.database.notice:
            self.status.notices.append(self.database.notice)
            _log.warning("%s", self.database.notice)
        handlers = self._handlers(heartbeats)
        self.app = routes.build(handlers, self._admit)
        inference = routes.inference_handlers(handlers, self._admit)
        self.lane = lane_protocol(inference, settings.max_body_bytes, outbox)

    def _handlers(self, heartbeats: Heartbeats) -> dict[str, routes.Handler]:
        inference = Inference(
            self.dispatcher,
            self.clock,
            RisingHex(self.clock.wall_s),
            Aliases(self.settings.model_aliases, self._knows),
            max_body_bytes=self.settings.max_body_bytes,
        )
        lists = Lists(self.registry, self.clock)
        manage = OllamaManagement(self.models, self.clock, max_body_bytes=self.settings.max_body_bytes)
        models = DashboardManagement(self.models, max_body_bytes=self.settings.max_body_bytes)
        dashboard = Dashboard(self.status, self.traces, port=self.port, join_command=self._join_command)
        return {
            **{route.path: inference for route in FORWARDED},
            **{route.path: manage for route in routes.OLLAMA_MANAGED},
            "/v1/models": lists.openai_models,
            "/v1/models/{id:path}": lists.openai_model,
            "/api/tags": lists.tags,
            "/api/ps": lists.ps,
            "/api/version": lists.version,
            "/": lists.root,
            "/api/status": lists.status,
            "/heartbeat": heartbeats,
            "/fleet/status": self.status.status,
            "/healthz": self.status.healthz,
            "/readyz": self.status.readyz,
            "/dashboard/api/traces": self.status.traces,
            "/dashboard/api/model-management": models.inventory,
            "/dashboard/api/pull": models.pull,
            "/dashboard/api/delete": models.delete,
            "/dashboard/api/load": models.load,
            "/dashboard/api/unload": models.unload,
            "/dashboard": dashboard.page,
            "/dashboard/static/{path:path}": dashboard.static,
        }

    def _knows(self, name: str) -> bool:
        """Some node lists the model, or did before a restart."""
        snapshot = self.registry.snapshot(self.clock.now_s())
        return name in snapshot.listing or name in snapshot.remembered

    # -- run ---------------------------------------------------------------------------------------------

    async def run(self, started: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Serve until a signal or `stop`. `started` runs beside it once requests are taken."""
        self._build()
        self._server = QuietServer(
            self.app,
            on_stop=self._on_stop,
            graceful_s=self.settings.drain_timeout_s + _AFTER_DRAIN_S,
            hold=True,
            http=self.lane,
        )
        loops: list[tuple[str, Loop]] = [
            ("traces", self.traces.run),
            ("liveness", self._sweep),
            ("probes", self.prober.run),
            ("addresses", self._watch_addresses),
            ("persistence", self._persist),
        ]
        if self.settings.mdns and self._is_reachable_from_outside():
            announcement = Announcement(
                self.identity.router_id, self.port, lambda: self._addresses, self.clock
            )
            loops.append(("mdns", announcement.run))
        try:
            for name, loop in loops:
                self.tasks.spawn(self._supervised(name, loop), name=name)
            self._say_where()
            self._warn_if_public()
            self.status.phase = "serving"
            if started is not None:
                self.tasks.spawn(started(), name="started")
            await self._server.serve(self._sockets)
        finally:
            self._save()
            await self.tasks.close()
            await self.traces.close()
            await self.pool.close(force=True)
            await self.node_calls.close()
            await self.database.close()

    def stop(self) -> None:
        """End as the first signal would."""
        if self._server is not None:
            self._on_stop(1)

    def _on_stop(self, count: int) -> None:
        if count > 1:
            self.dispatcher.drain()  # what still runs gets its row and, where it can, its error record
            return
        if self.status.phase == "draining":
            return
        self.status.phase = "draining"
        _log.info("stopping: what runs may take %.0f s to finish", self.settings.drain_timeout_s)
        self.room.close("the router is shutting down; try again")
        self.tasks.spawn(self._drain(), name="drain")

    async def _drain(self) -> None:
        """Answer on: `/readyz` and whoever comes gets a 503, what runs may finish. Then close the sockets."""
        until_s = self.clock.now_s() + self.settings.drain_timeout_s
        while self.dispatcher.live and self.clock.now_s() < until_s:
            await self.clock.sleep(_DRAIN_LOOK_S)
        self.dispatcher.drain()
        if self._server is not None:
            self._server.stop()

    def _supervised(self, name: str, loop: Loop) -> Coroutine[Any, Any, None]:
        return supervise(loop, name=name, clock=self.clock, on_crash=self._crashed)

    def _crashed(self, name: str, _error: BaseException) -> None:
        self.status.crashes[name] += 1

    # -- what happens --------------------------------------------------------------------------------------

    def _on_beat(self, node_id: str, outcome: BeatOutcome) -> None:
        if outcome.needs_probe:
            self.prober.look()
        self._react()

    def _react(self) -> None:
        """The fleet may have changed: say what people want to know, and plan those who wait."""
        for event in self.registry.drain_events((NodeChanged,)):
            if isinstance(event, NodeChanged):
                _log.info(
                    "node %s is %s%s",
                    event.node_id,
                    event.status,
                    f": {event.reason.removeprefix(f'{event.status}: ')}" if event.reason else "",
                )
        self.room.wake()

    async def _sweep(self) -> None:
        while True:
            await self.clock.sleep(_SWEEP_S)
            self.registry.sweep(self.clock.now_s())
            self._react()

    async def _persist(self) -> None:
        pruned_s = float("-inf")
        while True:
            await self.clock.sleep(_PERSIST_S)
            self._save()
            if self.clock.now_s() - pruned_s >= _PRUNE_S:
                pruned_s = self.clock.now_s()
                before_wall_s = self.clock.wall_s() - self.settings.retention_days * 86400
                self.traces.submit(partial(stored_traces.prune, before_wall_s=before_wall_s))

    def _save(self) -> None:
        """Hand learned rates and what each node lists to the writer; only what changed."""
        wall_s = self.clock.wall_s()
        dirty = self.registry.rates.take_dirty()
        if dirty:
            self.traces.submit(partial(_save_rates, rows=dirty, wall_s=wall_s))
        for node_id, names in self.registry.listed().items():
            if self._saved_models.get(node_id) != names:
                self._saved_models[node_id] = names
                self.traces.submit(partial(_save_models, node_id=node_id, names=names, wall_s=wall_s))

    def _admit(self, peer: str, route: Route) -> Principal:
        """`admit` with a memory: the same few machines call all day."""
        if route.who != "lan":
            return admit(peer, route, self._near)
        known = self._known.get(peer)
        if known is None:
            known = admit(peer, route, self._near)
            if len(self._known) > 4096:
                self._known.clear()
            self._known[peer] = known
        return known

    # -- addresses -----------------------------------------------------------------------------------------

    async def _watch_addresses(self) -> None:
        """A new address means other neighbours, another announcement, and other URLs in the next token."""
        while True:
            await self.clock.sleep(_ADDRESSES_S)
            networks = await asyncio.to_thread(own_networks)
            near = neighbourhood(networks, self.settings.allow_net)
            if near != self._near:
                self._near = near
                self._known.clear()
            addresses = listened_on(self._bound, await asyncio.to_thread(own_addresses))
            if addresses != self._addresses:
                self._addresses = addresses
                self.pool.close_idle()  # kept connections may leave from an address that is gone
                self.urls = router_urls(self.settings.host, self.port, addresses)
                _log.info("this machine's addresses changed; agents reach it at %s", ", ".join(self.urls))
                self._say_where()
                self._warn_if_public()

    def _say_where(self) -> None:
        router = RouterFile(self.identity.router_id, self.boot, os.getpid(), self.urls)
        try:
            write_router_file(self.data_dir, router)
        except OSError as error:  # a full disk: `herd join` names an old address until the next change
            _log.warning("The router's addresses cannot be written down: %s", error)

    def _is_reachable_from_outside(self) -> bool:
        try:
            return not ip_address(self.settings.host.strip("[]")).is_loopback
        except ValueError:
            return self.settings.host != "localhost"

    def _warn_if_public(self) -> None:
        if not self._is_reachable_from_outside():
            return
        public = [address for address in self._addresses if ip_address(address).is_global]
        if public:
            _log.warning(
                "This machine has the public address %s: its network neighbours can use every model here. "
                "Keys do not exist yet; put a firewall before port %d, or start with --host 127.0.0.1.",
                public[0],
                self.port,
            )


def listened_on(bound: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """Those of our own addresses that a server bound to `bound` answers on; a wildcard is a whole family."""
    here = [ip_address(address.partition("%")[0]) for address in bound]
    every = {address.version for address in here if address.is_unspecified}
    return tuple(address for address in own if (ip := ip_address(address)).version in every or ip in here)


def _deadlines(settings: Settings) -> Deadlines:
    return Deadlines(
        first_record_s=settings.first_record_timeout_s,
        cold_load_s=settings.cold_load_timeout_s,
        gap_s=settings.gap_timeout_s,
        gap_buffered_s=settings.gap_buffered_timeout_s,
        total_s=settings.total_timeout_s,
        write_s=settings.write_timeout_s,
        pull_wait_s=settings.auto_pull_wait_s,
    )


def _save_rates(connection: sqlite3.Connection, rows: list[RateRow], wall_s: float) -> None:
    stored_rates.save_rates(connection, rows, wall_s)


def _save_models(connection: sqlite3.Connection, node_id: str, names: tuple[str, ...], wall_s: float) -> None:
    stored_nodes.save_models(connection, node_id, names, wall_s)
